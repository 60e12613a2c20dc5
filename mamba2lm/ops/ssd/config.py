"""Which inputs the SSD's Triton kernels take, and how they are launched for each class of shapes.

Block sizes are read from ``tuned/*.json``, whose entries put bounds on a shape's ``bits`` (of the
dtype), ``rows`` (b h), ``length``, ``p``, ``n`` and ``state`` (p n).

Letters: b batch, l length, h heads, p head dim, g groups, n state.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from mamba2lm.ops.kernels import compute_capability, no_kernels
from mamba2lm.ops.tuned import Tuned

HEAD_DIMS = (16, 32, 64, 128)
STATES = (16, 32, 64, 128, 256)

LARGEST_FLOAT_STATE = 64 * 128
"""Elements of the largest float32 state of which two fit in shared memory with the rest."""


@dataclass(frozen=True)
class Blocks:
    """How one kernel is launched: what a program owns and what it runs on."""

    warps: int = 4
    stages: int = 2
    p: int = 64
    """Rows of the state per program, at most P (kernels that walk the chunks)."""
    n: int = 128
    """Columns of the state per program, at most N (``states_kernel``, ``through``)."""
    programs: int = 528
    """Loop over more heads per program as long as this many programs remain."""
    direct: bool = False
    """Whether rows go from memory to the matrix units without passing through registers (kernels
    that walk the chunks)."""


@dataclass(frozen=True, eq=False)
class Config:
    """All choices for one class of shapes; every one changes speed, none the result.

    Compared by identity, which makes it a cheap part of a key.
    """

    forward_chunk: int = 64
    chunk: int = 64
    """Chunk of the backward pass, which recomputes all that depends on it."""
    fused: Blocks | None = None
    """The fused forward schedule, or None for the chunked one."""
    states: Blocks = field(default_factory=Blocks)
    scan: Blocks = field(default_factory=Blocks)
    states_backward: Blocks = field(default_factory=Blocks)
    through: Blocks = field(default_factory=Blocks)
    within: Blocks = field(default_factory=Blocks)
    precision: str = "ieee"
    """How float32 products are computed, Triton's ``input_precision``."""


TUNED = Tuned(Path(__file__).parent / "tuned", Config, Blocks)


@lru_cache(maxsize=4096)
def choose_config(major: int, *, bits: int, rows: int, length: int, p: int, n: int) -> Config:
    """Choose the configuration for a shape.

    Args:
        major: Major compute capability of the GPU; 0 for none.
        bits: Width of the compute dtype.
        rows: Batch times heads.
        length: Positions.
        p: Head dim.
        n: State size.
    """
    return TUNED.choose(major, bits=bits, rows=rows, length=length, p=p, n=n, state=p * n)


def override_config(config: Config | None) -> None:
    """Use one configuration for every call until told otherwise (tests and tuning)."""
    TUNED.override = config


def config_for(x_blhp: Tensor, n: int) -> Config:
    """Choose the configuration for a call."""
    if TUNED.override is not None:
        return TUNED.override
    major = compute_capability(x_blhp.device)
    b, length, h, p = x_blhp.shape
    return choose_config(major, bits=x_blhp.element_size() * 8, rows=b * h, length=length, p=p, n=n)


def unsupported(x: Tensor, B: Tensor) -> str | None:
    """Say why the kernels cannot take these inputs, or None when they can.

    Args:
        x: Inputs, (b, l, h, p).
        B: Input maps, (b, l, g, n).
    """
    if (reason := no_kernels(x)) is not None:
        return reason
    if x.shape[3] not in HEAD_DIMS:
        return f"x has head dim {x.shape[3]} (axis 3); the kernels take {HEAD_DIMS}"
    if B.shape[3] not in STATES:
        return f"B has state size {B.shape[3]} (axis 3); the kernels take {STATES}"
    if x.dtype != torch.float32 and x.shape[3] < 32:
        return "Triton 3.6 compiles the kernels wrongly for head dim 16 in half precision"
    if x.dtype == torch.float32 and x.shape[3] * B.shape[3] > LARGEST_FLOAT_STATE:
        return f"a float32 state of {x.shape[3]} × {B.shape[3]} does not fit on a multiprocessor"
    return None


def reason_against(x: Tensor, B: Tensor) -> str | None:
    """Say why ``auto`` does not take the kernels, or None: they cannot, or PyTorch is faster.

    Args:
        x: Inputs, (b, l, h, p).
        B: Input maps, (b, l, g, n).
    """
    if (reason := unsupported(x, B)) is not None:
        return reason
    if x.dtype == torch.float32 and x.shape[3] * B.shape[3] >= LARGEST_FLOAT_STATE:
        return f"a state of {x.shape[3]} × {B.shape[3]} in true float32 is faster in PyTorch"
    return None


def heads_per_program(heads_per_group: int, rows: int, programs: int) -> int:
    """Return the largest divisor of the heads of a group that leaves enough programs.

    Args:
        heads_per_group: Heads that share B and C.
        rows: Programs if each treated a whole group.
        programs: How many there should be.
    """
    for block in range(heads_per_group, 0, -1):
        if heads_per_group % block == 0 and rows * (heads_per_group // block) >= programs:
            return block
    return 1
