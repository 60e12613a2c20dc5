"""Floating-point operations of the operators' forward passes; a multiply-add counts as two."""

from __future__ import annotations


def ssd_flops(
    *,
    batch: int,
    length: int,
    n_heads: int,
    head_dim: int,
    n_groups: int,
    d_state: int,
    chunk_size: int,
) -> int:
    """Count the matrix-product FLOPs of the chunked SSD's forward pass, 2·m·n·k each.

    Counts the four products of the algorithm as they are computed, on full chunks: C Bᵀ (once per
    group), scores times x, chunk states, and states times C. Passing states between chunks is a
    recurrence, not a product, in the algorithm; it is left out, as are exponentials.

    Args:
        batch: Rows.
        length: Positions per row.
        n_heads: Heads h.
        head_dim: Channels p of a head.
        n_groups: Groups g that share B and C.
        d_state: State size n.
        chunk_size: Positions q per chunk; a shorter row is one chunk.

    Returns:
        FLOPs as an exact integer.
    """
    q = min(chunk_size, length)
    padded = -(-length // q) * q
    scores = n_groups * q * d_state
    inside = n_heads * q * head_dim
    states_and_outputs = 2 * n_heads * head_dim * d_state
    return 2 * batch * padded * (scores + inside + states_and_outputs)


def selective_scan_flops(*, batch: int, length: int, d_inner: int, d_state: int) -> int:
    """Count the multiply-adds of the selective scan's forward pass as two FLOPs each.

    The scan has no matrix products. Per position, channel and state index it multiplies the state
    by its decay and adds the update (one multiply-add), forms the update (Δx)·B (one multiply,
    counted as a multiply-add) and adds the state times C to the output (one multiply-add): three
    multiply-adds, six FLOPs. Exponentials are left out.

    Args:
        batch: Rows.
        length: Positions per row.
        d_inner: Channels d.
        d_state: State size n per channel.

    Returns:
        FLOPs as an exact integer.
    """
    return 6 * batch * length * d_inner * d_state
