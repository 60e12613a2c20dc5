"""What a checkpoint holds besides weights, how it is written beside training, which are kept.

A save copies what this process has into memory of the host and returns; a thread writes, flushes
and hashes it while training goes on. When the files of all processes are there, the main process
writes the manifest, gives the folder its name, moves ``latest`` and only then prunes. A save that
fails leaves the earlier checkpoints as they were.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mamba2lm.distributed import World
from mamba2lm.models.checkpoint import (
    CONFIG,
    WEIGHTS_IN_PIECES,
    StoredTensors,
    checkpoint_path,
    checkpoints_of,
    complete_checkpoint,
    load_weights,
    partial_path,
    point,
    pointed,
    save_pieces,
    stored_weights,
    sum_files,
)
from mamba2lm.models.sharding import ModelLayout, Piece
from mamba2lm.schema import ConfigError
from mamba2lm.training.carry import CARRIED, save_carried
from mamba2lm.training.optimizer import Optimizers
from mamba2lm.training.parallelize import ParallelModel, to_local
from mamba2lm.training.run_folder import RunFolder, copy_tokenizer

log = logging.getLogger(__name__)

OPTIMIZER = "optimizer.safetensors"
PROGRESS = "progress.json"
_SUMS = "sums"  # of what each process wrote; not part of the checkpoint


@dataclass
class Progress:
    """Where a run stands; with the weights and the optimizer's state it is all there is to save.

    The data need one number, the samples consumed: what sample number g is depends on the seed
    alone. The learning rate is a function of the step.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    data_fingerprint: str = ""
    best_val_loss: float | None = None
    seconds: float = 0.0
    """Training time so far."""
    recent_losses: list[float] = field(default_factory=list)
    """What ``training.spike_sigmas`` compares with."""


class Checkpointer:
    """Save the checkpoints of a run, one at a time, beside its training."""

    def __init__(
        self,
        run: RunFolder,
        parallel: ParallelModel,
        optimizers: Optimizers,
        world: World,
        *,
        keep_last: int,
    ) -> None:
        """Get ready; nothing is written yet.

        Args:
            run: Where the checkpoints go.
            parallel: The model, and which part of it this process has.
            optimizers: Their state is saved too.
            world: The processes.
            keep_last: Newest checkpoints to keep; the best is kept besides.
        """
        self._run, self._parallel, self._optimizers = run, parallel, optimizers
        self._world, self._keep_last = world, keep_last
        self._host = HostCopies(world.device)
        self._pending: _Save | None = None
        self._prepared = False

    def save(
        self,
        progress: Progress,
        *,
        best: bool = False,
        carried: Mapping[str, Tensor] | None = None,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        """Begin to save this step; every process calls it after the same step.

        Args:
            progress: Where the run stands.
            best: Whether ``best`` shall name this checkpoint.
            carried: States that the next step begins from, of all processes, if they are carried;
                on the host and never changed.
            alive: Called now and then while an earlier save is waited for.

        Raises:
            SaveError: The earlier save failed; this one has not begun.
        """
        self.finish(alive)
        self._parallel.reshard()
        folder = checkpoint_path(self._run.path, progress.step)
        self._host.begin()
        files: list[tuple[str, list[_Item]]] = []
        layout = self._parallel.layout
        if layout is not None or self._world.is_main:
            files = [
                (WEIGHTS_IN_PIECES, self._copies(_weights(self._parallel), layout)),
                ("optimizer", self._copies(_moments(self._optimizers), layout)),
            ]
        text = json.dumps(asdict(progress), indent=1) + "\n" if self._world.is_main else None
        self._pending = _Save(folder, best)
        self._pending.start(self._write, files, text, torch.get_rng_state(), carried)

    def wait_until_copied(self) -> None:
        """Have what comes next on the device wait until a save has copied the weights."""
        self._host.wait()

    @property
    def busy(self) -> bool:
        """Whether a save is under way; the same on every process."""
        return self._pending is not None

    def poll(self) -> None:
        """Complete a save whose files are all there; called after every step."""
        if not self._prepared:  # now that an update has made the moments
            self._prepared = True
            self._parallel.reshard()
            self._host.reserve(
                {
                    saved_as: local
                    for tensors in (_weights(self._parallel), _moments(self._optimizers))
                    for saved_as, name, tensor in tensors
                    if (local := to_local(tensor)).is_cuda and self._writes(name, local)
                }
            )
        if self._pending is not None:
            self._complete(self._pending, wait=False)

    def finish(self, alive: Callable[[], None] = lambda: None) -> None:
        """Wait for a save that is under way, and complete it.

        Args:
            alive: Called every second or so meanwhile.
        """
        if self._pending is not None:
            while self._pending.thread.is_alive():
                self._pending.thread.join(1.0)
                alive()
            self._complete(self._pending, wait=True)

    def _copies(
        self, tensors: Iterator[tuple[str, str, Tensor]], layout: ModelLayout | None
    ) -> list[_Item]:
        """Copy what this process has to write: its boxes, each by one process."""
        items = []
        for saved_as, name, tensor in tensors:
            local = to_local(tensor)
            if not self._writes(name, local):
                continue
            copy = self._host.copy(saved_as, local)
            if local.ndim == 0:
                items.append(_Item(saved_as, (), Piece((), ()), copy))
            elif layout is None:
                whole = Piece((0,) * local.ndim, tuple((0, n) for n in local.shape))
                items.append(_Item(saved_as, tuple(local.shape), whole, copy))
            else:
                shape, pieces = layout.shapes[name], layout.pieces(name)
                items += [_Item(saved_as, shape, piece, piece.of(copy)) for piece in pieces]
                assert sum(math.prod(piece.shape) for piece in pieces) == copy.numel(), name
        return items

    def _writes(self, name: str, local: Tensor) -> bool:
        """Return whether this process saves a parameter, or what belongs to one."""
        layout = self._parallel.layout
        if layout is None or local.ndim == 0:  # a step counter is the same everywhere
            return self._world.is_main
        return layout.writes(name)

    def _write(
        self,
        folder: Path,
        files: Sequence[tuple[str, list[_Item]]],
        progress: str | None,
        random_state: Tensor,
        carried: Mapping[str, Tensor] | None,
    ) -> None:
        """Write this process's files; runs in a thread."""
        partial, rank = partial_path(folder), self._world.rank
        partial.mkdir(parents=True, exist_ok=True)
        self._host.arrived()
        mine: list[Path] = []
        for stem, items in files:
            if self._parallel.layout is None:
                mine.append(partial / f"{stem}.safetensors")
                metadata = {"format": "pt"} if stem == WEIGHTS_IN_PIECES else None
                tensors = {item.name: item.tensor.contiguous() for item in items}
                save_file(tensors, mine[-1], metadata=metadata)
            else:
                mine.append(partial / stem / f"{rank:05d}.safetensors")
                pieces = [(item.name, item.piece, item.tensor) for item in items]
                save_pieces(pieces, {item.name: item.shape for item in items}, mine[-1])
        if progress is not None:
            save_file({"cpu": random_state}, partial / "random.safetensors")
            (partial / PROGRESS).write_text(progress, "utf-8")
            shutil.copyfile(self._run.path / CONFIG, partial / CONFIG)
            copy_tokenizer(self._run, partial)
            mine += [partial / name for name in ("random.safetensors", PROGRESS, CONFIG)]
            mine += (partial / "tokenizer").rglob("*")
            if carried:
                save_carried(carried, partial)
                mine.append(partial / CARRIED)
        sums = partial / _SUMS / f"{rank:05d}.json"
        sums.parent.mkdir(exist_ok=True)
        sums.write_text(json.dumps(sum_files(partial, mine)), "utf-8")

    def _complete(self, save: _Save, *, wait: bool) -> None:
        ended = wait or not save.thread.is_alive()
        ended_everywhere, failed = self._world.sum(float(ended), float(save.error is not None))
        if ended_everywhere < self._world.size:
            return
        self._pending = None
        if save.error is not None:
            log.error("%s could not be written: %s", partial_path(save.folder), save.error)
        if failed:
            if self._world.is_main:
                shutil.rmtree(partial_path(save.folder), ignore_errors=True)
            self._world.barrier()
            raise SaveError(f"checkpoint {save.folder.name} could not be written")
        if self._world.is_main:
            self._publish(save)
        if wait:
            self._world.barrier()

    def _publish(self, save: _Save) -> None:
        """Give a written checkpoint its name and let go of older ones."""
        folder = save.folder
        sums = partial_path(folder) / _SUMS
        entries: dict[str, Any] = {}
        for part in sorted(sums.iterdir()):
            entries |= json.loads(part.read_text("utf-8"))
        shutil.rmtree(sums)
        if folder.exists():
            # A run goes on from its newest whole checkpoint: one of a later step is damaged.
            log.warning("replacing the damaged checkpoint %s", folder)
            delete(folder)
        complete_checkpoint(folder, entries)
        point(self._run.path, "latest", folder)
        if save.best:
            point(self._run.path, "best", folder)
        prune(self._run, self._keep_last)


class SaveError(RuntimeError):
    """A checkpoint could not be written; those before it are untouched."""


@dataclass
class _Item:
    """A box to be written."""

    name: str
    shape: tuple[int, ...]
    piece: Piece
    tensor: Tensor


class _Save:
    """A checkpoint that is being written."""

    def __init__(self, folder: Path, best: bool) -> None:
        self.folder, self.best = folder, best
        self.error: Exception | None = None

    def start(self, write: Any, *arguments: Any) -> None:
        """Call ``write(folder, *arguments)`` in a thread, keeping what goes wrong."""

        def run() -> None:
            try:
                write(self.folder, *arguments)
            except Exception as error:  # reported by the main thread, on every process
                self.error = error

        self.thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self.thread.start()


class HostCopies:
    """Copies of tensors in the host's memory; a GPU makes them while it goes on computing."""

    def __init__(self, device: torch.device) -> None:
        """Prepare for tensors of one device."""
        # Page-locked memory is slow to get: what one save used, the next uses again.
        self._buffers: dict[str, Tensor] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copied: torch.cuda.Event | None = None
        self._reserving: threading.Thread | None = None

    def reserve(self, tensors: Mapping[str, Tensor]) -> None:
        """Begin to get memory for copies, beside whatever goes on; the first save finds it."""
        if self._stream is None:
            return

        def get() -> None:
            for name, tensor in tensors.items():
                self._buffer(name, tensor)

        self._reserving = threading.Thread(target=get, name="host memory", daemon=True)
        self._reserving.start()

    def begin(self) -> None:
        """Start a set of copies; those of the set before are given up."""
        if self._reserving is not None:
            self._reserving.join()
            self._reserving = None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())

    def copy(self, name: str, tensor: Tensor) -> Tensor:
        """Return a copy on the host; not there before ``arrived``.

        Args:
            name: Whose memory to use again, unless it does not fit.
            tensor: On the device, or on the host already.
        """
        tensor = tensor.detach()
        if self._stream is None or not tensor.is_cuda:
            return tensor.clone()
        buffer = self._buffer(name, tensor)
        with torch.cuda.stream(self._stream):
            buffer.copy_(tensor, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        return buffer

    def wait(self) -> None:
        """Have the device's current stream wait for the copies."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)

    def arrived(self) -> None:
        """Wait on the host for the copies."""
        if self._copied is not None:
            self._copied.synchronize()

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != like.shape or buffer.dtype != like.dtype:
            buffer = torch.empty(like.shape, dtype=like.dtype, pin_memory=True)
            self._buffers[name] = buffer
        return buffer


def _weights(parallel: ParallelModel) -> Iterator[tuple[str, str, Tensor]]:
    """Yield every weight's name (twice) and tensor, a tied head once."""
    for name, parameter in parallel.model.named_parameters():
        yield name, name, parameter.detach()


def _moments(optimizers: Optimizers) -> Iterator[tuple[str, str, Tensor]]:
    """Yield every optimizer tensor: the name it is saved as, its parameter's name, itself."""
    for name, key, tensor in optimizers.tensors():
        yield f"{name}::{key}", name, tensor


def restore(
    folder: Path, parallel: ParallelModel, optimizers: Optimizers, *, key: str = "resume"
) -> Progress:
    """Load weights, optimizer state and random state, of whatever layout; return the progress.

    Raises:
        ConfigError: Something in the folder is missing or does not fit.
    """
    layout = parallel.layout
    try:
        if layout is None:
            load_weights(parallel.model, folder, key)
        else:
            stored = stored_weights(folder, key)
            stored.check(layout.shapes, key, folder)
            with torch.no_grad():
                for name, parameter in parallel.model.named_parameters():
                    stored.fill(to_local(parameter), name, layout.pieces(name))
        optimizers.load(StoredTensors(folder, "optimizer"), layout)
        torch.set_rng_state(load_file(folder / "random.safetensors")["cpu"])
        saved = json.loads((folder / PROGRESS).read_text("utf-8"))
    except ConfigError:
        raise
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise ConfigError(key, str(folder), f"cannot continue from it: {error}.") from error
    known = {field.name for field in fields(Progress)}
    return Progress(**{name: value for name, value in saved.items() if name in known})


def prune(run: RunFolder, keep_last: int) -> None:
    """Delete all but the newest ``keep_last`` checkpoints and the best one."""
    kept = {checkpoint.name for checkpoint in checkpoints_of(run.path)[-keep_last:]}
    kept |= {found.name for name in ("latest", "best") if (found := pointed(run.path, name))}
    for checkpoint in checkpoints_of(run.path):
        if checkpoint.name not in kept:
            delete(checkpoint)


def delete(checkpoint: Path) -> None:
    """Delete a checkpoint, and what an earlier deletion that was killed left of others."""
    # Renamed first, so that a kill in the middle leaves nothing that looks whole.
    checkpoint.rename(checkpoint.with_name(f"{checkpoint.name}.deleting"))
    for doomed in checkpoint.parent.glob("*.deleting"):
        shutil.rmtree(doomed)


def clear_partial(run: RunFolder) -> None:
    """Delete what saves that were killed left half written."""
    for partial in (run.path / "checkpoints").glob("step_*.partial"):
        shutil.rmtree(partial)
