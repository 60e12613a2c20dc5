"""What every operator's Triton kernels share: whether they can run, and on what."""

from __future__ import annotations

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels are run by Triton's interpreter, on the CPU."""

MAX_SIGNATURES = 8192
"""How many signatures of inputs are remembered; a server meets prompts of every length."""


def no_kernels(tensor: Tensor) -> str | None:
    """Say why no Triton kernel can take this tensor, or None when one may.

    Args:
        tensor: An operator's main input.
    """
    if not TRITON_INSTALLED:
        return "Triton is not installed"
    if not (tensor.is_cuda or INTERPRETED):
        return f"the input lies on {tensor.device}, and the kernels need a GPU"
    if tensor.dtype not in DTYPES:
        return f"the input has dtype {tensor.dtype}; the kernels take bfloat16, float16 and float32"
    return None


@lru_cache
def compute_capability(device: torch.device) -> int:
    """Return the major compute capability of an NVIDIA GPU, 0 for anything else."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0
    return torch.cuda.get_device_capability(device)[0]


_chain: bool | None = None


def override_chain(chain: bool | None) -> None:
    """Let kernels of a step begin before the previous one ends, or not; None undoes it."""
    global _chain
    _chain = chain


def chains(device: torch.device) -> bool:
    """Return whether kernels of a step begin before the previous one on the stream has ended.

    Programmatic dependent launch, which NVIDIA's GPUs have from compute capability 9 on.
    """
    able = compute_capability(device) >= 9
    return able if _chain is None else able and _chain


def needs_gradients(*tensors: Tensor | None) -> str | None:
    """Say why a kernel without a gradient cannot be used, or None when it can.

    Args:
        tensors: Its inputs.
    """
    if torch.is_autocast_enabled(next(t.device.type for t in tensors if t is not None)):
        return "autocast is on, and the kernel takes weights as they are"
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return "the kernel has no gradient; run it under torch.no_grad()"
    return None


def signature(tensor: Tensor | None) -> tuple[Any, ...] | None:
    """Return all that a compiled kernel may depend on in a tensor that it is given."""
    if tensor is None:
        return None
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.data_ptr() % 16 == 0


class Launches:
    """The kernels of one operator, compiled for one signature of its inputs.

    Triton examines every argument of every launch to find the binary that suits it, which takes
    longer than a small kernel runs. The first launch under a key goes that way; later ones start
    its binary directly. So everything that Triton specialises on must follow from the key: the
    ``signature`` of every input tensor (intermediate tensors are fresh and aligned) and the
    launch configuration.
    """

    _known: ClassVar[dict[Any, dict[str, Any]]] = {}

    def __init__(self, device: torch.device, *key: Any) -> None:
        """Find the binaries of a key, or start without any.

        Args:
            device: Where the kernels will run.
            key: The operator's name, configuration and signatures.
        """
        if len(self._known) >= MAX_SIGNATURES:
            self._known.clear()
        self.compiled = self._known.setdefault((device, *key), {})

    def __call__(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        *arguments: Any,
        warps: int,
        stages: int = 1,
        registers: int | None = None,
        chain: bool = False,
        variant: str = "",
        **constants: Any,
    ) -> None:
        """Launch a kernel.

        Args:
            kernel: The jitted function; its ``constexpr`` parameters are its last.
            grid: Programs along three axes.
            arguments: All arguments that are not ``constexpr``, in order.
            warps: Warps per program.
            stages: Depth of software pipelining.
            registers: The most that a thread may use; None leaves it to the compiler.
            chain: Whether the kernel may begin before the previous one on the stream has ended; it
                then waits itself before it reads or writes what another kernel of a step writes.
            variant: Tells launches of one kernel apart that differ in their constants.
            constants: All ``constexpr`` arguments, in the order of their declaration.
        """
        name = kernel.__name__ + variant
        compiled = self.compiled.get(name)
        if compiled is not None:
            compiled[grid](*arguments, *constants.values())
            return
        assert list(constants) == kernel.arg_names[len(arguments) :], (name, list(constants))
        options: dict[str, Any] = {} if registers is None else {"maxnreg": registers}
        if chain:
            options["launch_pdl"] = True
        compiled = kernel[grid](
            *arguments, **constants, num_warps=warps, num_stages=stages, **options
        )
        if not INTERPRETED:
            self.compiled[name] = compiled


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make a tensor's GPU the current one, at no cost when it is already."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def unit_stride(tensor: Tensor) -> Tensor:
    """Return the tensor with unit stride on its last axis, copying only if it must."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
