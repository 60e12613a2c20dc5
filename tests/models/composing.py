"""Compose a script's configuration in a test, as its command line would."""

from __future__ import annotations

from typing import TypeVar

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra

from mamba2lm.cli import CONFIGS, typed
from mamba2lm.config import TrainConfig

T = TypeVar("T")


def composed(script: str, schema: type[T], *overrides: str) -> T:
    """Return the typed configuration of ``configs/<script>.yaml`` with overrides.

    Raises:
        Exception: Hydra's, for an unknown group, option or key; ConfigError for what is missing.
    """
    ConfigStore.instance().store(name=f"{script}_schema", node=schema)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return typed(compose(script, list(overrides)), schema)


def train_config(*overrides: str) -> TrainConfig:
    """Return what ``python train.py`` with these arguments would run."""
    return composed("train", TrainConfig, *overrides)
