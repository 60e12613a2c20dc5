"""A whole Mamba-1 mixer as one autograd node, made of the operators' kernels.

The same mathematics as ``Mamba1.forward`` without inner norms. The convolution's output and Δ,
cheap to make, are made again in the backward pass unless asked to be kept; gradients that add up or
lie side by side are made where they belong, not joined afterwards; those of the matrices leave
their products in the dtype of the weights.

Axes: b batch, l length, t tokens (b · l), d model width, i inner width, r rank of Δ, n state,
w convolution width, s what is selected (Δ of rank r, B and C side by side).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from mamba2lm.ops.causal_conv1d import launch as conv
from mamba2lm.ops.copies import in_dtype
from mamba2lm.ops.discretisation import NO_LIMIT
from mamba2lm.ops.documents import document_starts
from mamba2lm.ops.products import bias_gradient, matrix_gradient
from mamba2lm.ops.selective_scan import launch as scan


def unsupported(x_bld: Tensor, conv_weight_iw: Tensor, A_in: Tensor) -> str | None:
    """Say why not all of a mixer's kernels take these inputs, or None when they do.

    Args:
        x_bld: The mixer's input in the dtype that it computes in.
        conv_weight_iw: Taps of the convolution.
        A_in: Decay rates, or anything of their shape.
    """
    return conv.unsupported(x_bld, conv_weight_iw) or scan.unsupported(x_bld, A_in)


def fused_mamba1(
    x_bld: Tensor,
    in_weight: Tensor,
    in_bias: Tensor | None,
    conv_weight_iw: Tensor,
    conv_bias_i: Tensor | None,
    select_weight_si: Tensor,
    dt_weight_ir: Tensor,
    dt_bias_i: Tensor,
    A_log_in: Tensor,
    D_i: Tensor,
    out_weight_di: Tensor,
    out_bias_d: Tensor | None,
    *,
    seq_idx_bl: Tensor | None = None,
    keep_outputs: bool = False,
) -> Tensor:
    """Run a Mamba-1 mixer from its input to its output, without states on either side.

    Args:
        x_bld: Input, in the dtype that products are computed in.
        in_weight: Projection to x and z, (2i, d); matrices and taps of any float dtype.
        in_bias: Its bias, or None.
        conv_weight_iw: Taps of the convolution, oldest first.
        conv_bias_i: Its bias, or None.
        select_weight_si: Projection of the convolved x to Δ, B and C.
        dt_weight_ir: Projection of Δ to every channel.
        dt_bias_i: Bias of the step sizes, float32.
        A_log_in: log(−A), float32.
        D_i: Skip weights, float32.
        out_weight_di: Projection back.
        out_bias_d: Its bias, or None.
        seq_idx_bl: Document ids, or None.
        keep_outputs: Keep the convolution's output and Δ for the backward pass.

    Returns:
        (b, l, d) in the dtype of ``x_bld``. Differentiable once in every float tensor.

    Source: Gu & Dao 2023 (arXiv:2312.00752), sections 3.2 to 3.4.
    """
    with torch.autocast(x_bld.device.type, enabled=False):
        return _FusedMamba1.apply(
            x_bld, in_weight, in_bias, conv_weight_iw, conv_bias_i, select_weight_si,
            dt_weight_ir, dt_bias_i, A_log_in, D_i, out_weight_di, out_bias_d, seq_idx_bl,
            keep_outputs,
        )  # fmt: skip


class _FusedMamba1(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x_bld: Tensor,
        in_weight: Tensor,
        in_bias: Tensor | None,
        conv_weight_iw: Tensor,
        conv_bias_i: Tensor | None,
        select_weight_si: Tensor,
        dt_weight_ir: Tensor,
        dt_bias_i: Tensor,
        A_log_in: Tensor,
        D_i: Tensor,
        out_weight_di: Tensor,
        out_bias_d: Tensor | None,
        seq_idx_bl: Tensor | None,
        keep_outputs: bool,
    ) -> Tensor:
        dtype = x_bld.dtype
        proj = linear(
            x_bld, in_dtype(in_weight, dtype), None if in_bias is None else in_bias.to(dtype)
        )
        x_bli, z_bli = proj.chunk(2, dim=-1)
        convolved_bli, _ = conv.forward(
            x_bli, conv_weight_iw, conv_bias_i, None, seq_idx_bl, True, False
        )
        selected_bls = linear(convolved_bli, in_dtype(select_weight_si, dtype))
        dt_blr, B_bln, C_bln = _split(selected_bls, dt_weight_ir, A_log_in)
        dt_bli = linear(dt_blr, in_dtype(dt_weight_ir, dtype))
        A_in = -torch.exp(A_log_in)
        restart_bl = None
        if seq_idx_bl is not None:
            restart_bl = document_starts(seq_idx_bl).contiguous().view(torch.uint8)
        y_bli, _, states = scan.forward(
            convolved_bli, dt_bli, A_in, B_bln, C_bln, D_i, z_bli, dt_bias_i, None, restart_bl,
            True, *NO_LIMIT, True,
        )  # fmt: skip
        ctx.save_for_backward(
            x_bld, in_weight, in_bias, conv_weight_iw, conv_bias_i, select_weight_si,
            dt_weight_ir, dt_bias_i, A_in, D_i, out_weight_di, out_bias_d, seq_idx_bl,
            restart_bl, proj, selected_bls, y_bli, states,
            *((convolved_bli, dt_bli) if keep_outputs else (None, None)),
        )  # fmt: skip
        bias_d = None if out_bias_d is None else out_bias_d.to(dtype)
        return linear(y_bli, in_dtype(out_weight_di, dtype), bias_d)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dout_bld: Tensor
    ) -> tuple[Tensor | None, ...]:
        with torch.autocast(dout_bld.device.type, enabled=False):
            return _backward(ctx, dout_bld)


def _split(selected: Tensor, dt_weight_ir: Tensor, A_in: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return views of Δ (…, r), B and C (…, n)."""
    n = A_in.shape[1]
    dt, B, C = selected.split([dt_weight_ir.shape[1], n, n], dim=-1)
    return dt, B, C


def _backward(ctx: Any, dout_bld: Tensor) -> tuple[Tensor | None, ...]:
    (
        x_bld, in_weight, in_bias, conv_weight_iw, conv_bias_i, select_weight_si,
        dt_weight_ir, dt_bias_i, A_in, D_i, out_weight_di, out_bias_d, seq_idx_bl,
        restart_bl, proj, selected_bls, y_bli, states, convolved_bli, dt_bli,
    ) = ctx.saved_tensors  # fmt: skip
    wanted = ctx.needs_input_grad
    dtype = x_bld.dtype
    x_bli, z_bli = proj.chunk(2, dim=-1)
    dproj = torch.empty_like(proj)
    dx_bli, dz_bli = dproj.chunk(2, dim=-1)

    dout_td = dout_bld.reshape(-1, dout_bld.shape[-1])
    dout_weight = dout_bias = None
    if wanted[10]:
        dout_weight = matrix_gradient(dout_td, y_bli.flatten(0, 1), out_weight_di.dtype)
    if wanted[11]:
        dout_bias = bias_gradient(dout_td, out_bias_d.dtype)
    dy_bli = (dout_td @ in_dtype(out_weight_di, dtype)).view(y_bli.shape)

    # Through the scan, over the convolution's output and Δ.
    dt_blr, B_bln, C_bln = _split(selected_bls, dt_weight_ir, A_in)
    if convolved_bli is None:
        convolved_bli, _ = conv.forward(
            x_bli, conv_weight_iw, conv_bias_i, None, seq_idx_bl, True, False
        )
        dt_bli = linear(dt_blr, in_dtype(dt_weight_ir, dtype))
    dconvolved_bli, ddt_bli, dA_in, dB_bln, dC_bln, dD_i, dz, ddt_bias_i, _ = scan.backward(
        dy_bli, None, convolved_bli, dt_bli, A_in, B_bln, C_bln, D_i, z_bli, dt_bias_i, None,
        restart_bl, states, True, *NO_LIMIT,
    )  # fmt: skip
    dz_bli.copy_(dz)
    del dy_bli, dt_bli, dz

    # To what was selected, and from there to the same x as the scan's own gradient.
    ddt_ti = ddt_bli.flatten(0, 1)
    dselected_bls = torch.empty_like(selected_bls)
    for part, gradient in zip(
        _split(dselected_bls, dt_weight_ir, A_in),
        ((ddt_ti @ in_dtype(dt_weight_ir, dtype)).view(dt_blr.shape), dB_bln, dC_bln),
        strict=True,
    ):
        part.copy_(gradient)
    dselected_ts = dselected_bls.flatten(0, 1)
    ddt_weight = dselect_weight = None
    if wanted[6]:
        ddt_weight = matrix_gradient(ddt_ti, dt_blr.flatten(0, 1), dt_weight_ir.dtype)
    if wanted[5]:
        dselect_weight = matrix_gradient(
            dselected_ts, convolved_bli.flatten(0, 1), select_weight_si.dtype
        )
    dconvolved_bli.flatten(0, 1).addmm_(dselected_ts, in_dtype(select_weight_si, dtype))
    del ddt_bli, ddt_ti, convolved_bli

    _, dconv_weight, dconv_bias, _ = conv.backward(
        dconvolved_bli, None, x_bli, conv_weight_iw, conv_bias_i, None, seq_idx_bl, True,
        dx_out=dx_bli,
    )  # fmt: skip
    del dconvolved_bli
    dproj_t = dproj.flatten(0, 1)
    dx_bld = din_weight = din_bias = None
    if wanted[0]:
        dx_bld = (dproj_t @ in_dtype(in_weight, dtype)).view(x_bld.shape)
    if wanted[1]:
        x_td = x_bld.reshape(-1, x_bld.shape[-1])
        din_weight = matrix_gradient(dproj_t, x_td, in_weight.dtype)
    if wanted[2]:
        din_bias = bias_gradient(dproj_t, in_bias.dtype)
    return (
        dx_bld,
        din_weight,
        din_bias,
        dconv_weight,
        None if conv_bias_i is None else dconv_bias,
        dselect_weight,
        ddt_weight,
        ddt_bias_i,
        dA_in * A_in,  # of A = -exp(A_log)
        dD_i,
        dout_weight,
        dout_bias,
        None,
        None,
    )
