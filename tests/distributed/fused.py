"""The fused Mamba-2 node on two processes against separate operators on one.

    TRITON_INTERPRET=1 torchrun --nproc-per-node 2 -m tests.distributed.fused FILE [--slow]

writes a JSON object: case → largest errors, relative to the largest value.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from mamba2lm.distributed import ContextGroup, DistributedWeights, TensorGroup
from mamba2lm.layers import mamba2_fused
from mamba2lm.layers.mamba2 import Mamba2
from tests.layers.test_fused_mixers import build, draw, exact, tiny
from tests.ops.tolerances import relative_error

FIELDS = {"headdim": 16, "d_state": 16}
CASES: dict[str, tuple[dict[str, int], dict[str, bool]]] = {
    "heads, one group": ({**FIELDS, "ngroups": 1}, {"heads": True}),
    "heads, own groups, split sequences": (
        {**FIELDS, "ngroups": 2},
        {"heads": True, "over_sequence": True},
    ),
    "stretches of one document": (FIELDS, {"stretches": True}),
    "stretches of several": (
        {**FIELDS, "ngroups": 2, "d_conv": 2},
        {"stretches": True, "packed": True},
    ),
    "stretches without convolution": ({**FIELDS, "d_conv": 1}, {"stretches": True}),
}
"""Fields of the mixer's config, and how it is divided."""
SLOW = {"stretches of one document", "stretches without convolution"}


def compare_stretches(fields: dict[str, int], packed: bool = False) -> dict[str, float]:
    """Give each process half of the sequence."""
    group = dist.group.WORLD
    assert group is not None
    context = ContextGroup(group, dist.get_rank(), dist.get_world_size())
    alone = build("mamba2", 16, **fields)
    assert isinstance(alone, Mamba2)
    x_bld, document_bl, dy_bld = draw(2, 36, 16)
    if packed:
        # In the first row a document ends within each stretch, in the second where they meet.
        document_bl = torch.zeros(2, 36, dtype=torch.int64)
        document_bl[0, 7:], document_bl[0, 25:], document_bl[1, 18:] = 1, 2, 1
    given = document_bl if packed else None
    expected = exact(alone, x_bld, given, dy_bld)
    mine = None if given is None else context.stretch(given)
    alone._fuses = lambda _: True  # type: ignore[method-assign]
    leaf = context.stretch(x_bld).clone().requires_grad_()
    y_bld, _ = alone(leaf, seq_idx_bl=mine, context=context.passage(18, mine))
    y_bld.backward(context.stretch(dy_bld))
    assert "_FusedMamba2" in type(y_bld.grad_fn).__name__
    assert leaf.grad is not None
    errors = {
        "y": relative_error(y_bld.detach(), context.stretch(expected["y"])),
        "dx": relative_error(leaf.grad, context.stretch(expected["dx"])),
    }
    for name, parameter in alone.named_parameters():
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad)
        errors[name] = relative_error(parameter.grad, expected[name])
    return errors


def compare_heads(fields: dict[str, int], over_sequence: bool = False) -> dict[str, float]:
    """Give each process half of the heads."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    tensor = TensorGroup(mesh.get_group(), mesh.get_local_rank(), mesh.size(), over_sequence)
    alone = build("mamba2", 16, **fields)
    assert isinstance(alone, Mamba2)
    x_bld, document_bl, dy_bld = draw(2, 18, 16)
    expected = exact(alone, x_bld, document_bl, dy_bld)
    shared = copy.deepcopy(alone)
    plan = shared.tensor_plan()
    assert plan is not None
    weights = DistributedWeights(shared, plan, tensor, mesh)
    shared.take_part(tensor)
    shared._fuses = lambda _: True  # type: ignore[method-assign]
    mine = slice(None)
    if over_sequence:
        mine = slice(9 * tensor.rank, 9 * tensor.rank + 9)
    leaf = x_bld[:, mine].clone().requires_grad_()
    stored = weights.begin(tensor)
    y_bld, _ = shared.forward_divided(leaf, tensor, seq_idx_bl=document_bl)
    weights.end(stored)
    y_bld.backward(dy_bld[:, mine])
    assert leaf.grad is not None
    errors = {
        "y": relative_error(y_bld.detach(), expected["y"][:, mine]),
        "dx": relative_error(leaf.grad, expected["dx"][:, mine]),
    }
    for name, parameter in shared.named_parameters():
        split = plan[name]
        rows = split.stored(tensor.rank, tensor.size)
        parts = [expected[name].narrow(split.dim, *r) for r in rows]
        found = parameter.grad.to_local()  # type: ignore[union-attr]
        errors[name] = relative_error(found, torch.cat(parts, dim=split.dim))
    return errors


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mamba2_fused.OVERLAPPED = 8  # so that products are made in two parts
    tiny()
    results = {}
    for name, (fields, how) in CASES.items():
        if name in SLOW and "--slow" not in sys.argv:
            continue
        divided = dict(how)
        compare = compare_heads if divided.pop("heads", False) else compare_stretches
        divided.pop("stretches", None)
        errors = compare(fields, **divided)
        values = torch.tensor(list(errors.values()))
        dist.all_reduce(values, dist.ReduceOp.MAX)
        results[name] = dict(zip(errors, values.tolist(), strict=True))
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
