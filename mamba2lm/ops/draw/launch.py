"""Launch the kernels of the draw of a token. Triton is imported on the first launch.

Letters: b batch row, v vocabulary.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mamba2lm.ops.kernels import Launches, chains, no_kernels, on_device, signature, unit_stride

PARTS = 32
"""Programs that share a row."""


def unsupported(logits_bv: Tensor) -> str | None:
    """Say why the kernels cannot take these logits, or None when they can."""
    return no_kernels(logits_bv)


@lru_cache
def _kernel(name: str) -> Any:
    """Import a kernel, and Triton with the first."""
    return getattr(importlib.import_module("mamba2lm.ops.draw.step"), name)


def draw_greedily(logits_bv: Tensor, drawn_b: Tensor) -> Tensor:
    """Return the most likely token of each row, the first of equal ones.

    Args:
        logits_bv: (b, v).
        drawn_b: Tokens drawn so far, int64; one is added to each.

    Returns:
        (b,) int64; −1 where the largest logit is not finite or any is NaN.
    """
    logits_bv, device = unit_stride(logits_bv), logits_bv.device
    batch, vocab_size = logits_bv.shape
    token_b = torch.empty(batch, dtype=torch.int64, device=device)
    best_bs = torch.empty(batch, PARTS, dtype=torch.float32, device=device)
    place_bs = torch.empty(batch, PARTS, dtype=torch.int32, device=device)
    chain = chains(device)
    launch = Launches(device, "draw greedily", signature(logits_bv), signature(drawn_b))
    with on_device(device):
        launch(
            _kernel("best_kernel"), (PARTS, batch, 1), logits_bv, best_bs, place_bs,
            logits_bv.stride(0), vocab_size, -(-vocab_size // PARTS),
            warps=4, chain=chain, PARTS=PARTS, BLOCK=1024, CHAIN=chain,
        )  # fmt: skip
        launch(
            _kernel("choose_kernel"), (batch, 1, 1), best_bs, place_bs, drawn_b, token_b,
            drawn_b.stride(0), warps=1, chain=chain, PARTS=PARTS, CHAIN=chain,
        )  # fmt: skip
    return token_b


def draw_at_random(
    scores_bv: Tensor,
    *,
    seed_b: Tensor,
    drawn_b: Tensor,
    top_k_b: Tensor,
    temperature_b: Tensor,
    top_p_b: Tensor,
    min_p_b: Tensor,
    limited: bool,
) -> Tensor:
    """Draw a token of each row by its settings, in float32.

    Args:
        scores_bv: Logits after any penalties, (b, v).
        seed_b: int64; with ``drawn_b`` it decides the draw.
        drawn_b: Tokens drawn so far, int64, with the strides of the others; one is added to each.
        top_k_b: int64; 0 keeps all.
        temperature_b: float32; 0 takes the most likely token.
        top_p_b: float32; 1 keeps all.
        min_p_b: float32; 0 keeps all.
        limited: Whether any row has a top-k or top-p.

    Returns:
        (b,) int64; −1 where the largest score is not finite or any is NaN.
    """
    scores_bv, device = unit_stride(scores_bv), scores_bv.device
    batch, vocab_size = scores_bv.shape
    token_b = torch.empty(batch, dtype=torch.int64, device=device)
    integers, numbers = (seed_b, drawn_b, top_k_b), (temperature_b, top_p_b, min_p_b)
    assert len({t.stride(0) for t in integers}) == len({t.stride(0) for t in numbers}) == 1
    chain = chains(device)
    key = (signature(t) for t in (scores_bv, *integers, *numbers))
    launch = Launches(device, "draw at random", limited, *key)
    with on_device(device):
        launch(
            _kernel("sample_kernel"), (batch, 1, 1), scores_bv, *integers, *numbers, token_b,
            scores_bv.stride(0), seed_b.stride(0), temperature_b.stride(0), vocab_size,
            warps=16, chain=chain, LIMITED=limited, BLOCK=4096, CHAIN=chain,
        )  # fmt: skip
    return token_b
