"""The root schemas of ``generate.py`` and of the server."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from mamba2lm.inference.sampling import SamplingConfig
from mamba2lm.schema import ConfigError

API_KEY_VARIABLE = "MAMBA2LM_API_KEY"


@dataclass
class GenerateConfig:
    """What to continue, how, and where states go."""

    checkpoint: str = MISSING
    """A run folder (its newest valid checkpoint) or one checkpoint."""
    prompt: str | None = None
    prompt_file: str | None = None
    """A UTF-8 text file; without either, standard input is read unless it is a terminal."""
    max_new_tokens: int = 256
    samples: int = 1
    """Number of texts; sample i is drawn with seed + i."""
    seed: int = 0
    stream: bool = False
    """Write each piece of text as soon as it is certain."""
    interactive: bool = False
    """Read turns from the terminal; the state of the conversation is kept between them."""
    echo: bool = True
    """Write the prompt before its continuation, so that the output reads as one text."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    json_schema: str | None = None
    """A file with a JSON schema that the text must follow (``sampling.json_schema`` is the schema
    itself); needs the extra ``structured``."""
    grammar: str | None = None
    """A file with a grammar, as ``sampling.grammar`` would be; needs it too."""
    load_state: str | None = None
    """Continue from a state file instead of from nothing."""
    save_state: str | None = None
    """Write the state after the last token to this file."""
    prefill_chunk: int = 2048
    """Prompt tokens read at once: bounds memory, never changes the result."""
    max_rows: int = 64
    """Most samples drawn at once."""
    state_dtype: str = "auto"
    """Recurrent states while tokens are drawn: ``auto`` (float32), ``float32`` or ``bfloat16``."""
    device: str = "auto"
    """``auto`` (a GPU where there is one), ``cpu``, ``cuda``, ``cuda:1`` …"""
    dtype: str = "auto"
    """``auto`` (bfloat16 on a GPU, else float32), ``float32``, ``bfloat16`` or ``float64``."""

    def validate(self) -> None:
        """Check every value against its range and against the others.

        Raises:
            ConfigError: Naming the key, its value and the remedy.
        """
        if self.max_new_tokens < 0:
            raise ConfigError("max_new_tokens", self.max_new_tokens, "must be ≥ 0.")
        if self.samples < 1:
            raise ConfigError("samples", self.samples, "must be ≥ 1.")
        if not 0 <= self.seed < 2**62:
            raise ConfigError("seed", self.seed, "must be ≥ 0 and below 2^62.")
        for name in ("prefill_chunk", "max_rows"):
            if getattr(self, name) < 1:
                raise ConfigError(name, getattr(self, name), "must be ≥ 1.")
        for name in ("json_schema", "grammar"):
            file = getattr(self, name)
            if file is not None and self.sampling.constraint is not None:
                raise ConfigError(
                    name, file, f"sampling.{self.sampling.constraint[0]} is given too."
                )
        if self.json_schema is not None and self.grammar is not None:
            raise ConfigError("grammar", self.grammar, "json_schema is given too; give one.")
        self.sampling.validate()
        if self.prompt is not None and self.prompt_file is not None:
            raise ConfigError(
                "prompt_file", self.prompt_file, "prompt is given too; give only one of them."
            )
        if self.samples > 1:
            for name in ("stream", "interactive", "load_state", "save_state"):
                value = getattr(self, name)
                if value:
                    raise ConfigError(
                        name, value, f"works on one text; leave out samples={self.samples}."
                    )
        if self.save_state is not None and not Path(self.save_state).parent.is_dir():
            raise ConfigError("save_state", self.save_state, "its folder does not exist; make it.")


@dataclass
class ServeConfig:
    """What is served, to whom, and how much of it at once."""

    checkpoint: str = MISSING
    """A run folder (its newest valid checkpoint) or one checkpoint."""
    model_name: str | None = None
    """The name that requests use; default the run folder's."""
    host: str = "127.0.0.1"
    """Address to listen on; the default is this machine alone."""
    port: int = 8000
    """0 takes a free one, named in the log."""
    api_key: str | None = None
    """Bearer token that requests must carry; default the environment's MAMBA2LM_API_KEY, which
    other users of the machine cannot read as they can a command line."""
    chat_template: str | None = None
    """A Jinja file that replaces the tokenizer's chat template."""
    max_rows: int = 64
    """Most continuations that decode at once."""
    max_waiting: int = 256
    """Most prompts in the queue; beyond it requests are refused with 429."""
    max_choices: int = 16
    """Most continuations of one prompt (n, best_of) and most prompts of one request."""
    max_prompt_tokens: int = 131_072
    max_new_tokens: int = 4096
    """Most tokens of one continuation, and what a chat gets that does not say."""
    max_body_bytes: int = 4 << 20
    body_timeout: float = 30.0
    """Seconds for a request's body to arrive."""
    request_timeout: float = 600.0
    """Seconds from a request to the end of its answer."""
    drain_timeout: float = 30.0
    """Seconds after SIGTERM or Ctrl-C in which running requests may end."""
    state_cache_mib: int = 1024
    """Budget of the cache of prompts' states, on the model's device; 0 for none."""
    session_mib: int = 1024
    """Budget of the states that sessions keep, on the model's device; 0 for no sessions."""
    prefill_chunk: int = 2048
    """Prompt tokens read between two tokens of those that decode."""
    state_dtype: str = "auto"
    """Recurrent states while tokens are drawn: ``auto`` (float32), ``float32`` or ``bfloat16``."""
    device: str = "auto"
    """``auto`` (a GPU where there is one), ``cpu``, ``cuda``, ``cuda:1`` …"""
    dtype: str = "auto"
    """``auto`` (bfloat16 on a GPU, else float32), ``float32``, ``bfloat16`` or ``float64``."""
    warm_up: bool = True
    """On a GPU: compile and record what requests need, and take the memory of ``max_rows`` rows,
    before any request is taken. Without it the server is there sooner, and the first requests of
    every kind wait."""

    def validate(self) -> None:
        """Check every value against its range.

        Raises:
            ConfigError: Naming the key, its value and the remedy.
        """
        at_least_1 = (
            "max_rows",
            "max_waiting",
            "max_choices",
            "max_prompt_tokens",
            "max_new_tokens",
            "max_body_bytes",
            "prefill_chunk",
        )
        for name in at_least_1:
            if getattr(self, name) < 1:
                raise ConfigError(name, getattr(self, name), "must be ≥ 1.")
        for name in ("body_timeout", "request_timeout"):
            if not getattr(self, name) > 0:
                raise ConfigError(name, getattr(self, name), "must be a number of seconds above 0.")
        for name in ("state_cache_mib", "session_mib", "drain_timeout"):
            if not getattr(self, name) >= 0:
                raise ConfigError(name, getattr(self, name), "must be ≥ 0.")
        if not 0 <= self.port < 1 << 16:
            raise ConfigError("port", self.port, "must be from 0 to 65535.")
        if self.chat_template is not None and not Path(self.chat_template).is_file():
            raise ConfigError("chat_template", self.chat_template, "no such file.")
        if self.api_key == "":
            raise ConfigError("api_key", "", f"is empty; leave it out, or set {API_KEY_VARIABLE}.")
