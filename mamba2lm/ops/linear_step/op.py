"""The public linear map of one token a row. Letters: b rows, k inputs, n outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from mamba2lm.ops.dispatch import Impl, choose_impl, expect_shape
from mamba2lm.ops.linear_step.launch import linear_step_triton, scales, unsupported
from mamba2lm.ops.linear_step.reference import Convolution, Norm, Scale, linear_step_composed


def linear_step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    gate: Tensor | None = None,
    convolution: Convolution | None = None,
    residual: Tensor | None = None,
    scale: Scale | None = None,
    out_dtype: torch.dtype | None = None,
    in_place: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """Map one token of each row linearly, with what stands before and after it in a layer.

    Normalises, multiplies, convolves and adds to the residual stream, in that order, each part
    optional. A step's time is that of reading the weight; with few rows all of it is one kernel.

    Args:
        x: Inputs, (b, k).
        weight: (n, k).
        bias: (n,), or None.
        norm: RMSNorm before the product; without ``gate`` over all inputs together.
        gate: With a norm: the inputs are x · SiLU(gate), (b, k).
        convolution: What is done to some of the outputs; its state is overwritten.
        residual: Added at the end, (b, n); the result then has its dtype.
        scale: Instead of a norm, of inputs that have met its weight already
            (``ssd_state_update_normed`` leaves both).
        out_dtype: Of the result without a residual; None means that of the product.
        in_place: Whether ``residual`` may be overwritten, which saves a library's product a copy.
        impl: ``"auto"`` (one kernel for few rows on a GPU, else the fastest of every part),
            ``"triton"`` (the one kernel) or ``"reference"``.

    Returns:
        (b, n). Not differentiable by the kernel, which ``"auto"`` avoids where gradients are
        recorded.

    Raises:
        ValueError: A tensor of the wrong shape, a gate without a norm, or an implementation that
            cannot be.
    """
    sizes: dict[str, int] = {}
    expect_shape("x", x, "b k", sizes)
    expect_shape("weight", weight, "n k", sizes)
    for name, tensor, axes in (
        ("bias", bias, "n"),
        ("gate", gate, "b k"),
        ("residual", residual, "b n"),
        ("norm.weight", None if norm is None else norm.weight, "k"),
    ):
        if tensor is not None:
            expect_shape(name, tensor, axes, sizes)
    _check(norm, gate, convolution, sizes)
    if scale is not None:
        if norm is not None:
            raise ValueError("scale was given with norm; a norm is applied once.")
        groups = sizes["k"] // (scale.group_size or sizes["k"])
        expect_shape("scale.squares", scale.squares, "b s", sizes)
        if scale.group_size is not None and sizes["k"] % scale.group_size:
            raise ValueError(
                f"scale.group_size={scale.group_size} must divide the {sizes['k']} inputs."
            )
        if sizes["s"] % groups:
            raise ValueError(f"scale.squares has {sizes['s']} parts for {groups} groups.")
    reason = unsupported(x, weight, norm, gate, convolution, residual, scale)
    chosen = choose_impl("linear_step", impl, x, unsupported=reason)
    if chosen == "triton":
        return linear_step_triton(
            x, weight, bias, norm, gate, convolution, residual, out_dtype or weight.dtype, scale
        )
    return linear_step_composed(
        x, weight, bias, norm, gate, convolution, residual, out_dtype, impl, scale, in_place
    )


def takes_scale(x: Tensor, weight: Tensor) -> bool:
    """Return whether a step should leave its norm's factor to the product with ``weight``.

    Args:
        x: What the product's inputs will be like, (b, k).
        weight: (n, k).
    """
    return scales(x.shape[0]) and unsupported(x, weight, None, None, None, None) is None


def _check(
    norm: Norm | None, gate: Tensor | None, convolution: Convolution | None, sizes: dict[str, int]
) -> None:
    if gate is not None and norm is None:
        raise ValueError("gate was given without norm; a gate is applied before a norm.")
    if norm is not None and norm.group_size is not None:
        if gate is None and norm.group_size != sizes["k"]:
            raise ValueError("norm.group_size was given without gate; it then must be None.")
        if norm.group_size < 1 or sizes["k"] % norm.group_size:
            raise ValueError(
                f"norm.group_size={norm.group_size} must divide the {sizes['k']} inputs."
            )
    if convolution is not None:
        expect_shape("convolution.weight", convolution.weight, "c w", sizes)
        sizes["w-1"] = sizes["w"] - 1
        expect_shape("convolution.state", convolution.state, "b w-1 c", sizes)
        if convolution.bias is not None:
            expect_shape("convolution.bias", convolution.bias, "c", sizes)
        if not 0 <= convolution.start <= sizes["n"] - sizes["c"]:
            raise ValueError(
                f"convolution.start={convolution.start}: {sizes['c']} channels do not fit into "
                f"{sizes['n']} outputs."
            )
