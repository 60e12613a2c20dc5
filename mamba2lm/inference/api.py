"""The shapes of OpenAI's HTTP API: what may be asked, what is answered, how errors look.

Fields beyond OpenAI's own: ``top_k``, ``min_p``, ``typical_p``, ``repetition_penalty``,
``stop_token_ids``, ``ignore_eos``, the types ``regex`` and ``grammar`` of ``response_format`` and,
for completions, ``response_format`` and ``session``.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from mamba2lm.data.tokenizer import Tokenizer
from mamba2lm.inference.decoding import FinishReason, TokenLogprob
from mamba2lm.inference.sampling import MAX_LOGPROBS, SamplingConfig

M = TypeVar("M", bound=BaseModel)

Number = Annotated[float, Field(allow_inf_nan=False)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
_MOST_STOPS = 16
_LONGEST_STOP = 1000
_LONGEST_GRAMMAR = 20_000


class ApiError(Exception):
    """An answer that says what went wrong, in the API's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    include_obfuscation: bool | None = None


class Format(BaseModel):
    """What an answer must look like."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @property
    def constraint(self) -> dict[str, str]:
        """The fields of ``SamplingConfig`` that it asks for."""
        return {}


class TextFormat(Format):
    """Anything."""

    type: Literal["text"]


class ObjectFormat(Format):
    """Any one JSON object."""

    type: Literal["json_object"]

    @property
    def constraint(self) -> dict[str, str]:
        return {"json_schema": '{"type": "object"}'}


class NamedSchema(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    name: Annotated[str, Field(max_length=64)] | None = None
    description: str | None = None
    strict: bool | None = None
    """Schemas are followed to the letter either way."""


class SchemaFormat(Format):
    """JSON by a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema

    @property
    def constraint(self) -> dict[str, str]:
        return {"json_schema": json.dumps(self.json_schema.schema_)}


class RegexFormat(Format):
    """A whole match of a regular expression."""

    type: Literal["regex"]
    regex: Annotated[str, Field(max_length=_LONGEST_GRAMMAR)]

    @property
    def constraint(self) -> dict[str, str]:
        return {"regex": self.regex}


class GrammarFormat(Format):
    """A sentence of a grammar, in Lark's syntax."""

    type: Literal["grammar"]
    grammar: Annotated[str, Field(max_length=_LONGEST_GRAMMAR)]

    @property
    def constraint(self) -> dict[str, str]:
        return {"grammar": self.grammar}


ResponseFormat = Annotated[
    TextFormat | ObjectFormat | SchemaFormat | RegexFormat | GrammarFormat,
    Field(discriminator="type"),
]


class GenerationRequest(BaseModel):
    """What both kinds of request have."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    user: str | None = None
    top_k: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    typical_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0, le=100)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=100)] | None = None
    ignore_eos: bool | None = None
    response_format: ResponseFormat | None = None

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, stop: str | list[str] | None) -> list[str] | None:
        stops = [stop] if isinstance(stop, str) else stop
        if stops and (len(stops) > _MOST_STOPS or any(len(s) > _LONGEST_STOP for s in stops)):
            raise ValueError(f"at most {_MOST_STOPS} strings of at most {_LONGEST_STOP} characters")
        if stops and not all(stops):
            raise ValueError("holds an empty string, which would end every text at once")
        return stops

    @property
    def sampling(self) -> SamplingConfig:
        """The engine's settings; what is not given is OpenAI's default."""
        given = {
            name: getattr(self, name)
            for name in (
                "temperature", "top_p", "presence_penalty", "frequency_penalty", "top_k", "min_p",
                "typical_p", "repetition_penalty", "stop", "stop_token_ids",
            )
            if getattr(self, name) is not None
        }  # fmt: skip
        follow = {} if self.response_format is None else self.response_format.constraint
        return SamplingConfig(**{"temperature": 1.0, **given, **follow})


class CompletionRequest(GenerationRequest):
    """The body of ``/v1/completions``."""

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    best_of: Annotated[int, Field(ge=1)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    session: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    suffix: None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, one or several."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if prompt and isinstance(prompt[0], int):
            return [prompt]  # type: ignore[list-item]
        return prompt  # type: ignore[return-value]


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    role: Annotated[str, Field(min_length=1, max_length=100)]
    content: str | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """Return it as templates expect it."""
        content = self.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        return {"role": self.role, "content": content} | ({"name": self.name} if self.name else {})


class ChatRequest(GenerationRequest):
    """The body of ``/v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None


def parse(model: type[M], body: bytes) -> M:
    """Read a request's JSON.

    Raises:
        ApiError: 400, naming the first field that is wrong.
    """
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        # Names of a union's branches are ours, not the user's.
        place = ".".join(str(part) for part in first["loc"] if _is_name(part)) or None
        if first["type"] == "extra_forbidden":
            message = f"Unrecognized request argument: {place}"
        elif place is None:
            message = f"The body is not what is expected: {first['msg']}."
        else:
            message = f"{place}: {first['msg']}."
        raise ApiError(400, message, param=place) from error


def _is_name(part: int | str) -> bool:
    return isinstance(part, int) or (part.isidentifier() and part not in ("str", "constrained"))


def finish_reason(reason: FinishReason | None) -> str | None:
    """Return the API's word for how a text ended."""
    return None if reason is None else "length" if reason == "length" else "stop"


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """Return how a token is written in log-probabilities; part of a character as its bytes."""
    text = tokenizer.decode([token_id], skip_special_tokens=False)
    if "\ufffd" in text:
        return "bytes:" + "".join(f"\\x{b:02x}" for b in tokenizer.token_bytes(token_id))
    return text


def completion_logprobs(
    tokenizer: Tokenizer, tokens: list[TokenLogprob], offset: int, *, first: int | None = None
) -> dict[str, Any]:
    """Return the ``logprobs`` of a completion's choice.

    Args:
        tokenizer: To write tokens.
        tokens: What is reported.
        offset: Characters of the choice's text before them.
        first: A token before all others, whose probability nothing gives.
    """
    texts = [token_text(tokenizer, token.token_id) for token in tokens]
    values: list[float | None] = [token.logprob for token in tokens]
    tops: list[dict[str, float] | None] = [
        {token_text(tokenizer, i): p for i, p in reversed(token.top)} for token in tokens
    ]
    if first is not None:
        texts, values, tops = [token_text(tokenizer, first), *texts], [None, *values], [None, *tops]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text) if not text.startswith("bytes:") else 0
    return {
        "tokens": texts,
        "token_logprobs": values,
        "top_logprobs": tops if any(token.top for token in tokens) else None,
        "text_offset": offsets,
    }


def chat_logprobs(tokenizer: Tokenizer, tokens: list[TokenLogprob]) -> dict[str, Any]:
    """Return the ``logprobs`` of a chat's choice."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        text = token_text(tokenizer, token_id)
        partial = text.startswith("bytes:")
        data = tokenizer.token_bytes(token_id) if partial else text.encode()
        return {"token": text, "logprob": logprob, "bytes": list(data)}

    return {
        "content": [
            {
                **entry(token.token_id, token.logprob),
                "top_logprobs": [entry(i, p) for i, p in token.top],
            }
            for token in tokens
        ],
        "refusal": None,
    }
