"""Depthwise causal convolution as a sum of shifted products.

    y_t = Σ_k weight_k x_{t-(w-1)+k} + bias

Letters: b batch, l length, d channels, w conv width; the state is the last w-1 inputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv1d_taps(
    x_bld: Tensor,
    weight_dw: Tensor,
    bias_d: Tensor | None = None,
    *,
    initial_states_bwd: Tensor | None = None,
    document_bl: Tensor | None = None,
) -> Tensor:
    """Convolve each channel with its own w taps, seeing no later position.

    Args:
        x_bld: Inputs, (b, l, d).
        weight_dw: Taps, oldest first, (d, w).
        bias_d: Bias, (d,), or None.
        initial_states_bwd: The w-1 inputs before position 0, oldest first, (b, w-1, d); None
            means zeros. They belong to the document at position 0.
        document_bl: Document ordinals, (b, l); a tap that reaches another document reads zero.

    Returns:
        y (b, l, d) in the dtype of x.
    """
    b, length, d = x_bld.shape
    w = weight_dw.shape[1]
    weight_wd = weight_dw.to(x_bld.dtype).t()
    if initial_states_bwd is None:
        history_bwd = x_bld.new_zeros(b, w - 1, d)
    else:
        history_bwd = initial_states_bwd.to(x_bld.dtype)
    padded_bld = torch.cat([history_bwd, x_bld], dim=1)
    owner_bl = None if document_bl is None else F.pad(document_bl, (w - 1, 0))
    y_bld = padded_bld[:, w - 1 :] * weight_wd[w - 1]
    for k in range(w - 2, -1, -1):
        tap_bld = padded_bld[:, k : k + length]
        if document_bl is not None and owner_bl is not None:
            tap_bld = tap_bld.where((owner_bl[:, k : k + length] == document_bl).unsqueeze(2), 0.0)
        y_bld = torch.addcmul(y_bld, tap_bld, weight_wd[k])
    if bias_d is not None:
        y_bld = y_bld + bias_d.to(x_bld.dtype)
    return y_bld


def last_inputs(
    x_bld: Tensor,
    count: int,
    initial_states_bwd: Tensor | None = None,
    document_bl: Tensor | None = None,
) -> Tensor:
    """Return the state that a following call needs: the last ``count`` = w-1 inputs.

    Args:
        x_bld: Inputs, (b, l, d).
        count: Inputs to keep.
        initial_states_bwd: The inputs before position 0, (b, w-1, d), or None for zeros; they are
            part of the answer when l < w-1.
        document_bl: Document ordinals, (b, l); inputs of earlier documents than the last
            position's become zero.

    Returns:
        (b, w-1, d) in the dtype of x.
    """
    length = x_bld.shape[1]
    if length >= count:
        # A copy: a state that outlives the call must not keep all inputs alive.
        final_bwd = x_bld[:, length - count :].clone()
    elif initial_states_bwd is None:
        final_bwd = F.pad(x_bld, (0, 0, count - length, 0))
    else:
        final_bwd = torch.cat([initial_states_bwd.to(x_bld.dtype), x_bld], dim=1)[:, length:]
    if document_bl is not None:
        owner_bw = F.pad(document_bl, (count, 0))[:, length:]
        final_bwd = final_bwd.where((owner_bw == document_bl[:, -1:]).unsqueeze(2), 0.0)
    return final_bwd
