"""Depthwise causal convolution for a CPU, with its backward pass written out.

A depthwise ``conv1d`` wants channels before time and is slow on a CPU; read as an image of height
1 with channels last, the same data needs no copy and takes a vectorised path with float32 sums.
Rows that see the initial state or another document are few and are computed by themselves.

Letters: b batch, l length, d channels, w conv width, i rows (b, t) computed by themselves.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def causal_conv1d_cpu(
    x_bld: Tensor,
    weight_dw: Tensor,
    bias_d: Tensor | None,
    *,
    silu: bool,
    initial_states_bwd: Tensor | None = None,
    document_bl: Tensor | None = None,
) -> Tensor:
    """Compute what ``causal_conv1d_taps`` computes, then SiLU if asked; without final states.

    Returns:
        y (b, l, d) in the dtype of x. Differentiable once in every floating-point argument.
    """
    dtype = x_bld.dtype
    history_bwd = None if initial_states_bwd is None else initial_states_bwd.to(dtype)
    bias_d = None if bias_d is None else bias_d.to(dtype)
    return _CausalConv.apply(
        x_bld, weight_dw.to(dtype), bias_d, history_bwd, document_bl, bool(silu)
    )


def _depthwise(x_bld: Tensor, weight_dw: Tensor, bias_d: Tensor | None) -> Tensor:
    """Convolve with w-1 zeros on both sides: (b, l + w - 1, d)."""
    d, w = weight_dw.shape
    image = x_bld.unsqueeze(1).permute(0, 3, 1, 2)
    out = F.conv2d(image, weight_dw.view(d, 1, 1, w), bias_d, padding=(0, w - 1), groups=d)
    return out.permute(0, 2, 3, 1).squeeze(1)


class _SpecialRows:
    """Positions some of whose taps read the initial state, or zero in place of a document."""

    def __init__(
        self, x_bld: Tensor, w: int, history_bwd: Tensor | None, document_bl: Tensor | None
    ) -> None:
        b, length, _ = x_bld.shape
        at_start = torch.arange(length, device=x_bld.device) < (
            w - 1 if history_bwd is not None else 0
        )
        special_bl = at_start.expand(b, length)
        if document_bl is not None:
            before_bl = F.pad(document_bl, (w - 1, 0))[:, :length]
            special_bl = special_bl | (before_bl != document_bl)
        self.rows_i, self.times_i = special_bl.nonzero(as_tuple=True)
        # Source time of each tap, in a sequence with the w-1 earlier inputs in front.
        self.sources_iw = self.times_i.unsqueeze(1) + torch.arange(w, device=x_bld.device)
        exists = self.sources_iw >= (w - 1 if history_bwd is None else 0)
        if document_bl is not None:
            owner_bl = F.pad(document_bl, (w - 1, 0))
            owner_iw = owner_bl[self.rows_i.unsqueeze(1), self.sources_iw]
            exists = exists & (owner_iw == document_bl[self.rows_i, self.times_i].unsqueeze(1))
        self.exists_iw1 = exists.unsqueeze(2)

    def window(self, x_bld: Tensor, history_bwd: Tensor | None, w: int) -> Tensor:
        """Gather the inputs under each row's taps, (i, w, d), zero where a tap must not read."""
        rows_i1 = self.rows_i.unsqueeze(1)
        window_iwd = x_bld[rows_i1, (self.sources_iw - (w - 1)).clamp(min=0)]
        if history_bwd is not None and w > 1:
            earlier_iwd = history_bwd[rows_i1, self.sources_iw.clamp(max=w - 2)]
            window_iwd = window_iwd.where((self.sources_iw >= w - 1).unsqueeze(2), earlier_iwd)
        return window_iwd.where(self.exists_iw1, 0.0)


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x_bld: Tensor,
        weight_dw: Tensor,
        bias_d: Tensor | None,
        history_bwd: Tensor | None,
        document_bl: Tensor | None,
        silu: bool,
    ) -> Tensor:
        length, w = x_bld.shape[1], weight_dw.shape[1]
        y_bld = _depthwise(x_bld, weight_dw, bias_d)[:, :length]
        special = None
        if w > 1 and (history_bwd is not None or document_bl is not None):
            special = _SpecialRows(x_bld, w, history_bwd, document_bl)
            y_id = (special.window(x_bld, history_bwd, w).float() * weight_dw.t().float()).sum(1)
            if bias_d is not None:
                y_id += bias_d
            y_bld[special.rows_i, special.times_i] = y_id.to(y_bld.dtype)
        ctx.save_for_backward(x_bld, weight_dw, history_bwd, y_bld if silu else None)
        ctx.special, ctx.has_bias = special, bias_d is not None
        out_bld = F.silu(y_bld) if silu else y_bld
        # Compiled by torch 2.11, what a call that copies nothing returns has no gradient.
        return out_bld if out_bld.is_contiguous() else out_bld.contiguous()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dy_bld: Tensor
    ) -> tuple[Tensor | None, ...]:
        x_bld, weight_dw, history_bwd, y_bld = ctx.saved_tensors
        special: _SpecialRows | None = ctx.special
        b, length, d = x_bld.shape
        w = weight_dw.shape[1]
        if y_bld is not None:
            dy_bld = torch.ops.aten.silu_backward(dy_bld, y_bld)
        dy_bld = dy_bld.contiguous()
        dbias_d = dy_bld.sum(dim=(0, 1)) if ctx.has_bias else None
        dy_id: Tensor | None = None
        if special is not None:
            dy_id = dy_bld[special.rows_i, special.times_i].float()
            if y_bld is None:
                dy_bld = dy_bld.clone()  # it is the caller's
            dy_bld[special.rows_i, special.times_i] = 0.0

        dx_bld = _depthwise(dy_bld, weight_dw.flip(1), None)[:, w - 1 :].contiguous()
        dweight_wd = torch.zeros(w, d, dtype=torch.float32, device=x_bld.device)
        for row in range(b):  # one row's products fit the cache
            for k in range(w):
                lag = w - 1 - k
                if lag < length:
                    product_ld = dy_bld[row, lag:] * x_bld[row, : length - lag]
                    dweight_wd[k] += product_ld.sum(dim=0, dtype=torch.float32)

        dhistory_bwd = None if history_bwd is None else torch.zeros_like(history_bwd)
        if special is not None and dy_id is not None:
            window_iwd = special.window(x_bld, history_bwd, w).float()
            dweight_wd += (window_iwd * dy_id.unsqueeze(1)).sum(dim=0)
            dwindow_iwd = (dy_id.unsqueeze(1) * weight_dw.t().float()).where(
                special.exists_iw1, 0.0
            )
            dpadded_bld = torch.zeros(b, w - 1 + length, d, device=x_bld.device)
            rows_iw = special.rows_i.unsqueeze(1).expand_as(special.sources_iw)
            dpadded_bld.index_put_((rows_iw, special.sources_iw), dwindow_iwd, accumulate=True)
            dx_bld += dpadded_bld[:, w - 1 :]
            if dhistory_bwd is not None:
                dhistory_bwd += dpadded_bld[:, : w - 1]
        return dx_bld, dweight_wd.t().to(weight_dw.dtype), dbias_d, dhistory_bwd, None, None
