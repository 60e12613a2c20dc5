"""What every operator's Triton kernels share: whether they can run, and on what."""

from __future__ import annotations

import importlib.util
import itertools
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
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
    return torch.cuda.get_device_properties(device).major  # which torch.compile can trace


_chain: bool | None = None


def override_chain(chain: bool | None) -> None:
    """Let kernels of a step begin before the previous one ends, or not; None undoes it."""
    global _chain
    _chain = chain


def chains(device: torch.device, *constants: Tensor | None) -> bool:
    """Return whether a kernel of a step begins before the previous one on the stream has ended.

    Programmatic dependent launch, which NVIDIA's GPUs have from compute capability 9 on.

    Args:
        device: Where it runs.
        constants: What it reads before it waits. Only parameters will do: what a kernel before has
            just computed may not be there yet.
    """
    if not all(tensor is None or isinstance(tensor, torch.nn.Parameter) for tensor in constants):
        return False
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


def _start(binary: Any, grid: tuple[int, int, int], arguments: Sequence[Any]) -> None:
    """Start a compiled kernel on the current stream.

    Args:
        binary: Triton's ``CompiledKernel``.
        grid: Programs along three axes.
        arguments: All of them in order, ``constexpr`` ones too; pointers as tensors or addresses.
    """
    if _hooked():
        binary[grid](*arguments)
    else:
        binary.run(
            *grid, _stream(), binary.function, binary.packed_metadata, None, None, None, *arguments
        )


def _hooked() -> bool:
    """Return whether a profiler of Triton's wants to hear of launches, which takes its own time."""
    from triton import knobs

    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return any(getattr(hook, "calls", hook) for hook in hooks)


def _stream() -> int:
    """Return the handle of the current stream of the current GPU."""
    from triton.runtime import driver

    active: Any = driver.active
    return active.get_current_stream(active.get_current_device())


@dataclass(slots=True)
class _Launch:
    """One launch of a pass: ``pointers`` are places in a tuple of tensors and bytes from there."""

    binary: Any
    grid: tuple[int, int, int]
    pointers: list[tuple[int, int]]
    numbers: tuple[Any, ...]


@dataclass(slots=True)
class Known:
    """What is known about one key: compiled kernels by name, and the launches of a whole pass."""

    binaries: dict[str, Any] = field(default_factory=dict)
    launches: list[_Launch] | None = None


class Launches:
    """The kernels of one operator, compiled for one signature of its inputs.

    Triton examines every argument of every launch to find the binary that suits it, which takes
    longer than a small kernel runs. The first launch under a key goes that way; later ones start
    its binary directly. So everything that Triton specialises on must follow from the key: the
    ``signature`` of every input tensor (intermediate tensors are fresh and aligned) and the
    launch configuration.

    Working out the arguments takes as long again where there are many. ``run`` does that once for
    a whole pass.
    """

    _known: ClassVar[dict[Any, Known]] = {}

    def __init__(self, device: torch.device, *key: Any) -> None:
        """Find the binaries of a key, or start without any.

        Args:
            device: Where the kernels will run.
            key: The operator's name, configuration and signatures.
        """
        if len(self._known) >= MAX_SIGNATURES:
            self._known.clear()
        key = (device, *key)
        known = self._known.get(key)
        self.known = self._known.setdefault(key, Known()) if known is None else known
        self._recorded: list[_Launch] | None = None
        self._tensors: tuple[Tensor | None, ...] = ()

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
        binary = self.known.binaries.get(name)
        if binary is not None:
            _start(binary, grid, (*arguments, *constants.values()))
        else:
            assert list(constants) == kernel.arg_names[len(arguments) :], (name, list(constants))
            options: dict[str, Any] = {} if registers is None else {"maxnreg": registers}
            if chain:
                options["launch_pdl"] = True
            binary = kernel[grid](
                *arguments, **constants, num_warps=warps, num_stages=stages, **options
            )
            if INTERPRETED:
                return
            self.known.binaries[name] = binary
        if self._recorded is not None:
            self._recorded.append(_record(binary, grid, arguments, constants, self._tensors))

    def run(
        self, launch_all: Callable[..., None], tensors: tuple[Tensor | None, ...], *rest: Any
    ) -> None:
        """Launch all kernels of a pass.

        The first time under a key a function does it; later the same launches are repeated with the
        addresses of the tensors of the day.

        Args:
            launch_all: Called with this object, the tensors and ``rest``. It does nothing but call
                the object with kernels, whose first arguments are pointers: the tensors, or views
                of those that share their memory with none of the others. All else in the calls,
                like what the views are, follows from the key.
            tensors: What the kernels read and write, on one device.
            rest: Further arguments, which follow from the key.
        """
        if self.known.launches is None:
            # Two arguments may be one tensor today and differ next time.
            tensors = tuple(None if tensor is None else tensor.detach() for tensor in tensors)
            self._recorded, self._tensors = [], tensors
            launch_all(self, *tensors, *rest)
            if not INTERPRETED:
                self.known.launches = self._recorded
            self._recorded, self._tensors = None, ()
            return
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        hooked, stream = _hooked(), _stream()
        for launch in self.known.launches:
            binary = launch.binary
            pointers = [addresses[place] + offset for place, offset in launch.pointers]
            if hooked:
                binary[launch.grid](*pointers, *launch.numbers)
                continue
            binary.run(
                *launch.grid, stream, binary.function, binary.packed_metadata, None, None, None,
                *pointers, *launch.numbers,
            )  # fmt: skip


def _record(
    binary: Any,
    grid: tuple[int, int, int],
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
    tensors: tuple[Tensor | None, ...],
) -> _Launch:
    """Say where the pointers of a launch lie within tensors, which will be others next time."""
    pointers: list[tuple[int, int]] = []
    for argument in itertools.takewhile(lambda each: isinstance(each, Tensor), arguments):
        place = next((i for i, tensor in enumerate(tensors) if tensor is argument), None)
        if place is not None:
            pointers.append((place, 0))
            continue
        memory = argument.untyped_storage().data_ptr()
        owners = [
            (i, argument.data_ptr() - tensor.data_ptr())
            for i, tensor in enumerate(tensors)
            if tensor is not None and tensor.untyped_storage().data_ptr() == memory
        ]
        assert len(owners) == 1, "a pointer to none of the tensors of a pass, or to several"
        pointers += owners
    numbers = (*arguments[len(pointers) :], *constants.values())
    assert not any(isinstance(number, Tensor) for number in numbers)
    return _Launch(binary, grid, pointers, numbers)


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make a tensor's GPU the current one, at no cost when it is already."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def unit_stride(tensor: Tensor) -> Tensor:
    """Return the tensor with unit stride on its last axis, copying only if it must."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
