"""Loss beyond the training length: the same text in windows of 1× to 64× that length.

Documents are joined into one stream, each behind its separator. For each multiple the stream is cut
into disjoint windows, each read from nothing; every multiple scores the same tokens. Two figures
say what a longer context does: the loss over all tokens; and over the last 1× of each window, whose
context is the longest, beside the loss of those very tokens in the shortest windows. A model of
constant state is also read with its state carried on over the whole stream.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from eval.config import Form, LengthConfig
from eval.perplexity import tokenize
from eval.reading import Reader
from mamba2lm.data import Tokenizer
from mamba2lm.models import LanguageModel
from mamba2lm.schema import ConfigError


@dataclass
class MultipleResult:
    """The loss in windows of one length, nats per token."""

    multiple: int
    length: int
    windows: int
    loss: float
    last_loss: float
    """Of the last 1× of each window."""
    last_loss_short: float
    """Of the same tokens in the shortest windows."""


@dataclass
class LengthResult:
    """How the loss changes with the length of what is read."""

    length: int
    """1×, in tokens."""
    tokens: int
    """Scored at every multiple."""
    text_sha256: str
    windows: list[MultipleResult] = field(default_factory=list)
    carried_loss: float | None = None
    """With the state carried over the whole stream; None where the state grows."""
    carried_last_loss: float | None = None
    """Of the stream's last part, as long as the longest window."""


def evaluate_length(
    model: LanguageModel,
    tokenizer: Tokenizer,
    documents: Iterable[str],
    config: LengthConfig,
    *,
    length: int = 512,
    form: Form = Form.parallel,
    chunk: int = 4096,
) -> LengthResult:
    """Score a stream of text in windows of growing length.

    Args:
        model: On the device it shall run on.
        tokenizer: The one it was trained with.
        documents: Texts, read once.
        config: Multiples; must be valid.
        length: 1× where the config has none.
        form: In which of its forms the model reads.
        chunk: Most tokens of a window read at once.

    Raises:
        ConfigError: The text is shorter than the shortest window.
    """
    length = config.length or length
    stream: list[int] = []
    digest = hashlib.sha256()
    for text, ids in tokenize(documents, tokenizer, config.max_tokens):
        encoded = text.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
        stream += [tokenizer.eos_id, *ids]
    usable = sorted(set(config.multiples))
    # A stretch that every window length divides, so that all of them score the same tokens.
    whole = math.lcm(*usable) * length
    while usable and whole >= len(stream):
        usable.pop()
        whole = math.lcm(*usable) * length
    if not usable:
        raise ConfigError(
            "length.length",
            length,
            f"the text has {len(stream):,} tokens, too few for one window; use a shorter length "
            "or more text.",
        )
    tokens = (len(stream) - 1) // whole * whole
    inputs_l, labels_l = torch.tensor(stream[:tokens]), torch.tensor(stream[1 : tokens + 1])
    reader = Reader(model, form, chunk=chunk)
    result = LengthResult(length, tokens, digest.hexdigest())
    short_l: torch.Tensor | None = None
    for multiple in usable:
        size = multiple * length
        count = tokens // size
        rows = max(1, config.batch_size // multiple)
        parts = []
        for start in range(0, count, rows):
            part = slice(start * size, min(start + rows, count) * size)
            loss_bl, _ = reader.losses(inputs_l[part].view(-1, size), labels_l[part].view(-1, size))
            parts.append(loss_bl.double().flatten().cpu())
        loss_l = torch.cat(parts)
        short_l = loss_l if short_l is None else short_l
        last_loss, last_loss_short = (
            float(each.view(count, size)[:, -length:].mean()) for each in (loss_l, short_l)
        )
        result.windows.append(
            MultipleResult(multiple, size, count, float(loss_l.mean()), last_loss, last_loss_short)
        )
    if not model.state_grows():
        state, losses = model.new_state(1), []
        longest = usable[-1] * length
        for inputs, labels in zip(inputs_l.split(longest), labels_l.split(longest), strict=True):
            loss_bl, state = reader.losses(inputs[None], labels[None], state)
            losses.append(float(loss_bl.double().sum()))
        result.carried_loss = sum(losses) / tokens
        result.carried_last_loss = losses[-1] / longest
    return result
