"""One cell of a sweep: one small model, trained and asked.

Models this small leave most of a GPU idle: a step is dozens of kernels of a few microseconds, and
Python takes longer to start them than they take to run. So a step is captured once as a CUDA graph
and replayed, at the cost of one launch, and several cells replay theirs in streams of their own,
where the GPU runs them side by side. Stacking models into one (vmap) would need every operator
written for it; a stream needs nothing and mixes architectures. ``benchmarks/many_models.py``
measures it.

Axes: b row, l position, k question.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eval.reading import Reader
from eval.sweep.config import Decay, Order, SweepConfig
from eval.sweep.data import Examples, SweepData
from mamba2lm.models import LanguageModel
from mamba2lm.training.optimizer import AdamWImpl, OptimizerConfig, build_optimizers
from mamba2lm.training.precision import matmul_dtype

# Steps taken before one is captured: kernels compile and caches fill in them.
_WARMUP = 3
# Logits of a test batch hold at most so many numbers.
_LOGITS = 1 << 27


@dataclass(frozen=True)
class Spec:
    """Which cell."""

    dataset: str
    model: str
    width: int
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """A file name."""
        return (
            f"{self.dataset}-{self.model}-d{self.width}-lr{self.learning_rate:.2e}-s{self.seed}"
        ).replace(" ", "_")


def mean_accuracy(accuracies: Sequence[float | None]) -> float:
    """Return the mean over the tests that were asked, −1 where none was."""
    asked = [value for value in accuracies if value is not None]
    return sum(asked) / len(asked) if asked else -1.0


def best_evaluation(curve: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the best of a cell's evaluations, as Zoology reports; None where there was none.

    One for all tests, the one of the highest mean, so that a line over lengths is one model's.
    """
    return max(curve, key=lambda row: mean_accuracy(row["accuracy"]), default=None)


class Cell:
    """A model in training."""

    def __init__(
        self, spec: Spec, config: SweepConfig, data: SweepData, device: torch.device
    ) -> None:
        """Build the model with its initial weights.

        Args:
            spec: Which cell.
            config: The sweep.
            data: The cell's data set, on the device.
            device: Where to train.
        """
        self.spec, self.config, self.data, self.device = spec, config, data, device
        self.shapes = config.datasets[spec.dataset]
        self.step = 0
        self.steps = sum(
            stage.epochs * (stage.n_examples // stage.batch_size) for stage in self.shapes.stages
        )
        self.curve: list[dict[str, Any]] = []
        self.seconds = 0.0
        """Since the first step, shared with the cells beside this one."""
        self._began: float | None = None
        self.dtype = matmul_dtype(config.precision, device)
        on_gpu = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if on_gpu else None
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] | None = None
        if on_gpu and config.graphs:
            self._graphs = {}
            # The graphs of one cell never run at the same time: they may use the same memory.
            self._pool = torch.cuda.graph_pool_handle()
        self._eager_steps: dict[tuple[int, int], int] = {}
        with self._streamed():
            model = LanguageModel(config.model(spec.model, spec.width))
            model.init_weights(spec.seed)
            self.model = model.to(device).train()
            [self.optimizer] = build_optimizers(
                OptimizerConfig(
                    learning_rate=spec.learning_rate,
                    weight_decay=config.weight_decay,
                    betas=config.betas,
                    impl=AdamWImpl.torch,  # whose steps a graph can hold
                ),
                self.model,
            )
            self.rate = torch.tensor(spec.learning_rate, device=device)
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate
                group["capturable"] = on_gpu
            self._loss = torch.zeros((), device=device)
            self._batch: dict[tuple[int, int], Examples] = {}
            """By shape: where the batch lies that a step learns from."""
            for stage, examples in zip(self.shapes.stages, data.stages, strict=True):
                self._batch[stage.batch] = Examples(
                    *(each.new_zeros(stage.batch_size, each.shape[1]) for each in examples.tensors)
                )
        self._plan = self._batches()

    @property
    def done(self) -> bool:
        """Whether nothing is left to train, or nothing to learn."""
        if self.step >= self.steps:
            return True
        if not self.curve:
            return False
        last = self.curve[-1]
        if not math.isfinite(last["loss"]):
            return True
        reached = [value for value in last["accuracy"] if value is not None]
        return self.config.stop_at is not None and min(reached) >= self.config.stop_at

    def advance(self, steps: int) -> None:
        """Take steps, up to the next evaluation, and evaluate when it is due."""
        if self._began is None:
            self._began = time.perf_counter()
        evaluation = self.config.evaluate_every
        with self._streamed():
            for _ in range(min(steps, self.steps - self.step, evaluation - self.step % evaluation)):
                stage, rows = next(self._plan)
                shape = self.shapes.stages[stage].batch
                for target, every_example in zip(
                    self._batch[shape].tensors, self.data.stages[stage].tensors, strict=True
                ):
                    torch.index_select(every_example, 0, rows, out=target)
                self.rate.fill_(self.spec.learning_rate * self._ratio())
                self._take(shape)
                self.step += 1
            if self.step % evaluation == 0 or self.step == self.steps:
                self._evaluate()
        self.seconds = time.perf_counter() - self._began

    def close(self) -> None:
        """Give back the device's memory now, not when Python finds the cell in a cycle."""
        self._plan.close()
        self._graphs = None
        self._batch.clear()
        del self.model, self.optimizer

    def result(self) -> dict[str, Any]:
        """Return the cell's result as plain values."""
        tests = [dataclasses.asdict(test) for test in self.shapes.tests]
        best = best_evaluation(self.curve)
        for number, test in enumerate(tests):
            test["accuracy"] = None if best is None else best["accuracy"][number]
        return {
            **dataclasses.asdict(self.spec),
            "parameters": self.model.parameter_count(),
            "state_bytes": self.model.new_state(1).nbytes,
            "steps": self.step,
            "of_steps": self.steps,
            "seconds": round(self.seconds, 2),
            "best_step": None if best is None else best["step"],
            "tests": tests,
            "curve": self.curve,
        }

    def _take(self, shape: tuple[int, int]) -> None:
        """Take one step on the batch that lies ready."""
        if self._graphs is None:
            self._learn(shape)
            return
        if shape in self._graphs:
            self._graphs[shape].replay()
            return
        taken = self._eager_steps.get(shape, 0)
        if taken < _WARMUP:
            self._eager_steps[shape] = taken + 1
            self._learn(shape)
            return
        graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize(self.device)
        with torch.cuda.graph(graph, pool=self._pool, stream=self.stream):
            self._learn(shape)
        self._graphs[shape] = graph
        graph.replay()  # capturing computes nothing

    def _learn(self, shape: tuple[int, int]) -> None:
        # Everything here is captured: no value may be read back, no shape depend on one.
        self.optimizer.zero_grad(set_to_none=True)
        input_bl, position_bk, answer_bk = self._batch[shape].rows(slice(None))
        with self._autocast():
            loss = self.model(input_bl, answer_bk, positions=position_bk).loss
        loss.backward()
        if self.config.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self._loss += loss.detach()

    def _evaluate(self) -> None:
        since = self.step - (self.curve[-1]["step"] if self.curve else 0)
        loss = float(self._loss) / since
        self._loss.zero_()
        accuracy = self.ask() if math.isfinite(loss) else [0.0] * len(self.shapes.tests)
        self.curve.append({"step": self.step, "loss": loss, "accuracy": accuracy})

    def ask(self) -> list[float | None]:
        """Return the accuracy on each test, None where the model cannot be asked."""
        self.model.eval()
        grows = self.model.state_grows()
        reader = Reader(self.model, chunk=self.config.chunk)
        found: list[float | None] = []
        for shape, test in zip(self.shapes.tests, self.data.tests, strict=True):
            if grows and shape.length > self.config.longest_growing:
                found.append(None)
                continue
            questions = test.position_nk.shape[1]
            per_row = questions * self.model.vocab_size + min(shape.length, self.config.chunk)
            size = max(1, min(1024, _LOGITS // per_row))
            correct = torch.zeros((), dtype=torch.int64, device=self.device)
            for start in range(0, shape.n_examples, size):
                input_bl, position_bk, answer_bk = test.rows(slice(start, start + size))
                with self._autocast():
                    right_bk = reader.answers(input_bl, position_bk) == answer_bk.to(self.device)
                correct += right_bk.sum()
            found.append(int(correct) / (shape.n_examples * questions))
        self.model.train()
        return found

    def _ratio(self) -> float:
        """Return the learning rate of this step over the peak."""
        left = 1.0 - self.step / self.steps
        if self.config.decay is Decay.linear:
            return left
        if self.config.decay is Decay.cosine:
            return 0.5 - 0.5 * math.cos(math.pi * left)
        return 1.0

    def _batches(self) -> Generator[tuple[int, Tensor]]:
        """Yield stage and rows of every step."""
        random = torch.Generator().manual_seed(self.spec.seed)
        epochs = [
            (number, stage)
            for number, stage in enumerate(self.shapes.stages)
            for _ in range(stage.epochs)
        ]
        if self.config.order is Order.curriculum:
            for number, stage in epochs:
                yield from self._epoch(number, stage.n_examples, stage.batch_size, random)
            return
        left = max(stage.epochs for stage in self.shapes.stages)
        for epoch in range(left):
            batches = [
                batch
                for number, stage in enumerate(self.shapes.stages)
                if epoch < stage.epochs
                for batch in self._epoch(number, stage.n_examples, stage.batch_size, random)
            ]
            for place in torch.randperm(len(batches), generator=random).tolist():
                yield batches[place]

    def _epoch(
        self, stage: int, n_examples: int, batch_size: int, random: torch.Generator
    ) -> Iterator[tuple[int, Tensor]]:
        order = torch.randperm(n_examples, generator=random).to(self.device)
        for start in range(0, n_examples - batch_size + 1, batch_size):
            yield stage, order[start : start + batch_size]

    def _streamed(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        # Cached casts would be left over from outside a graph.
        return torch.autocast(self.device.type, self.dtype, cache_enabled=False)
