"""Three forms of one function: the SSD of Dao & Gu 2024 (arXiv:2405.21060).

    h_t = a_t h_{t-1} + x_t B_tᵀ,   y_t = h_t C_t,   a_t = exp(log_a_t)

``x`` is the paper's Δ·x and ``log_a`` its Δ·A: the caller (``op.py``) multiplies by the step.

Letters: b batch, l length, h heads, p head dim, g groups, r heads per group, n state,
c chunks, q position in chunk (k: the same axis as a source), t target, s source.

    code            paper
    x_blhp          Δ_t x_t           input, one p-vector per head
    log_a_blh       Δ_t A = log a_t   log decay
    B_blgn, C_blgn  B_t, C_t          input and output maps, shared by the h/g heads of a group
    state_bhpn      h_t (transposed)  recurrent state
    decay_…ts       L                 1-semiseparable mask, a_t ⋯ a_{s+1}
    document_bl     –                 ordinal of the document at each position
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba2lm.ops.dispatch import state_dtype

# Up to this many chunk states are passed on by one product with a (chunks × chunks) matrix.
MAX_CHUNKS_PER_PRODUCT = 64


def segsum(log_a: Tensor) -> Tensor:
    """Sum log decays over every segment: out[t, s] = log_a[s+1] + … + log_a[t].

    Differences of one cumulative sum, masked before anyone takes the exponential, so that neither
    the value nor the gradient of exp(segsum) can overflow (Dao & Gu 2024, section 7 and listing 1).

    Args:
        log_a: Log decays, (…, l).

    Returns:
        (…, l, l), same dtype; 0 on the diagonal and −inf above it.
    """
    total = log_a.cumsum(dim=-1)
    above = torch.ones(log_a.shape[-1], log_a.shape[-1], dtype=torch.bool, device=log_a.device)
    difference = total.unsqueeze(-1) - total.unsqueeze(-2)
    return difference.masked_fill(above.triu(1), -torch.inf)


def semiseparable_matrix(
    log_a_blh: Tensor, B_blgn: Tensor, C_blgn: Tensor, *, document_bl: Tensor | None = None
) -> Tensor:
    """Materialise the matrix M of y = M x, M_ts = C_tᵀ a_t ⋯ a_{s+1} B_s for s ≤ t, else 0.

    Args:
        log_a_blh: Log decays, (b, l, h).
        B_blgn: Input maps, (b, l, g, n).
        C_blgn: Output maps, (b, l, g, n).
        document_bl: Document ordinals, (b, l); positions of different documents do not interact.

    Returns:
        M as (b, h, l, l), M = L ∘ (C Bᵀ) (Dao & Gu 2024, equation 16).
    """
    heads_per_group = log_a_blh.shape[2] // B_blgn.shape[2]
    decay_bhts = segsum(log_a_blh.transpose(1, 2)).exp()
    scores_bgts = torch.einsum("btgn,bsgn->bgts", C_blgn, B_blgn)
    M_bhts = decay_bhts * scores_bgts.repeat_interleave(heads_per_group, dim=1)
    if document_bl is not None:
        same_bts = document_bl.unsqueeze(2) == document_bl.unsqueeze(1)
        M_bhts = M_bhts.where(same_bts.unsqueeze(1), 0.0)
    return M_bhts


def ssd_recurrent(
    x_blhp: Tensor,
    log_a_blh: Tensor,
    B_blgn: Tensor,
    C_blgn: Tensor,
    *,
    initial_states_bhpn: Tensor | None = None,
    document_bl: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence one position after another: O(l), the form that decodes.

    Args:
        x_blhp: Inputs times Δ, (b, l, h, p).
        log_a_blh: Log decays, (b, l, h), float32 (float64 for float64 inputs).
        B_blgn: Input maps, (b, l, g, n).
        C_blgn: Output maps, (b, l, g, n).
        initial_states_bhpn: State before position 0, (b, h, p, n), or None for zero.
        document_bl: Document ordinals, (b, l); the state restarts from zero where they change.

    Returns:
        y (b, l, h, p) in the dtype of x and the state after the last position (b, h, p, n) in
        float32 or float64 (Dao & Gu 2024, equation 1 with the heads of section 6).
    """
    b, _, h, p = x_blhp.shape
    g, n = B_blgn.shape[2:]
    dtype = state_dtype(x_blhp)
    x_blhp, dtype_out = x_blhp.to(dtype), x_blhp.dtype
    B_blhn = B_blgn.to(dtype).repeat_interleave(h // g, dim=2)
    C_blhn = C_blgn.to(dtype).repeat_interleave(h // g, dim=2)
    a_blh = log_a_blh.exp()
    if document_bl is not None:
        starts_bl = F.pad(document_bl[:, 1:] != document_bl[:, :-1], (1, 0))
        a_blh = a_blh.masked_fill(starts_bl.unsqueeze(2), 0.0)
    if initial_states_bhpn is None:
        state_bhpn = x_blhp.new_zeros(b, h, p, n)
    else:
        state_bhpn = initial_states_bhpn.to(dtype)
    outputs = []
    # unbind, not indexing: the gradient of an index is as long as the sequence.
    steps = zip(x_blhp.unbind(1), a_blh.unbind(1), B_blhn.unbind(1), C_blhn.unbind(1), strict=True)
    for x_bhp, a_bh, B_bhn, C_bhn in steps:
        update_bhpn = x_bhp.unsqueeze(-1) * B_bhn.unsqueeze(-2)
        state_bhpn = a_bh[:, :, None, None] * state_bhpn + update_bhpn
        outputs.append((state_bhpn * C_bhn.unsqueeze(-2)).sum(dim=-1))
    return torch.stack(outputs, dim=1).to(dtype_out), state_bhpn


def ssd_quadratic(
    x_blhp: Tensor,
    log_a_blh: Tensor,
    B_blgn: Tensor,
    C_blgn: Tensor,
    *,
    initial_states_bhpn: Tensor | None = None,
    document_bl: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Multiply by the whole matrix, y = (L ∘ C Bᵀ) x: O(l²), masked attention without softmax.

    C plays the queries, B the keys, x the values, and L the causal mask with decay.

    Args, Returns: as ``ssd_recurrent`` (Dao & Gu 2024, section 4).
    """
    h, g = x_blhp.shape[2], B_blgn.shape[2]
    dtype = state_dtype(x_blhp)
    x_blhp, dtype_out = x_blhp.to(dtype), x_blhp.dtype
    B_blgn, C_blgn = B_blgn.to(dtype), C_blgn.to(dtype)
    M_bhts = semiseparable_matrix(log_a_blh, B_blgn, C_blgn, document_bl=document_bl)
    y_blhp = torch.einsum("bhts,bshp->bthp", M_bhts, x_blhp)

    # The last state is a row of the same mask, applied to x Bᵀ instead of to C Bᵀ x.
    total_blh = log_a_blh.cumsum(dim=1)
    to_end_blh = (total_blh[:, -1:] - total_blh).exp()
    from_start_blh = total_blh.exp()
    if document_bl is not None:
        to_end_blh = to_end_blh.where((document_bl == document_bl[:, -1:]).unsqueeze(2), 0.0)
        from_start_blh = from_start_blh.where((document_bl == 0).unsqueeze(2), 0.0)
    B_blhn = B_blgn.repeat_interleave(h // g, dim=2)
    state_bhpn = torch.einsum("blh,blhp,blhn->bhpn", to_end_blh, x_blhp, B_blhn)
    if initial_states_bhpn is not None:
        initial_bhpn = initial_states_bhpn.to(dtype)
        C_blhn = C_blgn.repeat_interleave(h // g, dim=2)
        y_blhp = y_blhp + torch.einsum("blh,blhn,bhpn->blhp", from_start_blh, C_blhn, initial_bhpn)
        state_bhpn = state_bhpn + from_start_blh[:, -1, :, None, None] * initial_bhpn
    return y_blhp.to(dtype_out), state_bhpn


class ChunkMasks(NamedTuple):
    """Who may see whom when rows hold several documents."""

    same_bcqk: Tensor  # two positions of a chunk are in one document
    ends_bcq: Tensor  # a position is in the document that its chunk ends in
    continues_bcq: Tensor  # a position is in the document that the chunk before ended in
    boundary_bc: Tensor  # document before the first chunk, then at the end of each, (b, c + 1)


def chunk_masks(document_bl: Tensor, c: int, q: int) -> ChunkMasks:
    """Compare document ordinals within and across ``c`` chunks of ``q`` positions.

    Args:
        document_bl: Document ordinals, (b, l) with l ≤ c q; padding joins the last document.
        c: Number of chunks.
        q: Positions per chunk.
    """
    b, length = document_bl.shape
    tail_bl = document_bl[:, -1:].expand(b, c * q - length)
    document_bcq = torch.cat([document_bl, tail_bl], dim=1).reshape(b, c, q)
    boundary_bc = F.pad(document_bcq[:, :, -1], (1, 0))
    return ChunkMasks(
        same_bcqk=document_bcq.unsqueeze(3) == document_bcq.unsqueeze(2),
        ends_bcq=document_bcq == boundary_bc[:, 1:].unsqueeze(2),
        continues_bcq=document_bcq == boundary_bc[:, :-1].unsqueeze(2),
        boundary_bc=boundary_bc,
    )


def ssd_chunked(
    x_blhp: Tensor,
    log_a_blh: Tensor,
    B_blgn: Tensor,
    C_blgn: Tensor,
    *,
    initial_states_bhpn: Tensor | None = None,
    document_bl: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Cut the sequence into chunks: quadratic inside a chunk, recurrent between chunks.

    Matrix products run in the dtype of x; decays, cumulative sums and states stay in float32 (or
    float64). There is no Python loop over time.

    Args:
        chunk_size: Positions per chunk, at least 1; any length is padded to a multiple.

    Other Args, Returns: as ``ssd_recurrent`` (Dao & Gu 2024, section 6 and listing 1, steps 1-4).
    """
    b, length, h, p = x_blhp.shape
    g, n = B_blgn.shape[2:]
    r, q = h // g, min(chunk_size, length)
    c = -(-length // q)
    dtype, dtype_out = state_dtype(x_blhp), x_blhp.dtype

    padding = c * q - length
    if padding:
        # Steps with input 0 and log decay 0 leave the state as it is.
        x_blhp = F.pad(x_blhp, (0, 0, 0, 0, 0, padding))
        log_a_blh = F.pad(log_a_blh, (0, 0, 0, padding))
        B_blgn = F.pad(B_blgn, (0, 0, 0, 0, 0, padding))
        C_blgn = F.pad(C_blgn, (0, 0, 0, 0, 0, padding))
    x_bcqgrp = x_blhp.reshape(b, c, q, g, r, p)
    B_bcgqn = B_blgn.to(dtype_out).reshape(b, c, q, g, n).transpose(2, 3)
    C_bcgqn = C_blgn.to(dtype_out).reshape(b, c, q, g, n).transpose(2, 3)
    log_a_bcgrq = log_a_blh.reshape(b, c, q, g, r).permute(0, 1, 3, 4, 2)
    total_bcgrq = log_a_bcgrq.cumsum(dim=-1)

    masks = None if document_bl is None else chunk_masks(document_bl, c, q)

    # 1. Inside each chunk: the quadratic form, with C Bᵀ computed once for the heads of a group.
    scores_bcgqk = C_bcgqn @ B_bcgqn.transpose(-1, -2)
    if masks is not None:
        scores_bcgqk = scores_bcgqk.where(masks.same_bcqk.unsqueeze(2), 0.0)
    decay_bcgrqk = segsum(log_a_bcgrq).exp()
    M_bcgrqk = (scores_bcgqk.unsqueeze(3) * decay_bcgrqk).to(dtype_out)
    y_bcgrqp = M_bcgrqk @ x_bcqgrp.permute(0, 1, 3, 4, 2, 5)

    # 2. The state each chunk would end with had it started from zero.
    to_end_bcgrq = (total_bcgrq[..., -1:] - total_bcgrq).exp()
    if masks is not None:
        to_end_bcgrq = to_end_bcgrq.where(masks.ends_bcq[:, :, None, None], 0.0)
    weighted_bcqgrp = (x_bcqgrp * to_end_bcgrq.permute(0, 1, 4, 2, 3).unsqueeze(-1)).to(dtype_out)
    weighted_bcgmq = weighted_bcqgrp.reshape(b, c, q, g, r * p).permute(0, 1, 3, 4, 2)
    states_bchpn = (weighted_bcgmq @ B_bcgqn).to(dtype).reshape(b, c, h, p, n)

    # 3. The recurrence over chunks, with the initial state as the state before the first.
    if initial_states_bhpn is None:
        first_bhpn = states_bchpn.new_zeros(b, h, p, n)
    else:
        first_bhpn = initial_states_bhpn.to(dtype)
    passed_bchpn = pass_states(
        torch.cat([first_bhpn.unsqueeze(1), states_bchpn], dim=1),
        F.pad(total_bcgrq[..., -1].reshape(b, c, h), (0, 0, 1, 0)),
        None if masks is None else masks.boundary_bc,
    )
    entering_bcgmn = passed_bchpn[:, :-1].reshape(b, c, g, r * p, n).to(dtype_out)

    # 4. What the entering state adds to each output of the chunk.
    carried_bcgqm = C_bcgqn @ entering_bcgmn.transpose(-1, -2)
    from_start_bcqgr = total_bcgrq.permute(0, 1, 4, 2, 3).exp()
    if masks is not None:
        from_start_bcqgr = from_start_bcqgr.where(masks.continues_bcq[..., None, None], 0.0)
    carried_bcqgrp = carried_bcgqm.transpose(2, 3).reshape(b, c, q, g, r, p)
    y_bcqgrp = y_bcgrqp.permute(0, 1, 4, 2, 3, 5) + carried_bcqgrp * from_start_bcqgr.unsqueeze(-1)
    y_blhp = y_bcqgrp.reshape(b, c * q, h, p)[:, :length].to(dtype_out)
    return y_blhp, passed_bchpn[:, -1]


def pass_states(
    states_bchpn: Tensor, log_decay_bch: Tensor, document_bc: Tensor | None = None
) -> Tensor:
    """Solve out_c = exp(log_decay_c) out_{c-1} + states_c over the chunk axis.

    One product with a (c × c) decay matrix; long sequences are solved in blocks of
    ``MAX_CHUNKS_PER_PRODUCT`` whose ends are passed on by the same function.

    Args:
        states_bchpn: States gathered in each chunk, (b, c, h, p, n), float32 or float64.
        log_decay_bch: Log decay across each chunk, (b, c, h); entry 0 has no effect.
        document_bc: Document ordinal at the end of each chunk, (b, c); a state does not pass
            into a later document.

    Returns:
        (b, c, h, p, n): the state after each chunk.
    """
    b, c, h, p, n = states_bchpn.shape
    k = min(c, MAX_CHUNKS_PER_PRODUCT)
    padding = -c % k
    if padding:
        states_bchpn = F.pad(states_bchpn, (0, 0, 0, 0, 0, 0, 0, padding))
        log_decay_bch = F.pad(log_decay_bch, (0, 0, 0, padding))
        if document_bc is not None:
            document_bc = F.pad(document_bc, (0, padding), value=0)
    blocks = (c + padding) // k
    states_zhkm = states_bchpn.reshape(b * blocks, k, h, p * n).transpose(1, 2)
    log_decay_zhk = log_decay_bch.reshape(b * blocks, k, h).transpose(1, 2)
    decay_zhks = segsum(log_decay_zhk).exp()
    if document_bc is not None:
        document_zk = document_bc.reshape(b * blocks, k)
        same_zks = document_zk.unsqueeze(2) == document_zk.unsqueeze(1)
        decay_zhks = decay_zhks.where(same_zks.unsqueeze(1), 0.0)
    local = (decay_zhks @ states_zhkm).transpose(1, 2).reshape(b, blocks, k, h, p, n)
    if blocks > 1:
        total_bikh = log_decay_bch.reshape(b, blocks, k, h).cumsum(dim=2)
        ends = pass_states(
            local[:, :, -1],
            total_bikh[:, :, -1],
            None if document_bc is None else document_bc.reshape(b, blocks, k)[:, :, -1],
        )
        factor_bikh = total_bikh[:, 1:].exp()
        if document_bc is not None:
            document_bik = document_bc.reshape(b, blocks, k)
            same_bik = document_bik[:, 1:] == document_bik[:, :-1, -1:]
            factor_bikh = factor_bikh.where(same_bik.unsqueeze(3), 0.0)
        carried = factor_bikh[..., None, None] * ends[:, :-1].unsqueeze(2)
        local = torch.cat([local[:, :1], local[:, 1:] + carried], dim=1)
    return local.reshape(b, blocks * k, h, p, n)[:, :c]
