"""Multi-query associative recall (Arora et al. 2023, arXiv:2312.04927): what a state can hold.

A sequence states pairs of a key and a value, then names each key once more; the model must answer
with its value. Accuracy is the share of such questions answered right.

Axes: b example, l position, k question, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eval.config import RecallEvalConfig
from mamba2lm.data import IGNORED, generate_recall
from mamba2lm.models import LanguageModel
from mamba2lm.schema import ConfigError


@dataclass
class RecallResult:
    """Accuracy for one number of pairs."""

    n_pairs: int
    length: int
    vocab_size: int
    examples: int
    questions: int
    correct: int

    @property
    def accuracy(self) -> float:
        """Share of questions answered right."""
        return self.correct / self.questions


def evaluate_recall(
    model: LanguageModel, config: RecallEvalConfig, *, seed: int
) -> list[RecallResult]:
    """Measure a model's recall for each number of pairs.

    Args:
        model: Any model; one that was not trained on the task knows nothing of it.
        config: The questions; must be valid.
        seed: Of the examples.

    Raises:
        ConfigError: The vocabulary is too small for the task.
    """
    if config.vocab_size is not None and config.vocab_size > model.vocab_size:
        raise ConfigError(
            "recall.vocab_size",
            config.vocab_size,
            f"the model has {model.vocab_size:,} ids; use at most that many.",
        )
    return [
        measure(
            lambda ids_bl, asked_bl: answers(model, ids_bl, asked_bl),
            config,
            n_pairs=n_pairs,
            vocab_size=model.vocab_size,
            seed=seed,
        )
        for n_pairs in config.n_pairs
    ]


def measure(
    answer: Callable[[Tensor, Tensor], Tensor],
    config: RecallEvalConfig,
    *,
    n_pairs: int,
    vocab_size: int,
    seed: int,
) -> RecallResult:
    """Count the right answers for one number of pairs.

    Args:
        answer: Given ids (b, l) and where questions are, bool (b, l), returns the predicted ids of
            all questions in order (k,).
        config: The questions.
        n_pairs: Pairs in an example.
        vocab_size: Ids there are.
        seed: Of the examples.

    Raises:
        ConfigError: The vocabulary is too small for the task.
    """
    task = config.task(n_pairs, vocab_size)
    try:
        inputs_bl, labels_bl = generate_recall(config.n_examples, task, seed=seed)
    except ConfigError as error:
        name = error.key.rpartition(".")[2]
        raise ConfigError(f"recall.{name}", error.value, error.remedy) from error
    questions = correct = 0
    for ids_bl, label_bl in zip(
        inputs_bl.split(config.batch_size), labels_bl.split(config.batch_size), strict=True
    ):
        asked_bl = label_bl != IGNORED
        right_k = answer(ids_bl, asked_bl).cpu() == label_bl[asked_bl]
        questions += right_k.numel()
        correct += int(right_k.sum())
    return RecallResult(
        n_pairs, task.length, task.vocab_size, config.n_examples, questions, correct
    )


@torch.inference_mode()
def answers(model: LanguageModel, ids_bl: Tensor, asked_bl: Tensor) -> Tensor:
    """Return the model's most likely ids at the positions asked about.

    Args:
        model: On any device.
        ids_bl: (b, l) int64.
        asked_bl: (b, l) bool.

    Returns:
        (k,) int64, in row-major order of the positions.
    """
    device = model.embedding.weight.device
    asked_bl = asked_bl.to(device)

    def keep_asked(module: nn.Module, arguments: tuple[Tensor]) -> Tensor:
        # (b, l, d) → (1, k, d): a vocabulary's logits at every position would be the largest
        # tensor by far.
        return arguments[0][asked_bl][None]

    hook = model.norm_f.register_forward_pre_hook(keep_asked)
    try:
        logits_1kv = model(ids_bl.to(device)).logits
    finally:
        hook.remove()
    return logits_1kv[0].argmax(dim=-1)
