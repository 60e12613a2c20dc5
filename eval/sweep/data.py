"""The examples of one data set, on the device once for all cells that learn from them.

Axes: n example, l position, k question.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.sweep.config import DataSetConfig, SweepConfig
from mamba2lm.data import IGNORED, SyntheticConfig, generate, questions_of


@dataclass
class Examples:
    """Examples of one shape, in the smallest integers that hold them."""

    input_nl: Tensor
    position_nk: Tensor
    answer_nk: Tensor

    def rows(self, index: Tensor | slice) -> tuple[Tensor, Tensor, Tensor]:
        """Return inputs (b, l), positions (b, k) and answers (b, k) of some examples, int64.

        Answers are −100 at positions that nothing is asked at.
        """
        return (
            self.input_nl[index].long(),
            self.position_nk[index].long(),
            self.answer_nk[index].long(),
        )

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, positions and answers of all examples."""
        return self.input_nl, self.position_nk, self.answer_nk

    def padded(self, questions: int) -> Examples:
        """Return the examples with so many questions, those added asking nothing."""
        more = (0, questions - self.position_nk.shape[1])
        return Examples(
            self.input_nl, F.pad(self.position_nk, more), F.pad(self.answer_nk, more, value=IGNORED)
        )


class SweepData:
    """Training and test examples of a data set."""

    def __init__(self, config: SweepConfig, data: DataSetConfig, device: torch.device) -> None:
        """Generate everything.

        Args:
            config: Task, vocabulary and seed.
            data: Stages and tests.
            device: Where the examples shall lie.
        """
        stages = [
            _examples(config.example(stage), config.data_seed, f"train {number}", device)
            for number, stage in enumerate(data.stages)
        ]
        # As many questions in all of a shape, so that one graph takes a step of any of them.
        asked: dict[tuple[int, int], int] = {}
        for shape, stage in zip(data.stages, stages, strict=True):
            asked[shape.batch] = max(asked.get(shape.batch, 0), stage.position_nk.shape[1])
        self.stages = [
            stage.padded(asked[shape.batch])
            for shape, stage in zip(data.stages, stages, strict=True)
        ]
        # Tests differ from training by their stream and from each other by their shape.
        self.tests = [
            _examples(config.example(test), config.data_seed, "test", torch.device("cpu"))
            for test in data.tests
        ]


def _examples(task: SyntheticConfig, seed: int, purpose: str, device: torch.device) -> Examples:
    inputs_nl, labels_nl = generate(task, task.n_test, seed=seed, purpose=purpose)
    position_nk, answer_nk = questions_of(labels_nl, task.questions)
    small = torch.int16 if task.vocab_size <= 2**15 else torch.int32
    return Examples(
        inputs_nl.to(small).to(device),
        position_nk.to(torch.int32).to(device),
        answer_nk.to(small).to(device),
    )
