"""How a script starts: Hydra composes, the dataclasses check, and a mistake costs one line.

Exit codes: 0 done, 2 something in the command, configuration or files to mend (one line on
standard error, nothing written), 3 training diverged, 4 the last checkpoint could not be written,
5 another process does not answer, 75 stopped by SIGTERM after saving, 76 by SIGUSR1, 1 anything
else.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.logging import RichHandler

from mamba2lm.jobs import Ended, join_job, prepare_to_launch, run_job, runs_as_job
from mamba2lm.schema import ConfigError, check_names, closest

T = TypeVar("T")
CONFIGS = Path(__file__).resolve().parent.parent / "configs"
EXIT_MISTAKE = 2


def script(
    config_name: str, schema: type[T]
) -> Callable[[Callable[[T], int | None]], Callable[[], None]]:
    """Turn ``main(config)`` into a command that takes Hydra overrides.

    Args:
        config_name: ``configs/<config_name>.yaml``; its defaults list begins with
            ``<config_name>_schema``.
        schema: The root dataclass. ``main`` gets an instance of it and may return an exit code.
    """

    def decorate(main: Callable[[T], int | None]) -> Callable[[], None]:
        @functools.wraps(main)
        def run() -> None:
            begin_process()
            prepare_to_launch()
            os.environ["HYDRA_FULL_ERROR"] = "1"  # let errors through to the clauses below
            ConfigStore.instance().store(name=f"{config_name}_schema", node=schema)
            composed: list[DictConfig] = []

            @functools.wraps(main)
            def keep(config: DictConfig) -> None:
                if not runs_as_job():
                    composed.append(config)
                    return
                join_job()
                begin_process()
                run_job(lambda: main(typed(config, schema)))

            entry = hydra.main(
                version_base="1.3", config_path=str(CONFIGS), config_name=config_name
            )(keep)
            code = 0
            try:
                entry()
                # Not inside Hydra, which adds lines of its own to whatever goes wrong there.
                for config in composed:
                    code = main(typed(config, schema)) or code
            except ConfigError as error:
                fail(str(error))
            except Ended as error:
                code = error.code
            except (HydraException, OmegaConfBaseException) as error:
                fail(explain(error, schema))
            except RuntimeError as error:
                if 'Could not detect "srun"' not in str(error):
                    raise
                fail("hydra/launcher=slurm: there is no srun here; start it where Slurm's is.")
            sys.exit(code)

        return run

    return decorate


def typed(config: DictConfig, schema: type[T]) -> T:
    """Turn a composed config into its dataclass.

    Raises:
        ConfigError: A mandatory value is missing, or a key was added that there is not.
    """
    check_names(OmegaConf.structured(schema), config, "")
    missing = OmegaConf.missing_keys(config)
    if missing:
        key = sorted(missing)[0]
        raise ConfigError(key, None, f"has to be given, as {key}=… on the command line.")
    built = OmegaConf.to_object(config)
    assert isinstance(built, schema)
    return built


def explain(error: Exception, schema: type) -> str:
    """Say in one line which key Hydra or OmegaConf objects to, its value and the remedy."""
    if isinstance(error, OverrideParseException) and "=" in error.override:
        key, _, value = error.override.partition("=")
        quoted = '{}="{}"'.format(key, value.replace('"', '\\"'))
        return (
            f"{key}={value!r}: has characters that Hydra reads in its own way; a text with them "
            f"goes into double quotes: {shlex.quote(quoted)}"
        )
    reasons: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        reasons.append(str(cause))
        cause = cause.__cause__ or cause.__context__
    text = "\n".join(reasons)
    if option := re.search(r"Could not (?:find|load) '([\w/]+)/([^/']*)'", text):
        group, value = option.groups()
        names = text.partition(f"Available options in '{group}':")[2].partition("Config search")[0]
        plugin = value.startswith("submitit") and "submitit_local" not in names
        if group == "hydra/launcher" and plugin:
            return (
                f"{group}: {value!r} is not installed; hydra-submitit-launcher brings it: "
                "pip install 'mamba2lm[slurm]'."
            )
        hint = closest(value, names.split())
        return f"{group}={value!r}: no such option.{hint} Known: {', '.join(names.split())}."
    found = re.search(r"full_key: ([\w.]+)", text) or re.search(r"override '[+~]*([\w./]+)", text)
    key = found.group(1) if found else ""
    argument = next(
        (a for a in sys.argv[1:] if a.lstrip("+~").startswith((f"{key}=", f"{key}."))), ""
    )
    value = argument.partition("=")[2] or None
    if key and re.search(r"is not in struct|not in '\w+'|Could not find", text):
        node = OmegaConf.structured(schema)
        *parents, name = key.split(".")
        known = OmegaConf.select(node, ".".join(parents)) if parents else node
        if isinstance(known, DictConfig) and name not in known:
            names = ", ".join(str(k) for k in known)
            hint = closest(name, (str(k) for k in known))
            if _is_open(known):
                hint += f" To add it, write a + before: +{argument}."
            key = argument.lstrip("+~").partition("=")[0] or key
            return f"{key}={value!r}: no such key.{hint} Known: {names}."
    if reasons[0].startswith("Error merging override") and len(reasons) > 1:
        del reasons[0]  # the next one says what is wrong with it
        reasons[0] = reasons[0].splitlines()[0].rstrip(".") + "."
    first = " ".join(line.strip() for line in reasons[0].splitlines() if line.strip())
    first = re.sub(r"\s*(full_key|object_type|reference_type)[:=]\s*\S+", "", first)
    if "is not a valid bool" in first:
        first = "use true or false."
    if len(reasons) > 1 and not key:
        first += " " + " ".join(reasons[1].split())
    return f"{key}={value!r}: {first}" if key and value is not None else first


def _is_open(node: DictConfig) -> bool:
    """Return whether a dataclass's field is a mapping that takes any key."""
    parent = node._get_parent()
    return (
        not dataclasses.is_dataclass(OmegaConf.get_type(node))
        and isinstance(parent, DictConfig)
        and dataclasses.is_dataclass(OmegaConf.get_type(parent))
    )


def fail(message: str) -> None:
    """Print one line on standard error and exit with code 2."""
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    sys.exit(EXIT_MISTAKE)


def begin_process() -> None:
    """Start logging; of processes that do one thing together the first one has the output."""
    start_logging()
    if os.environ.get("RANK", "0") != "0":
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def start_logging() -> None:
    """Log to standard error, with rich where that is a terminal; standard output stays text."""
    if sys.stderr.isatty():
        handler: logging.Handler = RichHandler(
            console=Console(stderr=True), show_path=False, log_time_format="%H:%M:%S"
        )
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("mamba2lm").setLevel(logging.INFO)
    logging.getLogger("eval").setLevel(logging.INFO)
