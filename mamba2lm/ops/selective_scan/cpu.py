"""The selective scan for a CPU, with its backward pass written out.

One step after another, updated in place: on a CPU the step's arithmetic, not the number of steps,
is the cost. The forward pass keeps the state at block borders; the backward pass computes the
states of a block again and then walks through it from its end.

Letters: b batch, l length, d channels, n state, t time in a block.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mamba2lm.ops.dispatch import state_dtype

# Elements of the states of one block in the backward pass: 4 MiB of float32.
BLOCK_ELEMENTS = 1_048_576


def selective_scan_cpu(
    x_bld: Tensor,
    dt_bld: Tensor,
    A_dn: Tensor,
    B_bln: Tensor,
    C_bln: Tensor,
    *,
    initial_states_bdn: Tensor | None = None,
    document_bl: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute what ``selective_scan_sequential`` computes, in bounded memory.

    Args, Returns: as ``selective_scan_sequential``; differentiable once.
    """
    b, _, d = x_bld.shape
    dtype = state_dtype(x_bld)
    if initial_states_bdn is None:
        initial_states_bdn = torch.zeros(b, d, A_dn.shape[1], dtype=dtype, device=x_bld.device)
    y_bld, state_bdn = _apply(
        x_bld.to(dtype),
        dt_bld,
        A_dn.to(dtype),
        B_bln.to(dtype),
        C_bln.to(dtype),
        initial_states_bdn.to(dtype),
        document_bl,
    )
    return y_bld.to(x_bld.dtype), state_bdn


class _Steps:
    """What each step multiplies the state by and adds to it."""

    def __init__(
        self, x_bld: Tensor, dt_bld: Tensor, A_dn: Tensor, B_bln: Tensor, document_bl: Tensor | None
    ) -> None:
        self.A_dn = A_dn
        self.dt_lbd1 = dt_bld.transpose(0, 1).unsqueeze(-1).contiguous()
        self.scaled_lbd1 = (dt_bld * x_bld).transpose(0, 1).unsqueeze(-1).contiguous()
        self.B_lb1n = B_bln.transpose(0, 1).unsqueeze(2).contiguous()
        self.keep_lb11: Tensor | None = None
        if document_bl is not None:
            same_bl = F.pad(document_bl[:, 1:] == document_bl[:, :-1], (1, 0), value=True)
            self.keep_lb11 = same_bl.t().to(dt_bld.dtype)[:, :, None, None]

    def decay(self, t: int, out_bdn: Tensor) -> Tensor:
        """Fill ``out_bdn`` with a_t."""
        torch.mul(self.dt_lbd1[t], self.A_dn, out=out_bdn).exp_()
        return out_bdn if self.keep_lb11 is None else out_bdn.mul_(self.keep_lb11[t])


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x_bld: Tensor,
        dt_bld: Tensor,
        A_dn: Tensor,
        B_bln: Tensor,
        C_bln: Tensor,
        initial_bdn: Tensor,
        document_bl: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        b, length, d = x_bld.shape
        block = max(1, min(length, BLOCK_ELEMENTS // initial_bdn.numel()))
        steps = _Steps(x_bld, dt_bld, A_dn, B_bln, document_bl)
        C_lbn1 = C_bln.transpose(0, 1).unsqueeze(-1).contiguous()
        y_lbd = x_bld.new_empty(length, b, d)
        borders_kbdn = initial_bdn.new_empty(-(-length // block), *initial_bdn.shape)
        state_bdn, a_bdn = initial_bdn.clone(), torch.empty_like(initial_bdn)
        for t in range(length):
            if t % block == 0:
                borders_kbdn[t // block] = state_bdn
            state_bdn.mul_(steps.decay(t, a_bdn)).addcmul_(steps.scaled_lbd1[t], steps.B_lb1n[t])
            torch.bmm(state_bdn, C_lbn1[t], out=y_lbd[t].unsqueeze(-1))
        ctx.save_for_backward(x_bld, dt_bld, A_dn, B_bln, C_bln, document_bl, borders_kbdn)
        ctx.block = block
        return y_lbd.transpose(0, 1).contiguous(), state_bdn

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dy_bld: Tensor, dfinal_bdn: Tensor
    ) -> tuple[Tensor | None, ...]:
        x_bld, dt_bld, A_dn, B_bln, C_bln, document_bl, borders_kbdn = ctx.saved_tensors
        b, length, d = x_bld.shape
        n = A_dn.shape[1]
        block: int = ctx.block
        steps = _Steps(x_bld, dt_bld, A_dn, B_bln, document_bl)
        C_lb1n = C_bln.transpose(0, 1).unsqueeze(2).contiguous()
        dy_lbd1 = dy_bld.transpose(0, 1).unsqueeze(-1).contiguous()
        ddt_lbd, dscaled_lbd = x_bld.new_empty(length, b, d), x_bld.new_empty(length, b, d)
        dB_lbn, dC_lbn = x_bld.new_empty(length, b, n), x_bld.new_empty(length, b, n)
        dA_dn = torch.zeros_like(A_dn)
        h_tbdn = x_bld.new_empty(block + 1, b, d, n)
        a_tbdn, dh_tbdn = x_bld.new_empty(block, b, d, n), x_bld.new_empty(block, b, d, n)
        dstate_bdn = dfinal_bdn.clone()
        for k in range(borders_kbdn.shape[0] - 1, -1, -1):
            start = k * block
            size = min(block, length - start)
            times = slice(start, start + size)
            h_tbdn[0] = borders_kbdn[k]
            for t in range(size):
                a_bdn = steps.decay(start + t, a_tbdn[t])
                torch.mul(h_tbdn[t], a_bdn, out=h_tbdn[t + 1])
                h_tbdn[t + 1].addcmul_(steps.scaled_lbd1[start + t], steps.B_lb1n[start + t])
            for t in range(size - 1, -1, -1):
                torch.addcmul(dstate_bdn, dy_lbd1[start + t], C_lb1n[start + t], out=dh_tbdn[t])
                torch.mul(dh_tbdn[t], a_tbdn[t], out=dstate_bdn)
            h, dh = h_tbdn[: size + 1], dh_tbdn[:size]
            dC_lbn[times] = (dy_lbd1[times].transpose(-1, -2) @ h[1:]).squeeze(2)
            dB_lbn[times] = (steps.scaled_lbd1[times].transpose(-1, -2) @ dh).squeeze(2)
            dscaled_lbd[times] = (dh @ steps.B_lb1n[times].transpose(-1, -2)).squeeze(-1)
            # Through a_t = exp(Δ_t A): the gradient of the exponent.
            dexponent = dh.mul_(h[:-1]).mul_(a_tbdn[:size])
            ddt_lbd[times] = torch.einsum("tbdn,dn->tbd", dexponent, A_dn)
            dA_dn += dexponent.mul_(steps.dt_lbd1[times]).sum(dim=(0, 1))
        dscaled_bld = dscaled_lbd.transpose(0, 1)
        return (
            dscaled_bld * dt_bld,
            ddt_lbd.transpose(0, 1) + dscaled_bld * x_bld,
            dA_dn,
            dB_lbn.transpose(0, 1),
            dC_lbn.transpose(0, 1),
            dstate_bdn,
            None,
        )


@torch._disable_dynamo  # pyright: ignore[reportPrivateImportUsage]
def _apply(*arguments: Any) -> Any:
    """Apply the scan outside what torch.compile traces: it would unroll the loop over time.

    ``torch.compiler.disable`` does the same, and imports the compiler at once: a second that every
    program would wait.
    """
    return _SelectiveScan.apply(*arguments)
