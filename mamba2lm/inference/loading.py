"""From a folder to a model and a tokenizer that are ready to run."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch

from mamba2lm.data.tokenizer import Tokenizer
from mamba2lm.distributed import join_tensor_group
from mamba2lm.host import tune_host
from mamba2lm.hub.folder import build
from mamba2lm.hub.source import find_folder, read_source, run_config, tokenizer_of
from mamba2lm.models import LanguageModel
from mamba2lm.models.checkpoint import TOKENIZER, load_model, read_config, resolve
from mamba2lm.models.sharding import split_model
from mamba2lm.schema import ConfigError, closest

DTYPES: Final = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}


@dataclass
class LoadedRun:
    """A checkpoint in memory."""

    model: LanguageModel
    tokenizer: Tokenizer | None
    """None where the model was trained on a synthetic task."""
    folder: Path
    """The checkpoint folder that was found."""
    config: dict[str, Any]
    """The run's configuration, as plain values."""

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the model, or of this process's part, computed when first asked for."""
        return self.model.fingerprint()

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes, of those that share the model."""
        return self.model.tensor is None or self.model.tensor.rank == 0


def load_run(
    path: str | Path,
    *,
    key: str = "checkpoint",
    device: str = "auto",
    dtype: str = "auto",
    share: bool = True,
) -> LoadedRun:
    """Load a run's newest valid checkpoint, one checkpoint, or a model of another library.

    Processes that torchrun started share the model, each with a part of every layer, unless
    ``share`` is false.

    Args:
        path: A run folder, a checkpoint folder, a folder that transformers or mamba-ssm loads, or
            its name on the hub.
        key: Config key that held the path, for errors.
        device: ``auto`` (a GPU where there is one) or a torch device.
        dtype: ``auto`` (bfloat16 on a GPU that has it, else float32) or one of ``DTYPES``.
        share: Whether processes share the model; else each has all of it.

    Raises:
        ConfigError: Nothing usable at the path, a tokenizer that does not fit the model, or a
            device or dtype that there is not.
    """
    chosen_device = choose_device(device)
    chosen_dtype = choose_dtype(dtype, chosen_device)
    tune_host()
    if (foreign := find_folder(path, key)) is not None:
        source = read_source(foreign, key)
        tensor = join_tensor_group(chosen_device) if share else None
        model = build(source, device=chosen_device if tensor is None else "cpu", dtype=chosen_dtype)
        if tensor is not None:
            model = split_model(model, tensor).to(chosen_device).eval()
        return LoadedRun(model, tokenizer_of(source, key), foreign, run_config(source))
    folder = resolve(path, key)
    config = read_config(folder, key)
    tensor = join_tensor_group(chosen_device) if share else None
    model = load_model(folder, key=key, device=chosen_device, dtype=chosen_dtype, tensor=tensor)
    tokenizer = None
    if (folder / TOKENIZER).is_dir():
        tokenizer = Tokenizer.load(folder / TOKENIZER, key)
        if tokenizer.vocab_size > model.vocab_size:
            raise ConfigError(
                key,
                str(path),
                f"its tokenizer has {tokenizer.vocab_size:,} ids and its model "
                f"{model.vocab_size:,}; put the tokenizer it was trained with into "
                f"{folder / TOKENIZER}.",
            )
    return LoadedRun(model, tokenizer, folder, config)


def find_model(path: str | Path, key: str) -> Path:
    """Return the folder that ``load_run`` would read, downloaded if need be.

    Args:
        path: As for ``load_run``.
        key: Config key that held the path, for errors.

    Raises:
        ConfigError: Nothing usable at the path.
    """
    foreign = find_folder(path, key)
    return resolve(path, key) if foreign is None else foreign


def choose_device(device: str) -> torch.device:
    """Return the device that a config means.

    Raises:
        ConfigError: Not a device's name, or there is none of it here.
    """
    if device == "auto":
        local = os.environ.get("LOCAL_RANK", "0")
        return torch.device(f"cuda:{local}" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
        if chosen.type == "cuda" and chosen.index is not None:
            # Streams, events and graphs are the current device's.
            torch.cuda.set_device(chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(
            "device", device, f"cannot be used here ({reason}); use auto, cpu or cuda."
        ) from error
    return chosen


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Return the dtype that a config means on a device.

    Raises:
        ConfigError: Not one of ``DTYPES``.
    """
    if dtype == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    if dtype not in DTYPES:
        raise ConfigError(
            "dtype", dtype, f"must be auto, {', '.join(DTYPES)}.{closest(dtype, DTYPES)}"
        )
    return DTYPES[dtype]
