"""A model is a string: each letter of ``pattern`` is one residual sub-layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from mamba2lm.layers.mixer import MixerConfig, mixer_class, registered_mixers, require
from mamba2lm.schema import ConfigError, from_mapping


def plain_fields(config: MixerConfig) -> dict[str, Any]:
    """Return a mixer's fields as plain values, enum members by name."""
    fields = dataclasses.asdict(config)
    return {name: v.name if isinstance(v, Enum) else v for name, v in fields.items()}


def default_mixers() -> dict[str, Any]:
    """Return each registered mixer's letter with its type and default fields, as plain values."""
    return {
        cls.default_letter: {"type": name, **plain_fields(cls.config_class())}
        for name, cls in registered_mixers().items()
    }


@dataclass
class ModelConfig:
    """Shape of a language model."""

    pattern: str = "M"
    """One letter a sub-layer, repeated until there are n_layers of them."""
    d_model: int = 256
    n_layers: int | None = None
    """Number of sub-layers, a multiple of the pattern's length; default: the pattern once."""
    vocab_size: int | None = None
    """Real vocabulary; null takes the tokenizer's."""
    vocab_multiple: int = 16
    """The embedding is padded to a multiple of this; padded ids are never predicted."""
    tie_embeddings: bool = True
    embedding_std: float = 0.02
    """Of the initial embedding (and head); small models on synthetic tasks need more to begin."""
    residual_in_fp32: bool = True
    norm_eps: float = 1e-5
    mixers: dict[str, Any] = field(default_factory=default_mixers)
    """Letter → mixer: its ``type`` and the fields of that mixer's config."""

    @property
    def letters(self) -> str:
        """The pattern written out: one letter for each of the n_layers sub-layers."""
        n_layers = self.n_layers or len(self.pattern)
        return self.pattern * (n_layers // len(self.pattern))

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding."""
        assert self.vocab_size is not None
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    def mixer_type(self, letter: str) -> str:
        """Return the registered name behind a letter."""
        key = f"model.mixers.{letter}"
        given = self.mixers.get(letter)
        if given is None:
            known = ", ".join(sorted(self.mixers))
            raise ConfigError(
                "model.pattern",
                self.pattern,
                f"letter '{letter}' is not defined. Known letters: {known}; "
                f"define a new one with +model.mixers.{letter}.type=….",
            )
        if not isinstance(given, Mapping):
            raise ConfigError(
                key, given, f"expected a mapping, e.g. {{type: mamba2}}; types: {_types()}."
            )
        if "type" not in given:
            raise ConfigError(f"{key}.type", None, f"missing; one of {_types()}.")
        return mixer_class(given["type"], f"{key}.type").type_name

    def mixer_config(self, letter: str) -> MixerConfig:
        """Return the typed, validated config of the mixer behind a letter.

        Raises:
            ConfigError: Unknown letter, type or field, or values that do not fit each other.
        """
        cls = mixer_class(self.mixer_type(letter), f"model.mixers.{letter}.type")
        default = default_mixers().get(letter, {"type": cls.type_name})
        fields = {k: v for k, v in self.mixers[letter].items() if k != "type"}
        if default["type"] != cls.type_name:
            # The letter was given to another mixer: what is left of the first one's defaults was
            # written by nobody. Where both have a field, nobody can tell: better to ask.
            own = plain_fields(cls.config_class())
            for name, value in fields.items():
                require(
                    name not in own or value == own[name] or value != default.get(name),
                    f"model.mixers.{letter}.{name}",
                    value,
                    f"is the default of {default['type']}, to which '{letter}' belongs otherwise; "
                    f"that of {cls.type_name} is {own.get(name)!r}. Write that or another value, "
                    "or give the mixer a new letter.",
                )
            fields = {k: v for k, v in fields.items() if k not in default or v != default[k]}
        config = from_mapping(cls.config_class, fields, f"model.mixers.{letter}")
        config.validate(self.d_model, f"model.mixers.{letter}")
        return config

    def validate(self) -> None:
        """Check everything that can be checked before building.

        Raises:
            ConfigError: Naming the key, its value and the remedy.
        """
        require(self.d_model >= 1, "model.d_model", self.d_model, "must be ≥ 1.")
        require(bool(self.pattern), "model.pattern", self.pattern, "needs at least one letter.")
        require(
            self.vocab_multiple >= 1, "model.vocab_multiple", self.vocab_multiple, "must be ≥ 1."
        )
        if self.n_layers is not None:
            size = len(self.pattern)
            nearest = max(round(self.n_layers / size), 1) * size
            require(
                self.n_layers >= 1 and self.n_layers % size == 0,
                "model.n_layers",
                self.n_layers,
                f"must be a multiple of the {size} letters of model.pattern='{self.pattern}'; "
                f"the nearest is {nearest}.",
            )
        require(self.embedding_std > 0, "model.embedding_std", self.embedding_std, "must be > 0.")
        for letter in dict.fromkeys(self.pattern):
            self.mixer_config(letter)

    def fit_vocabulary(self, needed: int) -> None:
        """Take the data's vocabulary, or check that the one given is large enough.

        Args:
            needed: Number of ids that the tokenizer or task can give.

        Raises:
            ConfigError: ``vocab_size`` is given and smaller.
        """
        if self.vocab_size is None:
            self.vocab_size = needed
        require(
            self.vocab_size >= needed,
            "model.vocab_size",
            self.vocab_size,
            f"is smaller than the tokenizer's {needed}; leave it null or give at least {needed}.",
        )

    def resolved(self) -> dict[str, Any]:
        """Return plain values with only the mixers that the pattern uses and only their fields."""
        values = dataclasses.asdict(self)
        values["mixers"] = {
            letter: {
                "type": self.mixer_type(letter),
                **plain_fields(self.mixer_config(letter)),
            }
            for letter in dict.fromkeys(self.pattern)
        }
        return values


def _types() -> str:
    return ", ".join(sorted(registered_mixers()))
