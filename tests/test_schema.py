"""From what a user wrote to dataclasses, and errors that name key, value and remedy."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import pytest
from omegaconf import OmegaConf

from mamba2lm.config import TrainConfig
from mamba2lm.schema import ConfigError, check_names, closest, fields_of, from_mapping


class Colour(Enum):
    red = "red"
    blue = "blue"


@dataclass
class Inner:
    size: int = 3
    share: float = 0.5


@dataclass
class Outer:
    name: str = "plain"
    colour: Colour = Colour.red
    limit: int | None = None
    values: list[float] = field(default_factory=lambda: [1.0, 2.0])
    inner: Inner = field(default_factory=Inner)
    free: dict[str, Any] = field(default_factory=dict)


def test_an_error_is_one_line_of_key_value_and_remedy() -> None:
    error = ConfigError("model.pattern", "MX", "letter 'X' is not defined.")
    assert str(error) == "model.pattern='MX': letter 'X' is not defined."
    assert (error.key, error.value, error.remedy) == (
        "model.pattern", "MX", "letter 'X' is not defined.",
    )  # fmt: skip
    assert isinstance(error, ValueError)


def test_a_long_value_is_cut() -> None:
    error = ConfigError("data.sources", "x" * 500, "too long.")
    shown = str(error).removeprefix("data.sources=").removesuffix(": too long.")
    assert len(shown) == 120
    assert shown.endswith("...")
    assert error.value == "x" * 500


def test_the_closest_word_is_suggested_only_if_close() -> None:
    assert closest("max_step", ["batch_size", "max_steps"]) == " Did you mean 'max_steps'?"
    assert closest("zzz", ["batch_size", "max_steps"]) == ""


def test_values_become_typed_fields() -> None:
    values = {"colour": "blue", "limit": "7", "values": [3], "inner": {"size": 9}, "free": {"a": 1}}
    built = from_mapping(Outer, values, "outer")
    assert built == Outer("plain", Colour.blue, 7, [3.0], Inner(9, 0.5), {"a": 1})
    assert isinstance(built.inner, Inner)
    assert type(built.values[0]) is float
    assert from_mapping(Outer, None, "outer") == Outer()
    assert from_mapping(Outer, OmegaConf.create({"name": "x"}), "outer").name == "x"
    assert fields_of(Inner) == "size, share"


@pytest.mark.parametrize(
    ("values", "key", "says"),
    [
        ({"nam": 1}, "outer.nam", "no such key. Did you mean 'name'? Known: name, colour, "),
        ({"inner": {"sise": 1}}, "outer.inner.sise", "Did you mean 'size'? Known: size, share."),
        ({"inner": {"size": "big"}}, "outer.inner.size", "'big' of type 'str' could not be conv"),
        ({"limit": 1.5}, "outer.limit", "could not be converted to Integer"),
        ({"colour": "green"}, "outer.colour", "expected one of [red, blue]"),
        ({"name": None}, "outer.name", "field of type 'str'"),
        ({"inner": 3}, "outer.inner", "expected a mapping of size, share."),
    ],
)
def test_what_does_not_fit_is_named(values: dict[str, Any], key: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_mapping(Outer, values, "outer")
    assert str(caught.value).startswith(f"{key}=")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_list_is_not_a_mapping() -> None:
    with pytest.raises(ConfigError, match=r"outer=\[1, 2\]: expected a mapping of name, colour"):
        from_mapping(Outer, [1, 2], "outer")  # type: ignore[arg-type]


def test_names_inside_a_free_mapping_are_not_checked() -> None:
    schema = OmegaConf.structured(Outer)
    check_names(schema, OmegaConf.create({"free": {"anything": {"at": "all"}}}), "")
    with pytest.raises(ConfigError, match=r"^fre=1: no such key\. Did you mean 'free'"):
        check_names(schema, OmegaConf.create({"fre": 1}), "")


def test_the_resolved_configuration_builds_itself_again() -> None:
    config = TrainConfig()
    config.model.vocab_size = 257
    plain = config.resolved()
    assert plain["training"]["precision"] == "auto"
    assert list(plain["model"]["mixers"]) == ["M"]
    again = from_mapping(TrainConfig, plain, "")
    assert again.resolved() == plain
    assert again.training == config.training
    assert again.data == config.data
