"""The training loop."""

from __future__ import annotations

import contextlib
import functools
import logging
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor

from mamba2lm.data.batches import training_batches
from mamba2lm.data.loader import Corpus
from mamba2lm.distributed import Mesh, ParallelConfig, World
from mamba2lm.distributed.watchdog import Watchdog, store_of_run
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
from mamba2lm.training.config import TrainingConfig
from mamba2lm.training.dropout import Dropout
from mamba2lm.training.faults import STOP_SIGNALS, StepPolicy, StopRequests
from mamba2lm.training.graph import step_graphs
from mamba2lm.training.hardware import readable_bytes, room_left
from mamba2lm.training.meter import Meter
from mamba2lm.training.metrics import (
    Metrics,
    Tracker,
    plot_losses,
    truncate_metrics,
    truncate_samples,
)
from mamba2lm.training.objective import Gradient, Objective
from mamba2lm.training.optimizer import OptimizerConfig, Optimizers
from mamba2lm.training.parallelize import ParallelModel
from mamba2lm.training.precision import matmul_dtype
from mamba2lm.training.profile import profile_step
from mamba2lm.training.run_folder import RunFolder
from mamba2lm.training.schedule import ScheduleConfig, learning_rate_ratio
from mamba2lm.training.validation import Validation

log = logging.getLogger(__name__)

T = TypeVar("T")


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
        self.corpus, self.run, self.num_workers = corpus, run, num_workers
        self.device = accelerator.device
        parallel = parallel or ParallelConfig()
        self.timeout = parallel.timeout
        rank, size = accelerator.process_index, accelerator.num_processes
        self.mesh = Mesh(parallel, rank=rank, processes=size, device=self.device)
        self.world = World(rank, size, self.device, copies=self.mesh.copies)
        self.micro_batch, self.micro_steps = config.share_of(self.mesh.data_size)
        self.mesh.check_length(corpus.sequence_length)
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
        for block in model.blocks:
            block.mixer.keep_outputs = bool(config.keep_outputs)
        self.dtype = dtype = matmul_dtype(config.precision, self.device)
        self.meter = Meter(
            self.world,
            dtype=dtype,
            flops_per_token=3 * model.flops_per_token(corpus.sequence_length),
            peak_tflops=config.peak_tflops,
        )
        self.model = model
        self.parallel = ParallelModel(
            model,
            self.mesh,
            accelerator,
            dtype=dtype,
            activation_checkpointing=config.activation_checkpointing,
            compile=config.compile,
        )
        self.optimizers = Optimizers(optimizer, model)
        self.carried = (
            CarriedStates(model, self.micro_steps, self.world) if config.carry_state else None
        )
        self.graphs = step_graphs(config, self.mesh, self.device, model.parameters())
        self.objective = Objective(
            self.parallel,
            self.mesh,
            self.world,
            dtype=dtype,
            carried=self.carried,
            graphs=self.graphs,
        )
        self.validation = Validation(
            self.objective,
            self.parallel,
            self.mesh,
            self.world,
            corpus.validation,
            batch_size=self.micro_batch,
            # The same samples whatever the number of processes and micro-steps.
            max_batches=config.eval_batches and config.eval_batches * self.micro_steps,
            evaluate_more=evaluate_more,
            write_sample=write_sample,
        )
        self.progress = Progress(data_fingerprint=corpus.train.fingerprint)
        if run.resume_from is not None:
            self._restore()
        self.checkpoints = Checkpointer(
            run, self.parallel, self.optimizers, self.world, keep_last=config.keep_last
        )
        self.policy = StepPolicy(config, self.progress, is_main=self.world.is_main)
        self.stops = StopRequests()
        self.first_step = self.progress.step + 1
        self.stop_signal = 0
        """The signal that ended ``fit``, on whichever process it arrived; 0 for none."""
        self.tracker = tracker
        self.alive: Callable[[], None] = lambda: None
        """Tells who watches over several processes that this one gets on."""

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
        config, progress, meter = self.config, self.progress, self.meter
        if self.complete:
            log.info("the run is complete: step %d of %d", progress.step, config.max_steps)
            return True
        if self.world.is_main:
            clear_partial(self.run)
        with (
            self.stops.handled(),
            self._open_metrics() as metrics,
            self._batches() as batches,
            self._watched(),
            contextlib.closing(self.graphs) if self.graphs else contextlib.nullcontext(),
        ):
            while not (self.complete or self.stop_signal):
                ratio = learning_rate_ratio(self.schedule, progress.step, config.max_steps)
                rate = self.optimizer.learning_rate * ratio
                self.optimizers.set_learning_rate(rate)

                self.alive()
                meter.begin_step()
                micro_batches = [next(batches) for _ in range(self.micro_steps)]
                meter.data_arrived()
                with self._profiled():
                    gradient = self.forward_backward(micro_batches)
                if self.policy.accepts(gradient.loss, gradient.norm):
                    self.checkpoints.wait_until_copied()
                    self.optimizers.step()
                    meter.learned(gradient.loss, gradient.norm)
                elif self.carried is not None:
                    self.carried.forget()
                self.optimizers.zero_grad()

                tokens = config.batch_size * self.corpus.sequence_length
                progress.step += 1
                progress.samples += config.batch_size
                progress.tokens += tokens
                progress.seconds += meter.end_step(tokens=tokens, waited=gradient.waited)

                self.stop_signal = 0 if self.complete else self.stops.decide(gradient.flags)
                self._after_step(metrics, rate)
        if self.world.is_main:
            plot_losses(self.run.metrics, self.run.plot)
        return self.complete

    def forward_backward(self, micro_batches: list[dict[str, Tensor]]) -> Gradient:
        """Compute the gradient of a step, clipped, from this process's share of its samples."""
        if self.dropout is not None:
            self.dropout.begin_step(self.progress.step)
        clip = functools.partial(self.optimizers.clip, max_norm=self.config.max_grad_norm)
        return self.objective.backward(micro_batches, clip=clip, flags=self.stops.flags())

    @contextlib.contextmanager
    def _profiled(self) -> Iterator[None]:
        """Profile the step that begins, if it is due."""
        every = self.config.profile_every
        if not every or (self.progress.step + 1) % every:
            yield
            return
        with profile_step(self.device) as profile:
            yield
        self.meter.profiled(profile)

    def _after_step(self, metrics: Metrics | None, rate: float) -> None:
        """Log, validate, sample and save, as far as each is due."""
        config, step = self.config, self.progress.step
        if step == self.first_step and self.world.is_main:
            log.info("operators ran on: %s", implementations_taken())
        # The optimizer's states come with the first step: the second shows what a step takes.
        if config.keep_outputs is None and step == self.first_step + 1:
            self._keep_outputs_if_room()
        ends = self.complete or self.stop_signal > 0
        if ends or step % config.log_every == 0:
            self._log(metrics, rate)
        improved = False
        if config.eval_every > 0 and self.corpus.validation is not None:
            improved = self._is_due(config.eval_every) and self._validate(metrics)
        if self._is_due(config.sample_every):
            self._sample()
        if ends or improved or step % config.save_every == 0:
            self._save(best=improved, last=ends)
        else:
            self._poll_save()
        if self.stop_signal:
            name = signal.Signals(self.stop_signal).name
            log.info("stopped by %s at step %d, after saving", name, step)

    def _keep_outputs_if_room(self) -> None:
        """Have mixers keep outputs for the backward pass where all processes have the memory."""
        room = room_left(self.device)
        if room is None:
            return
        tokens = self.micro_batch * self.corpus.sequence_length
        if self.mesh.context is not None:
            tokens //= self.mesh.context.size
        mixers = [block.mixer for block in self.model.blocks]
        more = tokens * sum(x.kept_bytes_per_token(self.dtype.itemsize) for x in mixers)
        keep = more > 0 and not self.world.any(room < more)
        for mixer in mixers:
            mixer.keep_outputs = keep
        if self.world.is_main and more:
            log.info(
                "outputs of Mamba layers, %s, are %s", readable_bytes(more),
                "kept for the backward pass" if keep else "made again: there is no room",
            )  # fmt: skip

    def _is_due(self, every: int) -> bool:
        """Return whether something of this period (0: only at the end) happens after this step."""
        step = self.progress.step
        return self.complete or (every > 0 and step % every == 0)

    def _log(self, metrics: Metrics | None, rate: float) -> None:
        """Record the steps since the last row."""
        row: dict[str, Any] = {
            "step": self.progress.step,
            "tokens": self.progress.tokens,
            **self.meter.row(),
            "learning_rate": rate,
            "seconds": self.progress.seconds,
        }
        if metrics is not None:
            metrics.write(row)

    def _validate(self, metrics: Metrics | None) -> bool:
        """Record the held-out loss; return whether it is the best so far and to be kept."""
        progress = self.progress
        figures = self._beside_graphs(lambda: self.validation.held_out(self.alive))
        more = self._beside_graphs(self.validation.more)
        if metrics is not None:
            metrics.write({"step": progress.step, "tokens": progress.tokens, **figures, **more})
        best = progress.best_val_loss
        if best is not None and figures["val_loss"] >= best:
            return False
        progress.best_val_loss = figures["val_loss"]
        return self.config.keep_best

    def _sample(self) -> None:
        """Add a sample of text to the run's."""
        text = self._beside_graphs(self.validation.sample)
        if text is not None and self.world.is_main:
            with self.run.samples.open("a", encoding="utf-8") as file:
                file.write(f"=== step {self.progress.step}\n{text}\n\n")

    def _beside_graphs(self, work: Callable[[], T]) -> T:
        """Run what is no training pass; where memory is short, with that of recorded passes."""
        try:
            return work()
        except torch.OutOfMemoryError:
            if self.world.size > 1 or self.graphs is None or not self.graphs.forget():
                raise
        log.warning("no memory was left beside recorded passes, which the next step records anew")
        return work()

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
        watchdog = Watchdog(
            store_of_run(self.timeout),
            rank=self.world.rank,
            size=self.world.size,
            timeout=self.timeout,
            told_to_stop=self.stops.arrived,
        )
        self.alive = watchdog.progress
        finished = False
        try:
            yield
            finished = True
        finally:
            watchdog.close(finished=finished)

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
