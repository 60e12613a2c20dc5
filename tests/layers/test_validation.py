"""A shape that cannot be is refused before anything is built, by key, value and remedy."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mamba2lm.layers import mixer_class, registered_mixers
from mamba2lm.schema import ConfigError, from_mapping

# (mixer, its fields, the key at fault, its value as shown, a part of the remedy); d_model is 96.
BAD: list[tuple[str, dict[str, Any], str, Any, str]] = [
    ("mamba2", {"d_state": 0}, "d_state", 0, "must be ≥ 1"),
    ("mamba2", {"headdim": 0}, "headdim", 0, "must be ≥ 1"),
    ("mamba2", {"ngroups": -1}, "ngroups", -1, "must be ≥ 1"),
    ("mamba2", {"chunk_size": 0}, "chunk_size", 0, "must be ≥ 1"),
    ("mamba2", {"d_conv": 5}, "d_conv", 5, "must be 1 to 4"),
    ("mamba2", {"headdim": 80}, "headdim", 80, "must divide the inner width expand·d_model = 192"),
    ("mamba2", {"expand": 1.005}, "headdim", 64, "expand·d_model = 96.48"),
    ("mamba2", {"ngroups": 2}, "ngroups", 2, "must divide the number of heads, 3"),
    ("mamba2", {"A_init_range": [1.0]}, "A_init_range", [1.0], "two positive numbers"),
    ("mamba2", {"A_init_range": [0.0, 4.0]}, "A_init_range", [0.0, 4.0], "two positive numbers"),
    ("mamba2", {"A_init_range": [3.0, 2.0]}, "A_init_range", [3.0, 2.0], "[low, high]"),
    ("mamba2", {"dt_limit": [0.2, 0.1]}, "dt_limit", [0.2, 0.1], "0 ≤ low < high"),
    ("mamba2", {"dt_limit": [-1.0, 1.0]}, "dt_limit", [-1.0, 1.0], "0 ≤ low < high"),
    ("mamba2", {"dt_limit": [math.nan, 1.0]}, "dt_limit", [math.nan, 1.0], "0 ≤ low < high"),
    ("mamba2", {"dt_min": 0.0}, "dt_min", 0.0, "must be positive and at most dt_max=0.1"),
    ("mamba2", {"dt_min": 0.5}, "dt_min", 0.5, "must be positive and at most dt_max=0.1"),
    ("mamba1", {"d_state": 0}, "d_state", 0, "must be ≥ 1"),
    ("mamba1", {"d_conv": 0}, "d_conv", 0, "must be 1 to 4"),
    ("mamba1", {"expand": 0.001}, "expand", 0.001, "must be a whole number"),
    ("mamba1", {"expand": 0.0}, "expand", 0.0, "must be a whole number"),
    ("mamba1", {"dt_rank": 0}, "dt_rank", 0, "null for d_model / 16"),
    ("mamba1", {"dt_min": -1.0}, "dt_min", -1.0, "must be positive"),
    ("attention", {"n_heads": 0}, "n_heads", 0, "must be ≥ 1, or null"),
    ("attention", {"n_kv_heads": 0}, "n_kv_heads", 0, "must be ≥ 1, or null"),
    ("attention", {"head_dim": 0}, "head_dim", 0, "must be ≥ 1, or null"),
    ("attention", {"n_heads": 4, "window": 0}, "window", 0, "must be ≥ 1, or null"),
    ("attention", {"n_heads": 7}, "n_heads", 7, "must divide model.d_model=96"),
    ("attention", {"head_dim": 40}, "head_dim", 40, "must divide model.d_model=96"),
    ("attention", {}, "head_dim", 64, "must divide model.d_model=96"),
    ("attention", {"n_heads": 4, "n_kv_heads": 3}, "n_kv_heads", 3, "number of query heads, 4"),
    ("attention", {"n_heads": 4, "rope_fraction": 1.5}, "rope_fraction", 1.5, "must be in [0, 1]"),
    ("attention", {"n_heads": 4, "rope_fraction": 0.13}, "rope_fraction", 0.13, "even number"),
    ("attention", {"n_heads": 4, "d_conv": 1}, "d_conv", 1, "must be 0, 2, 3 or 4"),
    ("mlp", {"d_ff": 0}, "d_ff", 0, "null for 8/3 of d_model"),
]


@pytest.mark.parametrize(("name", "fields", "field", "value", "remedy"), BAD)
def test_impossible_shapes_are_refused(
    name: str, fields: dict[str, Any], field: str, value: Any, remedy: str
) -> None:
    config = from_mapping(mixer_class(name, "type").config_class, fields, "model.mixers.X")
    with pytest.raises(ConfigError) as caught:
        config.validate(96, "model.mixers.X")
    error = caught.value
    assert error.key == f"model.mixers.X.{field}"
    assert repr(error.value) == repr(value)
    assert remedy in error.remedy
    assert "\n" not in str(error)
    assert str(error).startswith(f"model.mixers.X.{field}={value!r}: ")


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("mamba2", {"headdim": 96, "expand": 1}),
        ("mamba2", {"ngroups": 3}),
        ("mamba1", {"expand": 1.5}),
        ("attention", {"n_heads": 5, "head_dim": 30}),
        ("attention", {"n_heads": 4, "rope_fraction": 0}),
        ("mlp", {"d_ff": 1}),
    ],
)
def test_unusual_but_possible_shapes_are_accepted(name: str, fields: dict[str, Any]) -> None:
    from_mapping(mixer_class(name, "type").config_class, fields, "key").validate(96, "key")


@pytest.mark.parametrize("name", registered_mixers())
def test_a_misspelt_field_is_refused_with_the_right_one(name: str) -> None:
    cls = mixer_class(name, "type").config_class
    field = next(iter(cls.__dataclass_fields__))
    with pytest.raises(ConfigError, match=rf"key\.{field}x=1: no such key.*'{field}'"):
        from_mapping(cls, {f"{field}x": 1}, "key")


@pytest.mark.parametrize("name", registered_mixers())
def test_a_value_of_the_wrong_type_is_refused(name: str) -> None:
    cls = mixer_class(name, "type").config_class
    field = next(iter(cls.__dataclass_fields__))
    with pytest.raises(ConfigError, match=rf"key\.{field}='many'"):
        from_mapping(cls, {field: "many"}, "key")


def test_an_unknown_mixer_is_refused_with_the_closest_name() -> None:
    with pytest.raises(ConfigError, match=r"'mamba3'.*Did you mean 'mamba[12]'.*Known: .*mlp"):
        mixer_class("mamba3", "model.mixers.M.type")
