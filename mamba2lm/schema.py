"""From what a user wrote to typed dataclasses, and the error that tells them what to mend.

This file knows nothing else of the package; every room may import it.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

T = TypeVar("T")


class ConfigError(ValueError):
    """Something the user can mend: a key, a value, a file.

    The scripts print it as one line and exit with code 2; every other exception is a bug of ours
    and keeps its traceback.
    """

    def __init__(self, key: str, value: object, remedy: str) -> None:
        """Name the config key, the value it has, and what to do about it.

        Args:
            key: Dotted config key as typed on the command line, e.g. ``"model.pattern"``.
            value: The offending value; shown with ``repr`` and cut at 120 characters.
            remedy: A full sentence or two: what is wrong and what would be right.
        """
        shown = repr(value)
        if len(shown) > 120:
            shown = shown[:117] + "..."
        super().__init__(f"{key}={shown}: {remedy}")
        self.key = key
        self.value = value
        self.remedy = remedy

    def __reduce__(self) -> tuple[type[ConfigError], tuple[str, object, str]]:
        """Let other processes have it whole."""
        return type(self), (self.key, self.value, self.remedy)


def closest(word: str, candidates: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the most similar candidate, or ``""``."""
    found = difflib.get_close_matches(str(word), [str(c) for c in candidates], n=1, cutoff=0.6)
    return f" Did you mean '{found[0]}'?" if found else ""


def from_mapping(cls: type[T], mapping: Mapping[str, Any] | DictConfig | None, key: str) -> T:
    """Build the dataclass ``cls`` from plain values, checking every name and type.

    Args:
        cls: A dataclass type (not frozen; fields typed as OmegaConf understands them).
        mapping: Field values; nested mappings for nested dataclasses. None means all defaults.
        key: Dotted config key of ``mapping``, for error messages.

    Raises:
        ConfigError: An unknown field, or a value of the wrong type.
    """
    schema = OmegaConf.structured(cls)
    values = OmegaConf.create({}) if mapping is None else OmegaConf.create(mapping)  # type: ignore[arg-type]
    if not isinstance(values, DictConfig):
        raise ConfigError(key, mapping, f"expected a mapping of {fields_of(cls)}.")
    check_names(schema, values, key)
    try:
        return OmegaConf.to_object(OmegaConf.merge(schema, values))  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise from_omegaconf(error, key, values) from error


def fields_of(cls: type) -> str:
    """Return a dataclass's field names, comma separated."""
    return ", ".join(field.name for field in dataclasses.fields(cls))


def check_names(schema: DictConfig, values: DictConfig, key: str) -> None:
    """Refuse a key that the schema does not have, naming the closest one that it has."""
    for name in values:
        full = f"{key}.{name}" if key else str(name)
        if name not in schema.keys():  # noqa: SIM118 (a missing value is not `in` the schema)
            known = ", ".join(str(k) for k in schema)
            raise ConfigError(
                full,
                _peek(values, name),
                f"no such key.{closest(str(name), schema)} Known: {known}.",
            )
        nested_schema, nested = _node(schema, name), _node(values, name)
        if not dataclasses.is_dataclass(section := OmegaConf.get_type(nested_schema)):
            continue
        if isinstance(nested_schema, DictConfig) and isinstance(nested, DictConfig):
            check_names(nested_schema, nested, full)
        elif not OmegaConf.is_interpolation(values, str(name)):
            raise ConfigError(
                full, _peek(values, name), f"expected a mapping of {fields_of(section)}."
            )


def from_omegaconf(error: OmegaConfBaseException, key: str, values: Any = None) -> ConfigError:
    """Turn OmegaConf's own error into ours."""
    full = error.full_key or (str(error.key) if error.key is not None else "")
    full = ".".join(part for part in (key, full) if part)
    value = None
    if isinstance(values, DictConfig) and error.full_key:
        value = OmegaConf.select(values, str(error.full_key), throw_on_missing=False)
    reason = str(error.msg or error).splitlines()[0].rstrip(".")
    return ConfigError(full or "config", value, f"{reason}.")


def _node(config: DictConfig, name: Any) -> Any:
    return config._get_node(name)


def _peek(config: DictConfig, name: Any) -> Any:
    node = config._get_node(name)
    return (
        OmegaConf.to_container(node) if OmegaConf.is_config(node) else getattr(node, "_val", node)
    )  # type: ignore[call-overload]
