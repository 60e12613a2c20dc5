"""Which inputs the selective scan's Triton kernels take, and how they are launched for each class.

Sizes are read from ``tuned/*.json``, whose entries put bounds on a shape's ``bits`` (of the dtype),
``rows`` (b d) and ``n``.

Letters: b batch, l length, d channels, n state.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from mamba2lm.ops.kernels import compute_capability, no_kernels
from mamba2lm.ops.tuned import Tuned

LARGEST_STATE = 256


@dataclass(frozen=True)
class Blocks:
    """How one kernel is launched: what a program owns and what it runs on."""

    elements: int = 512
    """Elements of the states of a program's channels, which are at least one and at most
    ``channels``."""
    channels: int = 32
    warps: int = 1
    steps: int = 4
    """Positions whose loads are issued together (and, in the backward pass, whose states are kept
    in registers)."""
    registers: int | None = None
    """The most registers that a thread may use; None for as many as the compiler wants."""
    alone: int = 1024
    """Walk the whole sequence as one segment when that makes at least this many programs."""
    programs: int = 4096
    """How many programs there should be otherwise."""


@dataclass(frozen=True)
class Config:
    """All choices for one class of shapes; every one changes speed, none the result."""

    chunk: int = 64
    """Positions between the states that the forward pass leaves for the backward pass."""
    scan: Blocks = field(default_factory=Blocks)
    ends: Blocks = field(default_factory=Blocks)
    gradients: Blocks = field(default_factory=Blocks)
    keep: bool = True
    """Keep decays in registers for the walk back rather than compute them again."""
    walk: int = 8
    """Positions whose loads are issued together where the backward pass walks forward."""
    dot: bool = True
    """Sum dB and dC over channels by matrix products rather than by shuffles."""
    blocks: int = 8
    """Blocks of channels that one program of ``gradients_kernel`` treats one after another, at
    most; more leave fewer partial sums of dB and dC."""
    segment: int = 256
    """Positions that a segment has at least, a multiple of ``chunk``."""


TUNED = Tuned(Path(__file__).parent / "tuned", Config, Blocks)


@lru_cache(maxsize=4096)
def choose_config(major: int, *, bits: int, rows: int, n: int) -> Config:
    """Choose the configuration for a shape.

    Args:
        major: Major compute capability of the GPU; 0 for none.
        bits: Width of the compute dtype.
        rows: Batch times channels.
        n: State size.
    """
    return TUNED.choose(major, bits=bits, rows=rows, n=n)


def override_config(config: Config | None) -> None:
    """Use one configuration for every call until told otherwise (tests and tuning)."""
    TUNED.override = config


def config_for(x_bld: Tensor, n: int) -> Config:
    """Choose the configuration for a call."""
    if TUNED.override is not None:
        return TUNED.override
    major = compute_capability(x_bld.device)
    rows = x_bld.shape[0] * x_bld.shape[2]
    return choose_config(major, bits=x_bld.element_size() * 8, rows=rows, n=n)


def unsupported(x: Tensor, A: Tensor) -> str | None:
    """Say why the kernels cannot take these inputs, or None when they can.

    Args:
        x: Inputs, (b, l, d).
        A: Decay rates, (d, n).
    """
    if (reason := no_kernels(x)) is not None:
        return reason
    if A.shape[1] > LARGEST_STATE:
        return f"A has state size {A.shape[1]} (axis 1); the kernels take at most {LARGEST_STATE}"
    return None


def power_of_two(value: int) -> int:
    """Return the least power of two that is not smaller."""
    return 1 << (value - 1).bit_length()


def channel_block(blocks: Blocks, n: int) -> int:
    """Return the channels of a program, for a state size that is a power of two."""
    return max(1, min(blocks.channels, blocks.elements // n))


def segment_length(blocks: Blocks, config: Config, length: int, programs: int) -> int:
    """Return the positions that a program walks, a multiple of the chunk.

    Args:
        blocks: Launch of the kernel that walks.
        config: What the chunk and the shortest segment are.
        length: Positions of the sequence.
        programs: Programs if each walked the whole sequence.
    """
    chunks = -(-length // config.chunk)
    if programs >= blocks.alone:
        return chunks * config.chunk
    segments = max(1, min(-(-blocks.programs // programs), length // config.segment))
    return -(-chunks // segments) * config.chunk
