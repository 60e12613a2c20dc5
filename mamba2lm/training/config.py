"""The keys of ``training``."""

from __future__ import annotations

from dataclasses import dataclass

from mamba2lm.schema import ConfigError
from mamba2lm.training.precision import Precision


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
    keep_outputs: bool | None = None
    """Keep the outputs of Mamba layers' convolutions and norms for the backward pass instead of
    making them again there: quicker, for more memory. Of Mamba layers on a GPU; null keeps them
    where two steps without have shown that there is room."""
    compile: bool = False
    """Blocks through torch.compile; on a GPU not those of Mamba layers, which are one node each."""
    cuda_graph: bool | None = None
    """Record forward and backward pass, after three steps, as a CUDA graph that one launch starts:
    for a host that launches kernels later than the GPU needs them. What a pass uses stays taken
    between steps. For one process, or those of parallel.tensor alone; null: for one process on
    an NVIDIA GPU, where nothing speaks against it."""
    threads: int | None = None
    """CPU threads per process; null lets torch choose."""
    log_every: int = 10
    profile_every: int = 0
    """Profile every so many steps, which slows them, to record how much of their time goes into
    communication; 0 never."""
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
        for name in ("eval_every", "sample_every", "sample_tokens", "profile_every"):
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
