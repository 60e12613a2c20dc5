"""The training loop."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import multiprocessing
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from mamba2lm.data.loader import Corpus, training_batches, validation_batches
from mamba2lm.distributed import Mesh, ParallelConfig, World
from mamba2lm.distributed.watchdog import Watchdog, store_of_run
from mamba2lm.host import cpu_has_fast_bf16
from mamba2lm.models import LanguageModel
from mamba2lm.ops.dispatch import implementations_taken
from mamba2lm.schema import ConfigError
from mamba2lm.training.carry import CarriedStates, check_carried
from mamba2lm.training.checkpoint import (
    Checkpointer,
    Progress,
    SaveError,
    clear_partial,
    restore,
)
from mamba2lm.training.dropout import Dropout
from mamba2lm.training.hardware import memory_in_use, peak_flops
from mamba2lm.training.metrics import (
    Metrics,
    Tracker,
    plot_losses,
    truncate_metrics,
    truncate_samples,
)
from mamba2lm.training.optimizer import OptimizerConfig, Optimizers
from mamba2lm.training.parallelize import ParallelModel
from mamba2lm.training.run_folder import RunFolder
from mamba2lm.training.schedule import ScheduleConfig, learning_rate_ratio

log = logging.getLogger(__name__)

EXIT_STOPPED = 75
"""Exit code after SIGTERM: saved, and ``resume=auto`` goes on from there (EX_TEMPFAIL)."""
EXIT_REQUEUE = 76
"""Exit code after SIGUSR1, which schedulers send ahead of a time limit: saved in the same way."""
EXIT_UNSAVED = 4
"""Exit code when the last checkpoint could not be written; those before it are untouched."""
EXIT_DIVERGED = 3
"""Exit code after too many steps in a row that were not finite."""


STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What asks for a stop; the first wins where processes got different ones."""
SPIKE_WINDOW = 64
"""Steps whose losses say what a spike is."""


class Precision(Enum):
    """Dtype of the matrix products; weights and optimizer stay float32."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


@dataclass
class TrainingConfig:
    """How long, how much at once, and what happens along the way."""

    max_steps: int = 1000
    batch_size: int = 32
    """Sequences per optimizer step, over all processes."""
    micro_batch_size: int | None = None
    """Sequences per forward pass and process; null takes all of the process's share at once."""
    precision: Precision = Precision.auto
    """auto: bf16 where the device multiplies it in hardware, else fp32."""
    max_grad_norm: float = 1.0
    seed: int = 0
    dropout: float = 0.0
    """Share of the embedding and of each sub-layer's output left out at random while training."""
    carry_state: bool = False
    """Begin each window from the state that the one before it in the text left (truncated
    back-propagation); batches are then batch_size texts read side by side, in order."""
    activation_checkpointing: bool = False
    keep_outputs: bool = False
    """Keep the outputs of Mamba layers' convolutions and norms for the backward pass instead of
    making them again there: quicker, for more memory. Of Mamba layers on a GPU."""
    compile: bool = False
    threads: int | None = None
    """CPU threads per process; null lets torch choose."""
    log_every: int = 10
    eval_every: int = 250
    """Validate every so many steps, and at the end; 0 never."""
    eval_batches: int | None = None
    """Batches of batch_size per validation, spread over the held-out text; null takes all of it."""
    sample_every: int = 0
    """Write a sample every so many steps; 0 only at the end."""
    sample_prompt: str = "The"
    sample_tokens: int = 200
    save_every: int = 250
    """Save every so many steps, and at the end."""
    keep_last: int = 2
    keep_best: bool = True
    """Keep the checkpoint of lowest held-out loss too."""
    max_bad_steps: int = 5
    """Steps in a row, skipped for their loss or gradient, before giving up."""
    spike_sigmas: float | None = None
    """Skip a step whose loss is so many standard deviations above the mean of recent ones, say 6;
    null takes every finite step."""
    peak_tflops: float | None = None
    """Device peak for MFU; null looks it up or measures it."""

    def validate(self) -> None:
        """Check ranges.

        Raises:
            ConfigError: Naming the key, its value and the remedy.
        """
        at_least_one = ("max_steps", "batch_size", "log_every", "save_every", "keep_last")
        for name in (*at_least_one, "max_bad_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"training.{name}", getattr(self, name), "must be ≥ 1.")
        for name in ("eval_every", "sample_every", "sample_tokens"):
            if getattr(self, name) < 0:
                raise ConfigError(f"training.{name}", getattr(self, name), "must be ≥ 0.")
        for name in ("micro_batch_size", "eval_batches", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"training.{name}", value, "must be ≥ 1, or null.")
        if not 0 <= self.dropout < 1:
            raise ConfigError("training.dropout", self.dropout, "must be in [0, 1).")
        if self.spike_sigmas is not None and not self.spike_sigmas > 0:
            raise ConfigError(
                "training.spike_sigmas", self.spike_sigmas, "must be positive, or null."
            )
        if not self.max_grad_norm > 0:
            raise ConfigError("training.max_grad_norm", self.max_grad_norm, "must be positive.")
        if self.peak_tflops is not None and not self.peak_tflops > 0:
            raise ConfigError(
                "training.peak_tflops", self.peak_tflops, "must be positive, or null."
            )

    def share_of(self, processes: int) -> tuple[int, int]:
        """Return (sequences per forward pass, forward passes per step) of each process.

        Raises:
            ConfigError: The sizes do not divide.
        """
        if self.batch_size % processes:
            raise ConfigError(
                "training.batch_size",
                self.batch_size,
                f"must be a multiple of the number of processes, {processes}.",
            )
        share = self.batch_size // processes
        micro = min(self.micro_batch_size or share, share)
        if share % micro:
            raise ConfigError(
                "training.micro_batch_size",
                self.micro_batch_size,
                f"must divide each process's {share} sequences per step.",
            )
        return micro, share // micro


class NonFiniteError(RuntimeError):
    """Too many steps in a row gave a loss or gradient that is not finite."""


class Trainer:
    """Train a model on a corpus, from wherever its run folder stands."""

    def __init__(
        self,
        model: LanguageModel,
        corpus: Corpus,
        *,
        config: TrainingConfig,
        optimizer: OptimizerConfig,
        schedule: ScheduleConfig,
        run: RunFolder,
        accelerator: Accelerator,
        parallel: ParallelConfig | None = None,
        num_workers: int = 0,
        tracker: Callable[[], Tracker | None] = lambda: None,
        write_sample: Callable[[LanguageModel], str] | None = None,
        evaluate_more: Callable[[LanguageModel], dict[str, float]] | None = None,
    ) -> None:
        """Put the model on its device and restore what the run has saved.

        Args:
            model: With initial weights.
            corpus: What to learn from.
            config: The loop.
            optimizer: Update rule.
            schedule: Learning rate over the run.
            run: Where to write, and the checkpoint to start from.
            accelerator: Device and processes.
            parallel: How the processes divide the work; None: each takes samples of its own.
            num_workers: Processes that read samples ahead.
            tracker: Makes the tracker, on the main process.
            write_sample: Writes text with the model; None writes no samples.
            evaluate_more: Gives further figures of the model at every validation, by name.
        """
        self.config, self.optimizer, self.schedule = config, optimizer, schedule
        self.corpus, self.run, self.accelerator = corpus, run, accelerator
        rank, size, device = (
            accelerator.process_index, accelerator.num_processes, accelerator.device,
        )  # fmt: skip
        parallel = parallel or ParallelConfig()
        self.timeout = parallel.timeout
        self.mesh = Mesh(parallel, rank=rank, processes=size, device=device)
        self.world = World(rank, size, device, copies=self.mesh.copies)
        self.device = device
        self.micro_batch, self.micro_steps = config.share_of(self.mesh.data_size)
        check_stretches(corpus.sequence_length, self.mesh)
        self.dtype = matmul_dtype(config.precision, self.device)
        self.num_workers, self.write_sample = num_workers, write_sample
        self.evaluate_more = evaluate_more

        if config.carry_state:
            check_carried(model, self.mesh)
        torch.manual_seed(config.seed)
        self.dropout = None
        if config.dropout:
            if self.mesh.tensor is not None:
                raise ConfigError(
                    "training.dropout",
                    config.dropout,
                    "is for whole sub-layers, which parallel.tensor divides; use 0 or "
                    "parallel.tensor=1.",
                )
            self.dropout = Dropout(model, config.dropout, seed=config.seed, rank=rank)
        self.flops_per_token = 3 * model.flops_per_token(corpus.sequence_length)
        self.parallel = ParallelModel(
            model,
            self.mesh,
            accelerator,
            dtype=self.dtype,
            activation_checkpointing=config.activation_checkpointing,
            compile=config.compile,
        )
        self.model = model
        for block in model.blocks:
            block.mixer.keep_outputs = config.keep_outputs
        self.optimizers = Optimizers(optimizer, self.model)
        self.progress = Progress(data_fingerprint=corpus.train.fingerprint)
        self.carried = (
            CarriedStates(self.model, self.micro_steps, self.world) if config.carry_state else None
        )
        if run.resume_from is not None:
            self._restore()
        self.checkpoints = Checkpointer(
            run, self.parallel, self.optimizers, self.world, keep_last=config.keep_last
        )
        self.peak = None if config.peak_tflops is None else config.peak_tflops * 1e12
        self.tracker = tracker
        self.alive: Callable[[], None] = lambda: None
        """Tells who watches over several processes that this one gets on."""
        self.waited = 0.0
        """Seconds of the last step that this process waited for others."""
        self.stop_requested = 0
        self.stop_signal = 0
        """The signal that asked for a stop, on any process; 0 for none."""

    @property
    def complete(self) -> bool:
        """Whether no step is left to take."""
        return self.progress.step >= self.config.max_steps

    def fit(self) -> bool:
        """Train until ``max_steps``.

        Returns:
            Whether the run is complete; False after SIGTERM or SIGUSR1 (saved).

        Raises:
            NonFiniteError: ``max_bad_steps`` in a row; nothing was learned from them.
            SaveError: The last checkpoint could not be written.
        """
        config, progress = self.config, self.progress
        if self.complete:
            log.info("the run is complete: step %d of %d", progress.step, config.max_steps)
            return True
        validates = config.eval_every > 0 and self.corpus.validation is not None
        meter = Meter()
        bad_steps, first = 0, True
        if self.world.is_main:
            clear_partial(self.run)
        with (
            self._handle_signals(),
            self._open_metrics() as metrics,
            self._batches() as batches,
            self._watched(),
        ):
            while progress.step < config.max_steps:
                ratio = learning_rate_ratio(self.schedule, progress.step, config.max_steps)
                rate = self.optimizer.learning_rate * ratio
                self.optimizers.set_learning_rate(rate)

                self.alive()
                begin = time.perf_counter()
                micro_batches = [next(batches) for _ in range(self.micro_steps)]
                meter.data_wait += time.perf_counter() - begin
                if self.dropout is not None:
                    self.dropout.begin_step(progress.step)
                loss, grad_norm, stop = self.forward_backward(micro_batches)
                if first and self.world.is_main:
                    log.info("operators ran on: %s", implementations_taken())
                first = False
                meter.waited += self.waited
                meter.steps += 1
                if self._is_good(loss, grad_norm):
                    self.checkpoints.wait_until_copied()
                    self.optimizers.step()
                    bad_steps = 0
                    meter.add(loss, grad_norm)
                else:
                    bad_steps += 1
                    if self.carried is not None:
                        self.carried.forget()
                    self._report_bad_step(loss, grad_norm, bad_steps)
                self.optimizers.zero_grad()

                progress.step += 1
                progress.samples += config.batch_size
                progress.tokens += config.batch_size * self.corpus.sequence_length
                progress.seconds += time.perf_counter() - begin
                meter.seconds += time.perf_counter() - begin
                meter.tokens += config.batch_size * self.corpus.sequence_length

                last = progress.step == config.max_steps
                if last or stop or progress.step % config.log_every == 0:
                    self._log(metrics, meter, rate)
                    meter = Meter()
                improved = False
                if validates and self._due(config.eval_every):
                    improved = self._validate(metrics)
                if self.write_sample and self._due(config.sample_every):
                    self._sample()
                if last or stop or improved or progress.step % config.save_every == 0:
                    self._save(best=improved, last=last or stop > 0)
                else:
                    self._poll_save()
                if stop and not last:
                    self.stop_signal = stop
                    name = signal.Signals(stop).name
                    log.info("stopped by %s at step %d, after saving", name, progress.step)
                    break
        if self.world.is_main:
            plot_losses(self.run.metrics, self.run.plot)
        return self.complete

    def forward_backward(self, micro_batches: list[dict[str, Tensor]]) -> tuple[float, float, int]:
        """Accumulate the gradient of the mean loss over all labels of the step, and clip it.

        Args:
            micro_batches: This process's share of the step, as ``training_batches`` gives it.

        Returns:
            That loss, the gradient's norm before clipping, and the signal by which any process
            was told to stop, or 0; the same on every process.
        """
        micro_batches = [self._share(batch) for batch in micro_batches]
        labels = sum(int((batch["labels"] != -100).sum()) for batch in micro_batches)
        asked = [float(self.stop_requested == number) for number in STOP_SIGNALS]
        self.waited = 0.0
        count, *stops = self._sum_and_wait(labels / self.world.copies, *asked)
        averaged = self.world.size // self.world.copies
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        for i, batch in enumerate(micro_batches):
            with self.parallel.micro_batch(last=i == len(micro_batches) - 1):
                loss = self._loss_sum(self.parallel.call, batch, micro_step=i)
                # Processes average their gradients: times their number is the sum. Another thread
                # would launch the same kernels after a hand-over in each direction.
                with torch.autograd.set_multithreading_enabled(False):
                    (loss * (averaged / max(count, 1.0))).backward()
                total += loss.detach()
        self.parallel.finish_gradients()
        grad_norm = self.parallel.gradient_norm()
        self.optimizers.clip(grad_norm, self.config.max_grad_norm)
        [loss_sum] = self._sum_and_wait(total / self.world.copies)
        stop = next((n for n, asking in zip(STOP_SIGNALS, stops, strict=True) if asking), 0)
        return loss_sum / max(count, 1.0), float(grad_norm), stop

    def _sum_and_wait(self, *values: float | Tensor) -> list[float]:
        """Add numbers over processes, counting the seconds that the others were later."""
        if self.world.size > 1 and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        begin = time.perf_counter()
        sums = self.world.sum(*values).tolist()
        self.waited += time.perf_counter() - begin
        return sums

    def _share(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return this process's stretch of sequences that several share."""
        context = self.mesh.context
        return batch if context is None else {k: context.stretch(v) for k, v in batch.items()}

    def _loss_sum(
        self, model: torch.nn.Module, batch: dict[str, Tensor], micro_step: int | None = None
    ) -> Tensor:
        """Return the loss of a batch; with a micro-step, from the state carried to it, if any."""
        moved = {k: v.to(self.device, non_blocking=True) for k, v in batch.items()}
        carried = self.carried if micro_step is not None else None
        state = None
        if carried is not None and micro_step is not None:
            state = carried.before(micro_step, moved["continues"])
        with autocast(self.device, self.dtype):
            output = model(
                moved["input_ids"],
                moved["labels"],
                seq_idx=moved.get("seq_idx"),
                state=state,
                loss_reduction="sum",
            )
        if carried is not None and micro_step is not None:
            carried.after(micro_step, output.state)
        return output.loss

    def evaluate(self) -> dict[str, float]:
        """Measure the loss on the held-out samples.

        Returns:
            val_loss in nats per token, val_perplexity, and for text val_bits_per_byte: the loss of
            all tokens over the bytes of their text.
        """
        held_out, batches = self.corpus.validation, self.config.eval_batches
        assert held_out is not None
        self.model.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        count = 0
        # FSDP's buffers outlive the pass, which inference tensors may not.
        with torch.inference_mode() if self.parallel.layout is None else torch.no_grad():
            for batch in validation_batches(
                held_out,
                batch_size=self.micro_batch,
                rank=self.mesh.data_rank,
                world_size=self.mesh.data_size,
                # The same samples whatever the number of processes and micro-steps.
                max_batches=batches and batches * self.micro_steps,
            ):
                self.alive()
                share = self._share(batch)
                total += self._loss_sum(self.model, share)
                count += int((share["labels"] != -100).sum())
        self.model.train()
        loss_sum, labels = self.world.sum_over_tokens(total, count).tolist()
        loss = loss_sum / max(labels, 1.0)
        figures = {"val_loss": loss, "val_perplexity": math.exp(min(loss, 700.0))}
        if held_out.bytes:
            nats_per_byte = loss * held_out.tokens / held_out.bytes
            figures["val_bits_per_byte"] = nats_per_byte / math.log(2)
        return figures

    def _validate(self, metrics: Metrics | None) -> bool:
        """Record the held-out loss; return whether it is the best so far and to be kept."""
        figures = self.evaluate()
        more = self._evaluate_more()
        if metrics:
            row = {"step": self.progress.step, "tokens": self.progress.tokens, **figures}
            metrics.write(row | more)
        best = self.progress.best_val_loss
        if best is not None and figures["val_loss"] >= best:
            return False
        self.progress.best_val_loss = figures["val_loss"]
        return self.config.keep_best

    def _evaluate_more(self) -> dict[str, float]:
        """Return the further figures of the model, on whoever takes part."""
        # Who has only a part of the model takes part; all read the same, and whole sequences.
        if self.evaluate_more is None or not (self.world.is_main or self.parallel.layout):
            return {}
        context, self.model.context = self.model.context, None
        self.model.eval()
        try:
            return self.evaluate_more(self.model)
        finally:
            self.model.train()
            self.model.context = context

    def _due(self, every: int) -> bool:
        """Return whether something of this period (0: only at the end) happens after this step."""
        step = self.progress.step
        return step == self.config.max_steps or (every > 0 and step % every == 0)

    def _log(self, metrics: Metrics | None, meter: Meter, rate: float) -> None:
        busy = (meter.seconds - meter.waited) / meter.steps
        everybody = self.world.gather(busy, memory_in_use(self.device))
        if metrics is None:
            return
        busy_p, memory_p = everybody.t().tolist()
        between = {} if self.world.size == 1 else {
            "step_seconds_min": min(busy_p),
            "step_seconds_max": max(busy_p),
            "slowest_process": busy_p.index(max(busy_p)),
            "wait_fraction": meter.waited / max(meter.seconds, 1e-9),
        }  # fmt: skip
        if self.peak is None:
            self.peak = peak_flops(self.device, self.dtype)
        speed = meter.tokens / max(meter.seconds, 1e-9)
        metrics.write(
            {
                "step": self.progress.step,
                "tokens": self.progress.tokens,
                "loss": meter.mean(meter.losses),
                "grad_norm": meter.mean(meter.grad_norms),
                "learning_rate": rate,
                "tokens_per_second": speed,
                "mfu": speed * self.flops_per_token / (self.peak * self.world.size),
                "memory_bytes": int(max(memory_p)),
                "data_wait_fraction": meter.data_wait / max(meter.seconds, 1e-9),
                "seconds": self.progress.seconds,
                **between,
            }
        )

    def _sample(self) -> None:
        assert self.write_sample is not None
        # Who has only a part of the model takes part; all draw the same tokens.
        if self.world.is_main or self.parallel.layout is not None:
            self.model.eval()
            text = self.write_sample(self.model)
            self.model.train()
            if self.world.is_main:
                with self.run.samples.open("a", encoding="utf-8") as file:
                    file.write(f"=== step {self.progress.step}\n{text}\n\n")

    def _save(self, *, best: bool, last: bool) -> None:
        """Begin a checkpoint; wait for the last one of a run."""
        carried = None if self.carried is None else self.carried.gathered()
        save = functools.partial(
            self.checkpoints.save, self.progress, best=best, carried=carried, alive=self.alive
        )
        try:
            save()
        except SaveError as error:  # the one before, which was still under way
            log.error("%s; training goes on", error)
            save()
        if last:
            self.checkpoints.finish(self.alive)

    def _poll_save(self) -> None:
        try:
            self.checkpoints.poll()
        except SaveError as error:
            log.error("%s; training goes on", error)

    def _restore(self) -> None:
        assert self.run.resume_from is not None
        self.progress = restore(self.run.resume_from, self.parallel, self.optimizers)
        fingerprint = self.corpus.train.fingerprint
        same = self.progress.data_fingerprint == fingerprint
        if not same:
            log.warning("the training data are not those that %s saw", self.run.resume_from)
            self.progress.data_fingerprint = fingerprint
        if self.carried is not None and not (
            same and self.carried.load(self.run.resume_from, self.micro_batch)
        ):
            log.warning("no states to carry on in %s: all rows begin anew", self.run.resume_from)
        if self.run.path.resolve() not in self.run.resume_from.resolve().parents:
            self.progress.best_val_loss = None  # the best checkpoint of a new folder is its own
        log.info("continuing from %s", self.run.resume_from)

    @contextlib.contextmanager
    def _batches(self) -> Iterator[Iterator[dict[str, Tensor]]]:
        """Open the batches from where the run stands, and end the processes that read ahead."""
        others = set(multiprocessing.active_children())
        # A scheduler sends signals to every process of a job. The readers, which begin here, have
        # to outlive it until the last step is done: they inherit it blocked.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            batches = training_batches(
                self.corpus.train,
                start=self.progress.samples,
                micro_batch=self.micro_batch,
                rank=self.mesh.data_rank,
                world_size=self.mesh.data_size,
                num_workers=self.num_workers,
                pin_memory=self.device.type == "cuda",
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        readers = set(multiprocessing.active_children()) - others
        try:
            yield batches
        finally:
            # Left alone they would be sent SIGTERM at exit, and waited for.
            if shut_down := getattr(batches, "_shutdown_workers", None):
                shut_down()
            for reader in readers:
                reader.kill()

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Watch over the processes, where there are several."""
        if self.world.size == 1:
            yield
            return
        timeout = self.timeout
        watchdog = Watchdog(
            store_of_run(timeout), rank=self.world.rank, size=self.world.size, timeout=timeout
        )
        self.alive = watchdog.progress
        try:
            yield
        finally:
            watchdog.close()

    @contextlib.contextmanager
    def _open_metrics(self) -> Iterator[Metrics | None]:
        """Open metrics.jsonl on the main process, without the rows that will be written again."""
        if not self.world.is_main:
            yield None
            return
        truncate_metrics(self.run.metrics, self.progress.step)
        truncate_samples(self.run.samples, self.progress.step)
        metrics = Metrics(self.run.metrics, max_steps=self.config.max_steps, tracker=self.tracker())
        try:
            yield metrics
        finally:
            metrics.close()

    def _is_good(self, loss: float, grad_norm: float) -> bool:
        """Return whether to learn from a step; the same on every process."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return False
        recent, sigmas = self.progress.recent_losses, self.config.spike_sigmas
        if sigmas is None:
            return True
        if len(recent) == SPIKE_WINDOW:
            mean, deviation = statistics.fmean(recent), statistics.stdev(recent)
            if loss > mean + sigmas * deviation:
                return False
            del recent[0]
        recent.append(loss)
        return True

    def _report_bad_step(self, loss: float, grad_norm: float, bad_steps: int) -> None:
        step, size = self.progress.step + 1, self.config.batch_size
        first = self.progress.samples
        if self.world.is_main:
            log.warning(
                "step %d skipped: loss %s, gradient norm %s, samples %d to %d",
                step, loss, grad_norm, first, first + size - 1,
            )  # fmt: skip
        if bad_steps >= self.config.max_bad_steps:
            raise NonFiniteError(
                f"{bad_steps} steps in a row without a finite loss and gradient"
                + (" or with a loss spike" if self.config.spike_sigmas is not None else "")
                + f", the last at step {step}; the newest checkpoint is from before. Lower "
                "optimizer.learning_rate or training.max_grad_norm, or use training.precision=fp32."
            )

    @contextlib.contextmanager
    def _handle_signals(self) -> Iterator[None]:
        """Let SIGTERM and SIGUSR1 ask for a stop at the end of a step."""

        def request(signum: int, frame: FrameType | None) -> None:
            self.stop_requested = signum

        before = {number: signal.signal(number, request) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def check_stretches(length: int, mesh: Mesh) -> None:
    """Refuse sequences that do not divide over the processes that share them.

    Raises:
        ConfigError: Their length is no multiple, or leaves stretches shorter than convolutions.
    """
    degrees = mesh.degrees
    split = mesh.tensor is not None and mesh.tensor.over_sequence
    parts = degrees.context * (degrees.tensor if split else 1)
    if length % parts:
        raise ConfigError(
            "data.sequence_length",
            length,
            f"must be a multiple of {parts}, the processes that share a sequence "
            "(parallel.context, and parallel.tensor with sequence_parallel).",
        )
    if degrees.context > 1 and length // degrees.context < 4:
        raise ConfigError(
            "data.sequence_length", length, f"must be at least {4 * degrees.context}: "
            "4 tokens for each of parallel.context.",
        )  # fmt: skip


class Meter:
    """Figures of the steps since the last row of metrics."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.grad_norms: list[float] = []
        self.tokens = 0
        self.seconds = 0.0
        self.data_wait = 0.0
        self.waited = 0.0
        """Seconds that other processes were later at the beginning and end of steps."""
        self.steps = 0

    def add(self, loss: float, grad_norm: float) -> None:
        """Count a step that was taken."""
        self.losses.append(loss)
        self.grad_norms.append(grad_norm)

    @staticmethod
    def mean(values: list[float]) -> float:
        """Return the mean, NaN of nothing (every step was skipped)."""
        return sum(values) / len(values) if values else math.nan


def matmul_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """Return the dtype that ``training.precision`` means on a device."""
    if precision is Precision.auto:
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            fast = cpu_has_fast_bf16()
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if precision is Precision.bf16 else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which matrix products run in ``dtype``."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)
