"""The fused Mamba-2 node on two processes against separate operators on one.

    TRITON_INTERPRET=1 torchrun --nproc-per-node 2 -m tests.distributed.fused FILE

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

from mamba2lm.distributed import DistributedWeights, TensorGroup
from mamba2lm.layers import mamba2_fused
from mamba2lm.layers.mamba2 import Mamba2
from tests.layers.test_fused_mixers import build, draw, exact, tiny
from tests.ops.tolerances import relative_error

CASES = {
    "one group": ({"ngroups": 1, "headdim": 16, "d_state": 16}, False),
    "own groups, split sequences": ({"ngroups": 2, "headdim": 16, "d_state": 16}, True),
}
"""Fields of the mixer's config, and whether the sequence is split between layers."""


def compare(fields: dict[str, int], over_sequence: bool) -> dict[str, float]:
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
    for name, (fields, over_sequence) in CASES.items():
        errors = compare(fields, over_sequence)
        values = torch.tensor(list(errors.values()))
        dist.all_reduce(values, dist.ReduceOp.MAX)
        results[name] = dict(zip(errors, values.tolist(), strict=True))
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
