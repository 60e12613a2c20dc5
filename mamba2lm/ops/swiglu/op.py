"""The public gate of an MLP. Letters: f hidden width; leading axes are free."""

from __future__ import annotations

from torch import Tensor

from mamba2lm.ops.dispatch import Impl, choose_impl
from mamba2lm.ops.kernels import no_kernels
from mamba2lm.ops.swiglu.launch import swiglu_triton
from mamba2lm.ops.swiglu.reference import swiglu_reference


def swiglu(x: Tensor, *, impl: Impl = "auto") -> Tensor:
    """Return silu(gate) · up of x = [gate, up].

    Args:
        x: (…, 2f).
        impl: ``"auto"`` (the kernels on a GPU), ``"triton"`` or ``"reference"``.

    Returns:
        (…, f) in the dtype of x. The kernels round once, the reference after each operation.

    Raises:
        ValueError: An odd width, or an implementation that does not exist.
    """
    if x.shape[-1] % 2:
        raise ValueError(f"x has {x.shape[-1]} channels (last axis); expected gate and up, 2f.")
    if choose_impl("swiglu", impl, x, unsupported=no_kernels(x)) == "triton":
        return swiglu_triton(x)
    return swiglu_reference(x)
