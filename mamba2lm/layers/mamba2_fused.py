"""A whole Mamba-2 mixer as one autograd node, made of the operators' kernels.

The same mathematics as ``Mamba2.forward``, with three savings that separate operators cannot make:
the backward passes of the norm, the SSD and the convolution write their large gradients where they
belong, side by side in those of the convolution's output and of the fused projection; the
convolution's output and the normalised output, cheap to make, are made again unless asked to be
kept; and gradients of the two matrices leave their products in the dtype of the weights.

Axes: b batch, l length, t tokens (b · l), d model width, i inner width, h heads, p head dim,
g groups, n state, c convolved channels (x, B and C side by side), j rows of the projection
(z, x, B, C and Δ side by side).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from mamba2lm.distributed.context import Passage
from mamba2lm.ops.causal_conv1d import launch as conv
from mamba2lm.ops.copies import in_dtype
from mamba2lm.ops.discretisation import step_sizes
from mamba2lm.ops.documents import document_ordinals
from mamba2lm.ops.gated_rms_norm import divided as divided_norm
from mamba2lm.ops.gated_rms_norm import launch as norm
from mamba2lm.ops.products import bias_gradient, matrix_gradient
from mamba2lm.ops.ssd import carry
from mamba2lm.ops.ssd import launch as ssd
from mamba2lm.ops.ssd.carry import running_sum


@dataclass(frozen=True)
class Sizes:
    """What a mixer's tensors do not say themselves."""

    heads: int
    head_dim: int
    groups: int
    state: int
    norm_group: int
    """Channels that are normalised together."""
    eps: float
    dt_limit: tuple[float, float]

    @property
    def inner(self) -> int:
        """i."""
        return self.heads * self.head_dim

    @property
    def convolved(self) -> int:
        """c."""
        return self.inner + 2 * self.groups * self.state

    def split_projection(self, proj_blj: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return views of z (b, l, i), x|B|C (b, l, c) and Δ (b, l, h)."""
        first, second = self.inner, self.inner + self.convolved
        z_bli, xBC_blc, dt_blh = proj_blj.tensor_split((first, second), dim=-1)
        return z_bli, xBC_blc, dt_blh[..., : self.heads]  # behind it may be padding

    def split_convolved(self, xBC_blc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return views of x (b, l, h, p), B and C (b, l, g, n)."""
        states = self.groups * self.state
        x_bli, B_bls, C_bls = xBC_blc.split([self.inner, states, states], dim=-1)
        return (
            x_bli.unflatten(-1, (self.heads, self.head_dim)),
            B_bls.unflatten(-1, (self.groups, self.state)),
            C_bls.unflatten(-1, (self.groups, self.state)),
        )


@dataclass(frozen=True)
class Divided:
    """How the node is one part of a mixer that several processes share."""

    norm: divided_norm.Runs | None
    """Where groups of the norm reach over processes."""
    summed_by: dist.ProcessGroup | None
    """The processes, where the node itself adds up outputs and gradients of the input over them,
    beside products that do not need the sums; None leaves both to the caller."""
    context: Passage | None = None
    """Where other processes have the rest of each sequence."""


WHOLE = Divided(norm=None, summed_by=None)

OVERLAPPED = 4096
"""Tokens from which a product whose result is added over processes is made in parts, each on
its way while the next is made."""
PARTS = 2
"""How many parts."""


def unsupported(x_bld: Tensor, conv_weight_cw: Tensor, sizes: Sizes) -> str | None:
    """Say why not all of a mixer's kernels take these inputs, or None when they do.

    Args:
        x_bld: The mixer's input in the dtype that it computes in.
        conv_weight_cw: Taps of the convolution.
        sizes: The mixer's.
    """
    x_blhp = x_bld.new_empty(0, 0, sizes.heads, sizes.head_dim)
    B_blgn = x_bld.new_empty(0, 0, sizes.groups, sizes.state)
    return (
        conv.unsupported(x_bld, conv_weight_cw)
        or norm.unsupported(x_bld, sizes.norm_group)
        or ssd.reason_against(x_blhp, B_blgn)
    )


def fused_mamba2(
    x_bld: Tensor,
    in_weight_jd: Tensor,
    in_bias_j: Tensor | None,
    conv_weight_cw: Tensor,
    conv_bias_c: Tensor | None,
    A_log_h: Tensor,
    D_h: Tensor,
    dt_bias_h: Tensor,
    norm_weight_i: Tensor,
    out_weight_di: Tensor,
    out_bias_d: Tensor | None,
    *,
    sizes: Sizes,
    seq_idx_bl: Tensor | None = None,
    divided: Divided = WHOLE,
    keep_outputs: bool = False,
) -> Tensor:
    """Run a Mamba-2 mixer from its input to its output, without states on either side.

    Args:
        x_bld: Input, in the dtype that products are computed in.
        in_weight_jd: Projection to z, x, B, C and Δ, whose last rows may be padding; matrices and
            taps of any float dtype.
        in_bias_j: Its bias, or None.
        conv_weight_cw: Taps of the convolution, oldest first.
        conv_bias_c: Its bias, or None.
        A_log_h: log(−A), float32.
        D_h: Skip weights, float32.
        dt_bias_h: Bias of the step sizes, float32.
        norm_weight_i: Scale of the gated norm.
        out_weight_di: Projection back.
        out_bias_d: Its bias, or None.
        sizes: The mixer's.
        seq_idx_bl: Document ids, or None.
        divided: How this is a part of a mixer; ``sizes`` and weights are then those of the part.
        keep_outputs: Keep the convolution's and the norm's outputs for the backward pass.

    Returns:
        (b, l, d) in the dtype of ``x_bld``. Differentiable once in every float tensor.

    Source: Dao & Gu 2024 (arXiv:2405.21060), section 7.1.
    """
    document_bl = None if seq_idx_bl is None else document_ordinals(seq_idx_bl)
    with torch.autocast(x_bld.device.type, enabled=False):
        return _FusedMamba2.apply(
            x_bld, in_weight_jd, in_bias_j, conv_weight_cw, conv_bias_c, A_log_h, D_h, dt_bias_h,
            norm_weight_i, out_weight_di, out_bias_d, document_bl, sizes, divided,
            keep_outputs,
        )  # fmt: skip


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


class _FusedMamba2(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x_bld: Tensor,
        in_weight_jd: Tensor,
        in_bias_j: Tensor | None,
        conv_weight_cw: Tensor,
        conv_bias_c: Tensor | None,
        A_log_h: Tensor,
        D_h: Tensor,
        dt_bias_h: Tensor,
        norm_weight_i: Tensor,
        out_weight_di: Tensor,
        out_bias_d: Tensor | None,
        document_bl: Tensor | None,
        sizes: Sizes,
        divided: Divided,
        keep_outputs: bool,
    ) -> Tensor:
        dtype = x_bld.dtype
        linear = torch.nn.functional.linear
        proj_blj = linear(x_bld, in_dtype(in_weight_jd, dtype), _cast(in_bias_j, dtype))
        z_bli, xBC_blc, dt_blh = sizes.split_projection(proj_blj)
        context = divided.context
        before_bwc = None
        if context is not None and conv_weight_cw.shape[1] > 1:
            before_bwc = context.fetch_inputs_before(xBC_blc, conv_weight_cw.shape[1] - 1)
        convolved_blc, _ = conv.forward(
            xBC_blc, conv_weight_cw, conv_bias_c, before_bwc, document_bl, True, False
        )
        x_blhp, B_blgn, C_blgn = sizes.split_convolved(convolved_blc)
        A_h = -torch.exp(A_log_h)
        y_blhp, left_bhpn, pre = ssd.forward(
            x_blhp, dt_blh, A_h, B_blgn, C_blgn, D_h, None, dt_bias_h, None, document_bl,
            True, *sizes.dt_limit,
        )  # fmt: skip
        carried: tuple[Tensor | None, ...] = ()
        if context is not None:
            log_decay_bhl = _log_decay(dt_blh, dt_bias_h, A_h, sizes)
            entering_bhpn, gathered = context.fetch_entering_state(
                left_bhpn, log_decay_bhl[..., -1]
            )
            carry.forward(y_blhp, log_decay_bhl, C_blgn, entering_bhpn, document_bl)
            carried = before_bwc, log_decay_bhl, entering_bhpn, gathered
        y_bli = y_blhp.flatten(2)
        if divided.norm is None:
            normed_bli, _, scale = norm.forward(
                y_bli, z_bli, None, norm_weight_i, sizes.eps, sizes.norm_group, dtype
            )
        else:
            normed_bli, scale = divided_norm.forward(
                y_bli, z_bli, norm_weight_i, divided.norm, sizes.eps
            )
        ctx.save_for_backward(
            x_bld, in_weight_jd, in_bias_j, conv_weight_cw, conv_bias_c, A_h, D_h, dt_bias_h,
            norm_weight_i, out_weight_di, out_bias_d, document_bl, proj_blj, y_blhp, pre, scale,
            *((convolved_blc, normed_bli) if keep_outputs else (None, None)),
            *carried,
        )  # fmt: skip
        ctx.sizes, ctx.divided = sizes, divided
        if divided.summed_by is None:
            return linear(normed_bli, in_dtype(out_weight_di, dtype), _cast(out_bias_d, dtype))
        out_td, sums = _summed_product(
            normed_bli.flatten(0, 1), in_dtype(out_weight_di, dtype).t(), divided.summed_by
        )
        for work in sums:
            work.wait()
        return out_td.view(x_bld.shape)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dout_bld: Tensor
    ) -> tuple[Tensor | None, ...]:
        with torch.autocast(dout_bld.device.type, enabled=False):
            return _backward(ctx, dout_bld)


def _backward(ctx: Any, dout_bld: Tensor) -> tuple[Tensor | None, ...]:
    (
        x_bld, in_weight_jd, in_bias_j, conv_weight_cw, conv_bias_c, A_h, D_h, dt_bias_h,
        norm_weight_i, out_weight_di, out_bias_d, document_bl, proj_blj, y_blhp, pre, scale,
        convolved_blc, normed_bli,
        *carried,
    ) = ctx.saved_tensors  # fmt: skip
    before_bwc, log_decay_bhl, entering_bhpn, gathered = carried or [None] * 4
    sizes: Sizes = ctx.sizes
    divided: Divided = ctx.divided
    wanted = ctx.needs_input_grad
    dtype = x_bld.dtype
    z_bli, xBC_blc, dt_blh = sizes.split_projection(proj_blj)
    dproj_blj = torch.empty_like(proj_blj)
    dz_bli, dxBC_blc, ddt_blh = sizes.split_projection(dproj_blj)
    used = sizes.inner + sizes.convolved + sizes.heads
    if dproj_blj.shape[-1] > used:
        dproj_blj[..., used:] = 0

    # Out of the block: dz lands in its place; the normalised output may be made again on the way.
    dout_td = dout_bld.reshape(-1, dout_bld.shape[-1])
    dnormed_ti = dout_td @ in_dtype(out_weight_di, dtype)
    anew_bli = None
    if normed_bli is None:
        normed_bli = anew_bli = torch.empty(z_bli.shape, dtype=dtype, device=z_bli.device)
    if divided.norm is None:
        dy_bli, _, _, dnorm_weight_i = norm.backward(
            dnormed_ti.view(z_bli.shape), None, y_blhp.flatten(2), z_bli, norm_weight_i, scale,
            sizes.norm_group, dtype, dz_out=dz_bli, y_out=anew_bli,
        )  # fmt: skip
    else:
        dy_bli, _, dnorm_weight_i = divided_norm.backward(
            dnormed_ti.view(z_bli.shape), y_blhp.flatten(2), z_bli, norm_weight_i, scale,
            divided.norm, dz_out=dz_bli, y_out=anew_bli,
        )  # fmt: skip
    dout_weight_di = dout_bias_d = None
    if wanted[9]:
        dout_weight_di = matrix_gradient(dout_td, normed_bli.flatten(0, 1), out_weight_di.dtype)
    if wanted[10]:
        dout_bias_d = bias_gradient(dout_td, out_bias_d.dtype)
    del dnormed_ti, normed_bli, anew_bli

    # Through the SSD, over the convolution's output.
    if convolved_blc is None:
        convolved_blc, _ = conv.forward(
            xBC_blc, conv_weight_cw, conv_bias_c, before_bwc, document_bl, True, False
        )
    x_blhp, B_blgn, C_blgn = sizes.split_convolved(convolved_blc)
    dy_blhp = dy_bli.view(y_blhp.shape)
    context = divided.context
    dleft_bhpn = dlog_decay_bhl = dC_carried_blgn = None
    if context is not None:
        dlog_decay_bhl, dC_carried_blgn, dentering_bhpn = carry.backward(
            dy_blhp, log_decay_bhl, C_blgn, entering_bhpn, document_bl
        )
        dleft_bhpn, dtotal_bh = context.return_entering_state(
            dentering_bhpn, gathered, log_decay_bhl[..., -1].shape
        )
        dlog_decay_bhl[..., -1] += dtotal_bh
    dconvolved_blc = torch.empty_like(convolved_blc)
    dx_blhp, dB_blgn, dC_blgn = sizes.split_convolved(dconvolved_blc)
    _, _, dA_h, _, _, dD_h, _, ddt_bias_h, _ = ssd.backward(
        dy_blhp, dleft_bhpn, x_blhp, dt_blh, A_h, B_blgn, C_blgn, D_h, None, dt_bias_h,
        None, document_bl, pre, True, *sizes.dt_limit,
        dx_out=dx_blhp, ddt_out=ddt_blh, dB_out=dB_blgn, dC_out=dC_blgn,
    )  # fmt: skip
    if dlog_decay_bhl is not None and dC_carried_blgn is not None:
        dC_blgn += dC_carried_blgn
        for total, more in zip(
            (ddt_blh, ddt_bias_h, dA_h),
            _log_decay_gradients(dlog_decay_bhl, dt_blh, dt_bias_h, A_h, sizes),
            strict=True,
        ):
            total += more
    del convolved_blc, dy_bli, dy_blhp
    _, dconv_weight_cw, dconv_bias_c, dbefore_bwc = conv.backward(
        dconvolved_blc, None, xBC_blc, conv_weight_cw, conv_bias_c, before_bwc, document_bl, True,
        dx_out=dxBC_blc,
    )  # fmt: skip
    if context is not None and before_bwc is not None:
        dxBC_blc[:, -dbefore_bwc.shape[1] :] += context.return_inputs_before(dbefore_bwc)
    del dconvolved_blc

    dproj_tj = dproj_blj.flatten(0, 1)
    dx_bld = din_weight_jd = din_bias_j = None
    sums: list[dist.Work] = []
    if wanted[0]:
        in_weight_jd_cast = in_dtype(in_weight_jd, dtype)
        if divided.summed_by is None:
            dx_td = dproj_tj @ in_weight_jd_cast
        else:
            dx_td, sums = _summed_product(dproj_tj, in_weight_jd_cast, divided.summed_by)
        dx_bld = dx_td.view(x_bld.shape)
    if wanted[1]:
        x_td = x_bld.reshape(-1, x_bld.shape[-1])
        din_weight_jd = matrix_gradient(dproj_tj, x_td, in_weight_jd.dtype)
    if wanted[2]:
        din_bias_j = bias_gradient(dproj_tj, in_bias_j.dtype)
    for work in sums:
        work.wait()
    return (
        dx_bld,
        din_weight_jd,
        din_bias_j,
        dconv_weight_cw,
        None if conv_bias_c is None else dconv_bias_c,
        dA_h * A_h,  # of A = -exp(A_log)
        dD_h,
        ddt_bias_h,
        dnorm_weight_i,
        dout_weight_di,
        dout_bias_d,
        None,
        None,
        None,
        None,
    )


def _log_decay(dt_blh: Tensor, dt_bias_h: Tensor, A_h: Tensor, sizes: Sizes) -> Tensor:
    """Return the log of the decay from the start to each position, (b, h, l), float32."""
    delta_blh = step_sizes(dt_blh, dt_bias=dt_bias_h, dt_softplus=True, dt_limit=sizes.dt_limit)
    return running_sum((delta_blh.to(A_h.dtype) * A_h).transpose(1, 2).contiguous())


def _log_decay_gradients(
    dlog_decay_bhl: Tensor, dt_blh: Tensor, dt_bias_h: Tensor, A_h: Tensor, sizes: Sizes
) -> tuple[Tensor, ...]:
    """Return the gradients of Δ before bias and softplus, of its bias and of A."""
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in (dt_blh, dt_bias_h, A_h)]
        log_decay_bhl = _log_decay(leaves[0], leaves[1], leaves[2], sizes)
    return torch.autograd.grad(log_decay_bhl, leaves, dlog_decay_bhl)


def _summed_product(
    a_tk: Tensor, b_km: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, list[dist.Work]]:
    """Start on a b added over processes; it is done when what is returned beside it is."""
    out_tm = a_tk.new_empty(a_tk.shape[0], b_km.shape[1])
    parts = PARTS if a_tk.shape[0] >= OVERLAPPED else 1
    sums: list[dist.Work] = []
    for a_part, out_part in zip(a_tk.chunk(parts), out_tm.chunk(parts), strict=True):
        torch.mm(a_part, b_km, out=out_part)
        work = dist.all_reduce(out_part, group=group, async_op=True)
        assert work is not None
        sums.append(work)
    return out_tm, sums
