"""The chunked SSD for a CPU, with its backward pass written out.

The same four steps as ``ssd_chunked``, arranged for caches rather than for reading: the (q × q)
decays of a few chunks at a time live in a buffer that fits the second-level cache, and the backward
pass recomputes them instead of loading them. A few identities save passes over memory:

* Δ_s enters a chunk's matrix through the exponent, exp(cum_t - (cum_s - log Δ_s)), so Δ x is never
  formed; the skip D is added to the matrix's diagonal.
* With M = L ∘ S and dM the gradient of M, the gradient of the exponents is W = dM ∘ M: a row sum
  for the target, a column sum for the source, and a column sum over Δ for the step.

Letters: b batch, l length, h heads, p head dim, g groups, r heads per group, n state, c chunks,
z = b c all chunks, q position in chunk (k: the same axis as a source), m = r p channels of a group.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mamba2lm.ops.dispatch import state_dtype
from mamba2lm.ops.ssd.reference import chunk_masks

# Elements of the decay buffer of one slab of chunks: 2.5 MiB of float32.
SLAB_ELEMENTS = 655_360

# exp() of anything below, and arithmetic on its denormal results, takes a CPU's slow path.
SMALLEST_EXPONENT = -80.0

# Stands in for a step of exactly zero, whose logarithm would hide the gradient of the step.
SMALLEST_STEP = 1e-20


def ssd_chunked_cpu(
    x_blhp: Tensor,
    dt_blh: Tensor,
    log_a_blh: Tensor,
    B_blgn: Tensor,
    C_blgn: Tensor,
    *,
    D_h: Tensor | None = None,
    initial_states_bhpn: Tensor | None = None,
    document_bl: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Compute what ``ssd_chunked`` computes for Δ x, two to three times as fast on a CPU.

    Args:
        x_blhp: Inputs, not yet multiplied by Δ, (b, l, h, p).
        dt_blh: Step sizes Δ ≥ 0, (b, l, h), float32 (float64 for float64 inputs).
        log_a_blh: Log decays, (b, l, h), same dtype as ``dt_blh``.
        B_blgn: Input maps, (b, l, g, n).
        C_blgn: Output maps, (b, l, g, n).
        D_h: Skip weights, (h,), or None.
        initial_states_bhpn: State before position 0, (b, h, p, n), or None for zero.
        document_bl: Document ordinals, (b, l); the state restarts from zero where they change.
        chunk_size: Positions per chunk, at least 1; any length is padded to a multiple.

    Returns:
        y (b, l, h, p) in the dtype of x and the state after the last position (b, h, p, n) in
        float32 or float64. Differentiable once in every floating-point argument.

    Source: Dao & Gu 2024 (arXiv:2405.21060), section 6; the gradients follow from the chain rule.
    """
    b, length, h, p = x_blhp.shape
    n = B_blgn.shape[3]
    q = min(chunk_size, length)
    padding = -length % q
    if padding:
        x_blhp = F.pad(x_blhp, (0, 0, 0, 0, 0, padding))
        dt_blh = F.pad(dt_blh, (0, 0, 0, padding))
        log_a_blh = F.pad(log_a_blh, (0, 0, 0, padding))
        B_blgn = F.pad(B_blgn, (0, 0, 0, 0, 0, padding))
        C_blgn = F.pad(C_blgn, (0, 0, 0, 0, 0, padding))
    dtype = state_dtype(x_blhp)
    if initial_states_bhpn is None:
        initial_states_bhpn = torch.zeros(b, h, p, n, dtype=dtype, device=x_blhp.device)
    y_blhp, state_bhpn = _ChunkedSSD.apply(
        x_blhp,
        dt_blh,
        log_a_blh,
        B_blgn.to(x_blhp.dtype),
        C_blgn.to(x_blhp.dtype),
        D_h,
        initial_states_bhpn.to(dtype),
        document_bl,
        q,
    )
    return (y_blhp[:, :length] if padding else y_blhp), state_bhpn


class _Plan(NamedTuple):
    """Small tensors that the forward and the backward pass both derive from the inputs."""

    slabs: list[slice]
    target_zhq: Tensor  # cum_t
    source_zhq: Tensor  # cum_s - log Δ_s
    from_start_zqh: Tensor  # decay from the chunk's start to a position
    to_end_zqh: Tensor  # decay from a position to the chunk's end
    weight_zqh: Tensor  # Δ times that decay
    across_bch: Tensor  # decay across a whole chunk
    scores_zgqk: Tensor  # C Bᵀ where target ≥ source and in the same document, else 0
    allowed_zgqk: Tensor  # where that is
    above_qk: Tensor  # added to an exponent: 0, or hugely negative above the diagonal


def _plan(
    dt_blh: Tensor,
    log_a_blh: Tensor,
    B_zgqn: Tensor,
    C_zgqn: Tensor,
    document_bl: Tensor | None,
    q: int,
) -> _Plan:
    b, padded, h = dt_blh.shape
    c = padded // q
    z = b * c
    dt_zqh = dt_blh.reshape(z, q, h)
    cum_zqh = log_a_blh.reshape(z, q, h).cumsum(dim=1)
    source_zqh = cum_zqh - dt_zqh.clamp(min=SMALLEST_STEP).log()
    total_z1h = cum_zqh[:, -1:]
    from_start_zqh = cum_zqh.clamp(min=SMALLEST_EXPONENT).exp()
    to_end_zqh = (total_z1h - cum_zqh).clamp(min=SMALLEST_EXPONENT).exp()
    across_bch = total_z1h.reshape(b, c, h).exp()
    above_qk = torch.ones(q, q, dtype=torch.bool, device=dt_blh.device).triu(1)
    allowed_zgqk = ~above_qk.expand(1, 1, q, q)
    if document_bl is not None:
        masks = chunk_masks(document_bl, c, q)
        from_start_zqh = from_start_zqh * masks.continues_bcq.reshape(z, q, 1)
        to_end_zqh = to_end_zqh * masks.ends_bcq.reshape(z, q, 1)
        unbroken_bc = masks.boundary_bc[:, 1:] == masks.boundary_bc[:, :-1]
        across_bch = across_bch * unbroken_bc.unsqueeze(2)
        allowed_zgqk = allowed_zgqk & masks.same_bcqk.reshape(z, 1, q, q)
    scores_zgqk = (C_zgqn @ B_zgqn.transpose(-1, -2)).to(dt_blh.dtype)
    step = max(1, SLAB_ELEMENTS // (h * q * q))
    return _Plan(
        slabs=[slice(start, min(start + step, z)) for start in range(0, z, step)],
        target_zhq=cum_zqh.transpose(1, 2).contiguous(),
        source_zhq=source_zqh.transpose(1, 2).contiguous(),
        from_start_zqh=from_start_zqh,
        to_end_zqh=to_end_zqh,
        weight_zqh=dt_zqh * to_end_zqh,
        across_bch=across_bch,
        scores_zgqk=scores_zgqk.where(allowed_zgqk, 0.0),
        allowed_zgqk=allowed_zgqk.expand(z, 1, q, q),
        above_qk=above_qk.to(dt_blh.dtype) * -1e30,
    )


def _decays(plan: _Plan, slab: slice, out_shqk: Tensor) -> Tensor:
    """Fill a buffer with Δ_s exp(cum_t - cum_s); what lies above the diagonal is negligible."""
    torch.sub(
        plan.target_zhq[slab].unsqueeze(-1), plan.source_zhq[slab].unsqueeze(-2), out=out_shqk
    )
    return out_shqk.add_(plan.above_qk).clamp_(min=SMALLEST_EXPONENT).exp_()


class _ChunkedSSD(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x_blhp: Tensor,
        dt_blh: Tensor,
        log_a_blh: Tensor,
        B_blgn: Tensor,
        C_blgn: Tensor,
        D_h: Tensor | None,
        initial_bhpn: Tensor,
        document_bl: Tensor | None,
        q: int,
    ) -> tuple[Tensor, Tensor]:
        b, padded, h, p = x_blhp.shape
        g, n = B_blgn.shape[2:]
        r, c = h // g, padded // q
        z = b * c
        dtype, wide = x_blhp.dtype, dt_blh.dtype
        x_zqhp = x_blhp.reshape(z, q, h, p)
        B_zgqn = B_blgn.reshape(z, q, g, n).transpose(1, 2)
        C_zgqn = C_blgn.reshape(z, q, g, n).transpose(1, 2)
        plan = _plan(dt_blh, log_a_blh, B_zgqn, C_zgqn, document_bl, q)

        # Step 2: chunk states from zero.
        states_zgmn = x_blhp.new_empty(z, g, r * p, n)
        for slab in plan.slabs:
            weighted = (x_zqhp[slab].to(wide) * plan.weight_zqh[slab].unsqueeze(-1)).to(dtype)
            weighted_sgmq = weighted.view(-1, q, g, r * p).permute(0, 2, 3, 1)
            states_zgmn[slab] = weighted_sgmq @ B_zgqn[slab]

        # Step 3: pass them on in the wide dtype, keep what enters each chunk in the narrow one.
        states_bchpn = states_zgmn.view(b, c, h, p, n)
        entering_bchpn = torch.empty_like(states_bchpn)
        carry_bhpn = initial_bhpn
        for i in range(c):
            entering_bchpn[:, i] = carry_bhpn
            decayed_bhpn = carry_bhpn * plan.across_bch[:, i, :, None, None]
            # In place the last has no gradient, compiled by torch 2.11.
            carry_bhpn = decayed_bhpn + states_bchpn[:, i]
        entering_zgmn = entering_bchpn.view(z, g, r * p, n)

        # Steps 1 and 4: outputs, slab by slab.
        y_zqhp = torch.empty_like(x_zqhp, memory_format=torch.contiguous_format)
        carried_zqhp = torch.empty_like(y_zqhp)
        largest = plan.slabs[0].stop
        decay_buffer = torch.empty(largest, h, q, q, dtype=wide, device=x_blhp.device)
        for slab in plan.slabs:
            size = slab.stop - slab.start
            M_shqk = _decays(plan, slab, decay_buffer[:size])
            M_shqk.view(size, g, r, q, q).mul_(plan.scores_zgqk[slab].unsqueeze(2))
            if D_h is not None:
                M_shqk.diagonal(dim1=-2, dim2=-1).add_(D_h.to(wide).unsqueeze(-1))
            x_shqp = x_zqhp[slab].transpose(1, 2).contiguous()
            y_shqp = M_shqk.to(dtype) @ x_shqp
            carried_sgqm = C_zgqn[slab] @ entering_zgmn[slab].transpose(-1, -2)
            carried_sqhp = carried_sgqm.transpose(1, 2).reshape(size, q, h, p)
            carried_zqhp[slab] = carried_sqhp
            y_sqhp = carried_sqhp.to(wide) * plan.from_start_zqh[slab].unsqueeze(-1)
            y_zqhp[slab] = y_sqhp.add_(y_shqp.transpose(1, 2))

        ctx.save_for_backward(
            x_blhp,
            dt_blh,
            log_a_blh,
            B_blgn,
            C_blgn,
            D_h,
            document_bl,
            entering_bchpn,
            carried_zqhp,
        )
        ctx.q = q
        return y_zqhp.view(b, padded, h, p), carry_bhpn

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dy_blhp: Tensor, dfinal_bhpn: Tensor
    ) -> tuple[Tensor | None, ...]:
        (
            x_blhp,
            dt_blh,
            log_a_blh,
            B_blgn,
            C_blgn,
            D_h,
            document_bl,
            entering_bchpn,
            carried_zqhp,
        ) = ctx.saved_tensors
        b, padded, h, p = x_blhp.shape
        g, n = B_blgn.shape[2:]
        q: int = ctx.q
        r, c = h // g, padded // q
        z = b * c
        dtype, wide = x_blhp.dtype, dt_blh.dtype
        x_zqhp = x_blhp.reshape(z, q, h, p)
        dy_zqhp = dy_blhp.reshape(z, q, h, p)
        B_zgqn = B_blgn.reshape(z, q, g, n).transpose(1, 2)
        C_zgqn = C_blgn.reshape(z, q, g, n).transpose(1, 2)
        entering_zgmn = entering_bchpn.view(z, g, r * p, n)
        plan = _plan(dt_blh, log_a_blh, B_zgqn, C_zgqn, document_bl, q)
        dcum_zqh = torch.empty(z, q, h, dtype=wide, device=x_blhp.device)
        dC_zgqn = torch.empty(z, g, q, n, dtype=wide, device=x_blhp.device)
        dB_zgqn = torch.empty_like(dC_zgqn)

        # Step 4 backward.
        dentering_zgmn = x_blhp.new_empty(z, g, r * p, n)
        for slab in plan.slabs:
            dcarried = dy_zqhp[slab].to(wide) * plan.from_start_zqh[slab].unsqueeze(-1)
            dcum_zqh[slab] = (dcarried * carried_zqhp[slab]).sum(dim=-1)
            dcarried_sgqm = dcarried.to(dtype).view(-1, q, g, r * p).transpose(1, 2)
            dentering_zgmn[slab] = dcarried_sgqm.transpose(-1, -2) @ C_zgqn[slab]
            dC_zgqn[slab] = dcarried_sgqm @ entering_zgmn[slab]

        # Step 3 backward.
        dentering_bchpn = dentering_zgmn.view(b, c, h, p, n)
        dstates_bchpn = torch.empty_like(dentering_bchpn)
        dtotal_bch = torch.empty(b, c, h, dtype=wide, device=x_blhp.device)
        dcarry_bhpn = dfinal_bhpn
        for i in range(c - 1, -1, -1):
            dstates_bchpn[:, i] = dcarry_bhpn
            decayed_bhpn = dcarry_bhpn * plan.across_bch[:, i, :, None, None]
            dtotal_bch[:, i] = (decayed_bhpn * entering_bchpn[:, i]).sum(dim=(-2, -1))
            dcarry_bhpn = decayed_bhpn.add_(dentering_bchpn[:, i])
        dstates_zgmn = dstates_bchpn.view(z, g, r * p, n)

        # Steps 2 and 1 backward.
        dx_zqhp = torch.empty(z, q, h, p, dtype=dtype, device=x_blhp.device)
        ddt_zqh = torch.empty_like(dcum_zqh)
        dD_h = None if D_h is None else torch.zeros(h, dtype=wide, device=x_blhp.device)
        dt_zqh = dt_blh.reshape(z, q, h)
        largest = plan.slabs[0].stop
        decay_buffer = torch.empty(largest, h, q, q, dtype=wide, device=x_blhp.device)
        for slab in plan.slabs:
            size = slab.stop - slab.start
            weight_sqh1 = plan.weight_zqh[slab].unsqueeze(-1)
            x_sqhp = x_zqhp[slab].to(wide)
            dweighted_sgqm = B_zgqn[slab] @ dstates_zgmn[slab].transpose(-1, -2)
            dweighted_sqhp = dweighted_sgqm.transpose(1, 2).reshape(size, q, h, p).to(wide)
            dweight_sqh = (x_sqhp * dweighted_sqhp).sum(dim=-1)
            weighted_sqhp = (x_sqhp * weight_sqh1).to(dtype)
            weighted_sgqm = weighted_sqhp.view(size, q, g, r * p).transpose(1, 2)
            dB_sgqn = (weighted_sgqm @ dstates_zgmn[slab]).to(wide)

            x_shqp = x_zqhp[slab].transpose(1, 2).contiguous()
            dy_shqp = dy_zqhp[slab].transpose(1, 2).contiguous()
            dM_shqk = (dy_shqp @ x_shqp.transpose(-1, -2)).to(wide)
            if dD_h is not None:
                dD_h += dM_shqk.diagonal(dim1=-2, dim2=-1).sum(dim=(0, 2))
            L_shqk = _decays(plan, slab, decay_buffer[:size])
            dM_shqk = dM_shqk.mul_(L_shqk) if dM_shqk.dtype == wide else dM_shqk * L_shqk
            dLS_sgrqk = dM_shqk.view(size, g, r, q, q)
            dscores_sgqk = dLS_sgrqk.sum(dim=2).mul_(plan.allowed_zgqk[slab]).to(dtype)
            dC_zgqn[slab] += dscores_sgqk @ B_zgqn[slab]
            dB_zgqn[slab] = dB_sgqn.add_(dscores_sgqk.transpose(-1, -2) @ C_zgqn[slab])

            W_shqk = dLS_sgrqk.mul_(plan.scores_zgqk[slab].unsqueeze(2)).view(size, h, q, q)
            row_sqh = W_shqk.sum(dim=-1).transpose(1, 2)
            column_sqh = W_shqk.sum(dim=-2).transpose(1, 2)
            through_end_sqh = dweight_sqh * plan.weight_zqh[slab]
            ddt_sqh = column_sqh / dt_zqh[slab].clamp(min=SMALLEST_STEP)
            ddt_zqh[slab] = ddt_sqh.add_(dweight_sqh * plan.to_end_zqh[slab])
            dcum_zqh[slab] += row_sqh - column_sqh - through_end_sqh
            dcum_zqh[slab, -1] += through_end_sqh.sum(dim=1)

            M_shqk = L_shqk
            M_shqk.view(size, g, r, q, q).mul_(plan.scores_zgqk[slab].unsqueeze(2))
            if D_h is not None:
                M_shqk.diagonal(dim1=-2, dim2=-1).add_(D_h.to(wide).unsqueeze(-1))
            dx_shqp = M_shqk.to(dtype).transpose(-1, -2) @ dy_shqp
            dx_zqhp[slab] = dweighted_sqhp.mul_(weight_sqh1).add_(dx_shqp.transpose(1, 2))

        # cum is a running sum of log a inside each chunk; its last entry also decays whole states.
        dcum_zqh[:, -1] += dtotal_bch.view(z, h)
        dlog_a_zqh = dcum_zqh.flip(1).cumsum(dim=1).flip(1)
        return (
            dx_zqhp.view(b, padded, h, p),
            ddt_zqh.view(b, padded, h),
            dlog_a_zqh.view(b, padded, h),
            dB_zgqn.transpose(1, 2).reshape(b, padded, g, n).to(B_blgn.dtype),
            dC_zgqn.transpose(1, 2).reshape(b, padded, g, n).to(C_blgn.dtype),
            None if D_h is None or dD_h is None else dD_h.to(D_h.dtype),
            dcarry_bhpn,
            None,
            None,
        )
