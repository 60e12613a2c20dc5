"""What is done to a single-device model before it trains: divide, recompute, compile, replicate."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from mamba2lm.distributed import Mesh
from mamba2lm.models import LanguageModel
from mamba2lm.models.sharding import ModelLayout, split_model
from mamba2lm.schema import ConfigError


def start_accelerator() -> Accelerator:
    """Join the processes that torchrun or accelerate started, on a GPU each or on the CPU.

    Mixed precision stays ours (``precision.autocast``): Accelerate's rewrites the model's forward,
    and sampling between steps would then differ from a loaded checkpoint's.
    """
    return Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="no",
        # Gradients live where they are reduced, instead of in memory of their own too.
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )


def compile_blocks(model: LanguageModel, device: torch.device) -> None:
    """Have torch.compile compile the blocks of a model in which it may find something to fuse.

    Args:
        model: Changed in place; one graph serves all alike blocks.
        device: Where it will train. On a GPU, mixers that are one node of kernels stay as they are.
    """
    # Imported here: it brings the compiler.
    from torch._functorch import config

    # Graphs of torch 2.13, mostly those from its cache on disk, were seen to replay how outputs are
    # views with shapes of random numbers, or to crash. Without replay the views are the same.
    config.view_replay_for_aliased_outputs = False
    for block in model.blocks:
        if device.type != "cuda" or not block.mixer.one_node_on_gpu:
            block.compile()


class ParallelModel:
    """A model as it trains on this process, among the others.

    Attributes:
        model: Divided in place; its parameters are what the optimizer steps.
        call: What to call in training.
        layout: Which part of every parameter this process has; None when it has all.
    """

    def __init__(
        self,
        model: LanguageModel,
        mesh: Mesh,
        accelerator: Accelerator,
        *,
        dtype: torch.dtype = torch.float32,
        activation_checkpointing: bool = False,
        compile: bool = False,
    ) -> None:
        """Divide a model.

        The order matters: heads first (tensors), then each block's parameters over the processes
        with other tokens (FSDP2). Of these, what has to stay float32 (A_log, D, the Δ bias) is
        left whole, as FSDP would cast it with the rest; its gradients are averaged here.

        Args:
            model: Whole, with weights, on the CPU or the device.
            mesh: The processes.
            accelerator: Wraps the model where processes only replicate it.
            dtype: Of the matrix products; weights are gathered in it.
            activation_checkpointing: Keep each block's input alone and recompute in backward.
            compile: Compile blocks with torch.compile; see ``compile_blocks``.

        Raises:
            ConfigError: Heads, groups or vocabulary do not divide, or a mixer cannot be divided.
        """
        self.model, self._mesh, self._accelerator = model, mesh, accelerator
        self.layout: ModelLayout | None = None
        model.activation_checkpointing = activation_checkpointing
        if compile:
            compile_blocks(model, accelerator.device)
        if mesh.parameters is None:
            model.to(accelerator.device)
            self.call: nn.Module = accelerator.prepare_model(model)
            return
        for letter, block in zip(model.config.letters, model.blocks, strict=True):
            if mesh.context is not None and not block.mixer.supports_context:
                raise ConfigError(
                    "parallel.context",
                    mesh.context.size,
                    f"the mixer {block.mixer.type_name} (letter '{letter}') cannot; use 1.",
                )
        self.layout = ModelLayout(model, mesh)
        if mesh.tensor is not None:
            split_model(model, mesh.tensor, mesh.parameters["tensor"])
        model.context = mesh.context
        model.to(accelerator.device)
        if mesh.tokens is not None:
            self._shard(dtype)
        self.call = model

    def _shard(self, dtype: torch.dtype) -> None:
        """Divide parameters over processes with other tokens, one gather a block."""
        model, parameters = self.model, self._mesh.parameters
        assert parameters is not None
        policy = MixedPrecisionPolicy(
            param_dtype=None if dtype == torch.float32 else dtype,
            reduce_dtype=None if dtype == torch.float32 else torch.float32,
            cast_forward_inputs=False,  # the residual stream is float32
        )
        # It warns of changing a block's output in place, which nothing here does.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        for module in (*model.blocks, model):
            fully_shard(
                module,
                mesh=parameters["replicate", "shard"],
                mp_policy=policy,
                ignored_params=set(self._whole_parameters()),
                reshard_after_forward=False if self._mesh.keep_gathered else None,
            )
            register_fsdp_forward_method(module, "step")

    def _whole_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that FSDP leaves alone, in a fixed order."""
        kept = self.model.float32_parameters()
        return [p for name, p in self.model.named_parameters() if name in kept]

    @contextlib.contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Run a forward and backward pass; only the last of a step exchanges gradients."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)
            self.model.set_is_last_backward(last)
            self.model.set_reshard_after_backward(last or not self._mesh.keep_gathered)
            yield
        elif self._mesh.parameters is None and not last:
            with self._accelerator.no_sync(self.call):
                yield
        else:
            yield

    def reshard(self) -> None:
        """Leave no parameter gathered, as evaluation leaves some, or all with ``keep_gathered``."""
        for module in (*self.model.blocks, self.model):
            if isinstance(module, FSDPModule):
                module.reshard()

    def finish_gradients(self) -> None:
        """Average what FSDP does not, and add up what split sequences leave in parts."""
        tokens, tensor = self._mesh.tokens, self._mesh.tensor
        if tokens is not None:
            gradients = [to_local(p.grad) for p in self._whole_parameters() if p.grad is not None]
            all_reduce_together(gradients, tokens, mean=True)
        if tensor is not None and tensor.over_sequence:
            assert self.layout is not None
            parameters = dict(self.model.named_parameters())
            gradients = [parameters[name].grad for name in self.layout.replicated]
            all_reduce_together([to_local(g) for g in gradients if g is not None], tensor.group)

    def gradient_norm(self) -> Tensor:
        """Return the total norm of the gradients over all processes, on the device.

        Squares of what each process has are added up in one all-reduce, each divided by the number
        of processes that have the same.
        """
        by_copies: dict[int, list[Tensor]] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                copies = 1 if self.layout is None else self.layout.copies(name)
                by_copies.setdefault(copies, []).append(to_local(parameter.grad))
        if self.layout is None:
            return nn.utils.get_total_norm(by_copies.get(1, []))
        square = torch.zeros((), dtype=torch.float64, device=self._accelerator.device)
        for copies, gradients in by_copies.items():
            square += nn.utils.get_total_norm(gradients).double().square() / copies
        dist.all_reduce(square)
        return square.sqrt()


def all_reduce_together(
    tensors: list[Tensor], group: dist.ProcessGroup, *, mean: bool = False
) -> None:
    """Add (or average) tensors of one dtype over processes, in place, by one all-reduce."""
    if not tensors:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat, group=group)
    if mean:
        flat /= dist.get_world_size(group)
    parts = flat.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(  # pyright: ignore[reportPrivateImportUsage]
        tensors, [part.view_as(tensor) for tensor, part in zip(tensors, parts, strict=True)]
    )


def to_local(tensor: Tensor) -> Tensor:
    """Return what this process has of a tensor, sharing its storage."""
    if isinstance(tensor, DTensor):
        local = tensor._local_tensor  # to_local() would record a gradient
        assert not hasattr(local, "wait"), "a collective is still under way"
        return local
    return tensor
