"""Forward and backward passes as CUDA graphs: recorded once, then started by one launch each.

A pass launches more than a thousand kernels, and the device waits where the host is late with one.
A graph holds all launches of a micro-step with the addresses that they had when it was recorded. So
inputs are copied to where they lay then, gradients are found where they were written then, and
nothing on the host may depend on the data. All else of a step (norm, clipping, the optimizer,
skipped steps) stays outside.

There are two graphs: the first micro-step of a step writes gradients, the others add to them. They
share their memory, as one runs after the other.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mamba2lm.distributed import Mesh
from mamba2lm.ops.copies import renew
from mamba2lm.ops.documents import count_documents, fixed
from mamba2lm.schema import ConfigError
from mamba2lm.training.config import TrainingConfig

log = logging.getLogger(__name__)

WARM_UP = 3
"""Steps before the recording: what compiles, tunes, loads or connects at its first use has done so,
and after the second it is known whether mixers keep outputs."""

Tensors = dict[str, Tensor]


class WaitsError(RuntimeError):
    """The host would wait for the device, which no recording can."""


_aten = torch.ops.aten
_WAITING = {
    _aten._local_scalar_dense, _aten.nonzero, _aten.masked_select, _aten.equal, _aten.bincount,
    _aten._unique, _aten._unique2, _aten.unique_dim, _aten.unique_consecutive,
}  # fmt: skip
_INDEXING = {_aten.index, _aten.index_put, _aten.index_put_}


class NoWaiting(TorchDispatchMode):
    """Raise ``WaitsError`` at PyTorch's operations that wait for a device.

    A recording that fails leaves generators and memory in disorder: better to know before.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._type = device.type

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs, packet = kwargs or {}, getattr(func, "overloadpacket", None)
        waits = packet in _WAITING and args[0].device.type == self._type
        if packet in _INDEXING:
            waits = any(index is not None and _is_mask(index) for index in args[1])
        elif packet is _aten._to_copy:
            to = kwargs.get("device")
            waits = to is not None and _crosses(args[0].device, torch.device(to), kwargs)
        elif packet is _aten.copy_:
            waits = _crosses(args[1].device, args[0].device, kwargs)
        elif packet is _aten.repeat_interleave:
            waits = kwargs.get("output_size") is None
        if waits:
            raise WaitsError(f"{func} has the host wait for the device")
        return func(*args, **kwargs)


def _is_mask(index: Tensor) -> bool:
    return index.dtype in (torch.bool, torch.uint8)


def _crosses(source: torch.device, to: torch.device, kwargs: dict[str, Any]) -> bool:
    return source.type != to.type and not kwargs.get("non_blocking")


class Recorder(Protocol):
    """What records work on a device."""

    def rehearsal(self) -> AbstractContextManager[Any]:
        """Return what raises ``WaitsError`` where work within could not be recorded."""
        ...

    def record(self, work: Callable[[], Tensors]) -> tuple[Callable[[], None], Tensors]:
        """Record what a function launches, without running it.

        Args:
            work: Works on tensors that stay where they are.

        Returns:
            What runs it again, and the tensors that the function returned, which every run
            overwrites.

        Raises:
            RuntimeError: It does something that cannot be recorded.
        """
        ...

    def forget(self) -> None:
        """Give back all that was recorded."""
        ...


class CudaRecorder:
    """Record CUDA graphs that share their memory: to be run in the order they were recorded in."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._failed: list[torch.cuda.CUDAGraph] = []
        self._pool: Any = None

    def rehearsal(self) -> AbstractContextManager[Any]:
        return NoWaiting(self._stream.device)

    def record(self, work: Callable[[], Tensors]) -> tuple[Callable[[], None], Tensors]:
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        before, collects = torch.cuda.current_stream(), gc.isenabled()
        # What is garbage now would be freed in the middle of the recording, other graphs for one.
        gc.collect()
        gc.disable()
        try:
            # Other threads go on allocating, copying and waiting.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                outputs = work()
        except RuntimeError:
            torch.cuda.set_stream(before)
            # The generator would go on believing that it is being recorded.
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            generator.graphsafe_set_state(generator.clone_state())
            graph.reset()
            self._failed.append(graph)  # the allocator may go on asking it
            raise
        finally:
            torch.cuda.set_stream(before)  # a recording that failed leaves its own
            if collects:
                gc.enable()
        self._graphs.append(graph)
        return graph.replay, outputs

    def forget(self) -> None:
        for graph in self._graphs:
            graph.reset()
        self._graphs.clear()
        self._pool = None  # its memory may still hold gradients: the next recordings have another
        torch.cuda.empty_cache()


@dataclass
class _Recorded:
    replay: Callable[[], None]
    outputs: Tensors
    most_documents: int | None
    """It holds no more than that many documents; None: any number."""

    def holds(self, inputs: Mapping[str, Tensor]) -> bool:
        return self.most_documents is None or _documents(inputs) <= self.most_documents


def _documents(inputs: Mapping[str, Tensor]) -> int:
    return count_documents(inputs["seq_idx"]) if "seq_idx" in inputs else 0


class StepGraphs:
    """Run micro-steps, from the fourth step on by replaying what was recorded of them."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        device: torch.device,
        recorder: Recorder,
        *,
        strict: bool = True,
    ) -> None:
        """Begin with nothing recorded.

        Args:
            parameters: Whose gradients the passes compute.
            device: Where they run.
            recorder: What records them.
            strict: Whether to raise where a pass cannot be recorded; else it runs launch by launch.
        """
        self._parameters, self._device = list(parameters), device
        self._recorder, self._strict = recorder, strict
        self._steps = 0
        self._most_documents = 0
        self._off = False
        self._inputs: Tensors = {}
        self._recorded: dict[bool, _Recorded] = {}
        """By whether it is that of a step's first micro-step."""
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []
        """Where the recorded passes leave them."""

    def run(
        self, work: Callable[[Tensors], Tensors], inputs: Mapping[str, Tensor], *, first: bool
    ) -> Tensors:
        """Run a micro-step: leave gradients in the parameters, return what it returns.

        Args:
            work: The micro-step, the same at every call: adds to the gradients of the parameters,
                and returns tensors without a history of gradients.
            inputs: Its inputs, on the device or the CPU; ``seq_idx``, document ids, on the CPU.
                Inputs of other names or shapes than the recorded ones are not replayed.
            first: Whether it is a step's first; then no parameter has a gradient.

        Raises:
            ConfigError: It cannot be recorded; if ``strict``.
        """
        self._steps += first
        recorded = None
        if self._steps > WARM_UP and not self._off and self._fits(inputs):
            for name, tensor in inputs.items():
                self._inputs[name].copy_(tensor, non_blocking=True)
            if first:
                renew(self._parameters)
            recorded = self._take(work, inputs, first)
        if recorded is None:
            moved = {k: v.to(self._device, non_blocking=True) for k, v in inputs.items()}
            if first and self._steps == WARM_UP:
                return self._rehearse(work, moved, inputs)
            return work(moved)
        self._attach(add=not first)
        recorded.replay()
        return {name: tensor.clone() for name, tensor in recorded.outputs.items()}

    def close(self) -> None:
        """Give the graphs' memory back: a process group cannot be left while graphs use it."""
        self.forget()
        self._inputs.clear()

    def forget(self) -> bool:
        """Give the memory back until the next step records anew; return whether there was any."""
        recorded = bool(self._recorded)
        self._recorded.clear()
        self._gradients.clear()
        self._recorder.forget()
        return recorded

    def _fits(self, inputs: Mapping[str, Tensor]) -> bool:
        """Return whether inputs are like those recorded; make room for them if none are."""
        if not self._inputs:
            self._inputs = {
                name: torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
                for name, tensor in inputs.items()
            }
        return inputs.keys() == self._inputs.keys() and all(
            tensor.shape == inputs[name].shape and tensor.dtype == inputs[name].dtype
            for name, tensor in self._inputs.items()
        )

    def _take(
        self, work: Callable[[Tensors], Tensors], inputs: Mapping[str, Tensor], first: bool
    ) -> _Recorded | None:
        """Return what is recorded of a micro-step, recording it where it is not; None: nothing."""
        found = self._recorded.get(first)
        if found is not None and not found.holds(inputs):
            self.forget()
            found = None
            for parameter in self._parameters:
                if parameter.grad is not None:  # it would keep the memory around it from the others
                    parameter.grad = parameter.grad.clone()
        if found is None and (first or True in self._recorded):
            try:
                found = self._record(work, inputs, first)
            except RuntimeError as error:  # no memory, for one
                self._give_up(error)
        return found

    def _rehearse(
        self, work: Callable[[Tensors], Tensors], moved: Tensors, inputs: Mapping[str, Tensor]
    ) -> Tensors:
        """Run a step's first micro-step as it would be recorded, or find out that it cannot be."""
        try:
            with fixed(self._room(inputs)), self._recorder.rehearsal():
                return work(moved)
        except (WaitsError, torch.OutOfMemoryError) as error:
            self._give_up(error)  # room for more documents may be what there is no memory for
        for parameter in self._parameters:
            parameter.grad = None
        return work(moved)

    def _give_up(self, error: RuntimeError) -> None:
        what = str(error).partition("\n")[0]
        if self._strict:
            raise ConfigError(
                "training.cuda_graph", True, f"a step cannot be recorded ({what}); use false."
            ) from error
        log.warning("a step cannot be recorded and runs launch by launch: %s", what)
        self._off = True
        self.forget()

    def _record(
        self, work: Callable[[Tensors], Tensors], inputs: Mapping[str, Tensor], first: bool
    ) -> _Recorded:
        before = [parameter.grad for parameter in self._parameters]
        if first:
            assert all(gradient is None for gradient in before), "gradients are to be written"
        else:
            self._attach(add=True)
        try:
            with fixed(self._room(inputs)) as held:
                replay, outputs = self._recorder.record(lambda: work(self._inputs))
        except RuntimeError:
            for parameter, gradient in zip(self._parameters, before, strict=True):
                parameter.grad = gradient
            raise
        if first:
            self._gradients = [(p, p.grad) for p in self._parameters if p.grad is not None]
        else:
            assert all(p.grad is gradient for p, gradient in self._gradients), "added elsewhere"
        recorded = _Recorded(replay, outputs, held.most if held.mattered else None)
        self._recorded[first] = recorded
        log.info("recorded a step's %s pass as a CUDA graph", "first" if first else "next")
        return recorded

    def _room(self, inputs: Mapping[str, Tensor]) -> int:
        """Return for how many documents to record: two to four times those of these inputs."""
        documents = _documents(inputs)
        self._most_documents = max(self._most_documents, 1 << (2 * documents).bit_length())
        return self._most_documents

    def _attach(self, *, add: bool) -> None:
        """Have the parameters' gradients where the recorded passes write them, or add to them."""
        for parameter, gradient in self._gradients:
            if add and parameter.grad is not gradient:  # of a pass that was not replayed
                if parameter.grad is None:
                    gradient.zero_()
                else:
                    gradient.copy_(parameter.grad)
            parameter.grad = gradient


def step_graphs(
    config: TrainingConfig, mesh: Mesh, device: torch.device, parameters: Iterable[nn.Parameter]
) -> StepGraphs | None:
    """Return what records steps, as ``training.cuda_graph`` has it; None if nothing does.

    Args:
        config: The loop.
        mesh: The processes.
        device: Where this one computes.
        parameters: Of the model, divided as it will train.

    Raises:
        ConfigError: The key is true and something forbids it.
    """
    if config.cuda_graph is False:
        return None
    reason = _reason_against(config, mesh, device)
    if config.cuda_graph and reason is not None:
        raise ConfigError("training.cuda_graph", True, reason)
    # Recording has run on NVIDIA's GPUs alone: elsewhere only who asks for it gets it.
    if config.cuda_graph is None and (mesh.degrees.processes > 1 or torch.version.hip is not None):
        return None
    if reason is not None:
        if device.type == "cuda":
            log.info("passes run launch by launch: training.cuda_graph %s", reason.split(";")[0])
        return None
    return StepGraphs(parameters, device, CudaRecorder(device), strict=bool(config.cuda_graph))


def _reason_against(config: TrainingConfig, mesh: Mesh, device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"needs a GPU, and this process computes on a {device.type}; use false."
    if mesh.degrees.processes > mesh.degrees.tensor:
        return (
            "is for one process, or for those of parallel.tensor alone: what FSDP and plain data "
            "parallelism exchange is not recorded; use false."
        )
    if mesh.tensor is not None and "nccl" not in dist.get_backend(mesh.tensor.group):
        return "records sums over processes that NCCL makes; use that backend, or false."
    if config.compile:
        return "does not record compiled blocks; use training.compile=false, or false."
    if config.dropout and config.activation_checkpointing:
        return (
            "cannot draw the same random numbers again; of training.dropout, "
            "training.activation_checkpointing and this one use two."
        )
    return None
