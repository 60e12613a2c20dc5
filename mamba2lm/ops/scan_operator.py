"""What the SSD and the selective scan share around their kernels: an operator with gradients.

Both take the tensors x, dt, A, B, C, D, z, dt_bias, initial_states and marks of documents (None is
allowed from D on), then whether softplus is applied to dt and the least and largest step size, and
return y, the final states and what the backward pass needs besides the inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TENSORS = 10
"""Arguments that are tensors; they come first."""

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""Of x, dt, A, B, C, D, z, dt_bias and initial_states; those of absent arguments are empty."""

BACKWARD_SCHEMA = (
    "(Tensor dy, Tensor? dfinal, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, "
    "Tensor? z, Tensor? dt_bias, Tensor? initial_states, Tensor? documents, Tensor kept, "
    "bool dt_softplus, float low, float high) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


class ScanOperator:
    """The custom operators ``mamba2lm::…_forward`` and ``…_backward``, the gradient of the first.

    Eager code calls the kernels' launchers through an autograd function instead, which spares it
    the custom operators' dispatch.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[..., tuple[Tensor, Tensor, Tensor]],
        fake_forward: Callable[..., tuple[Tensor, Tensor, Tensor]],
        backward: Callable[..., Gradients],
    ) -> None:
        """Register the two operators.

        Args:
            name: What their names begin with.
            forward: Launches the forward kernels; its annotations are the operator's schema.
            fake_forward: Returns empty outputs for the same arguments.
            backward: Launches the backward kernels, from the gradients of y and of the final states
                (or None), the tensors, what ``forward`` left, and the three numbers.
        """

        def new_gradients(*arguments: Any) -> Gradients:
            return backward(*arguments)

        self.backward = backward
        self.forward = forward
        self.forward_op = torch.library.custom_op(
            f"mamba2lm::{name}_forward", forward, mutates_args=()
        )
        # A function of its own: ``backward`` may also take where to write, which no operator may.
        self.backward_op = torch.library.custom_op(
            f"mamba2lm::{name}_backward", new_gradients, mutates_args=(), schema=BACKWARD_SCHEMA
        )
        self.forward_op.register_fake(fake_forward)
        self.backward_op.register_fake(_empty_gradients)
        self.forward_op.register_autograd(
            lambda ctx, dy, dfinal, _: _gradients(self.backward_op, ctx, dy, dfinal),
            setup_context=_setup_context,
        )

    def __call__(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        """Return y and the final states, differentiable once in every tensor."""
        if torch.compiler.is_compiling():
            y, final, _ = self.forward_op(*arguments)
        else:
            y, final = _Eager.apply(self, *arguments)
        return y, final


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operator: ScanOperator, *inputs: Any) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        output = operator.forward(*inputs)
        ctx.operator = operator
        _setup_context(ctx, inputs, output)
        return output[0], output[1]

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dy: Tensor | None, dfinal: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        return None, *_gradients(ctx.operator.backward, ctx, dy, dfinal)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:TENSORS], output[2])
    ctx.numbers = inputs[TENSORS : TENSORS + 3]
    ctx.inputs = len(inputs)
    ctx.set_materialize_grads(False)


def _gradients(
    backward: Callable[..., Gradients], ctx: Any, dy: Tensor | None, dfinal: Tensor | None
) -> tuple[Tensor | None, ...]:
    *tensors, kept = ctx.saved_tensors
    x, initial = tensors[0], tensors[8]
    if dy is None:
        dy = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    found = list(backward(dy, dfinal, *tensors, kept, *ctx.numbers))
    if initial is not None:
        found[8] = found[8].to(initial.dtype)
    wanted = [None if t is None else g for t, g in zip(tensors, found, strict=False)]
    return *wanted, *[None] * (ctx.inputs - len(wanted))


def _empty_gradients(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    *_: Any,
) -> Gradients:
    initial_shape = (0,) if initial_states is None else tuple(initial_states.shape)
    return (
        x.new_empty(x.shape),
        dt.new_empty(dt.shape),
        torch.empty_like(A),
        B.new_empty(B.shape),
        B.new_empty(B.shape),
        A.new_empty(0) if D is None else torch.empty_like(D),
        x.new_empty((0,) if z is None else tuple(x.shape)),
        A.new_empty(0) if dt_bias is None else torch.empty_like(dt_bias),
        x.new_empty(initial_shape, dtype=torch.float32),
    )
