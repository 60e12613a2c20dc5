"""What is decided without any process: degrees, who has which rows, what is on disk where."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mamba2lm.distributed import Degrees, ParallelConfig, Segment, Split
from mamba2lm.models import LanguageModel
from mamba2lm.models.checkpoint import StoredTensors, save_pieces
from mamba2lm.models.sharding import ModelLayout, tensor_layout
from mamba2lm.schema import ConfigError
from tests.models.small import small_config, small_model


def test_processes_left_over_replicate() -> None:
    config = ParallelConfig(tensor=2, context=2)
    assert config.degrees(8) == Degrees(data_replicate=2, data_shard=1, context=2, tensor=2)
    assert not ParallelConfig().degrees(4).sharded
    assert ParallelConfig(data_replicate=2, data_shard=3).degrees(6).processes == 6


@pytest.mark.parametrize(
    ("fields", "processes", "message"),
    [
        ({"tensor": 4}, 6, r"parallel\.tensor=4: tensor 4 × data_shard 1 × context 1 = 4 does not"),
        ({"context": 3, "data_shard": 2}, 3, r"parallel\.context=3: .* = 6 does not divide"),
        ({"data_shard": 2, "data_replicate": 2}, 8, r"data_replicate=2: .* is 4, but 8 were"),
        ({"tensor": 0}, 1, r"parallel\.tensor=0: must be ≥ 1"),
        ({"data_replicate": 0}, 1, r"parallel\.data_replicate=0: must be ≥ 1, or null"),
        ({"keep_gathered": True}, 1, r"keep_gathered=True: is about weights that"),
        ({"sequence_parallel": True}, 1, r"sequence_parallel=True: splits over parallel\.tensor"),
        ({"timeout": 0.0}, 1, r"parallel\.timeout=0\.0: must be positive"),
    ],
)
def test_degrees_that_cannot_be_are_named(
    fields: dict[str, Any], processes: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        ParallelConfig(**fields).degrees(processes)


@pytest.mark.parametrize(
    ("units", "heads", "size", "expected"),
    [
        (4, 8, 2, [[0, 1], [2, 3]]),
        (1, 8, 4, [[0], [0], [0], [0]]),
        (2, 8, 4, [[0], [0], [1], [1]]),
        (3, 6, 2, [[0, 0, 1], [1, 2, 2]]),
        (2, 12, 3, [[0, 0], [0, 1], [1, 1]]),  # runs of two heads
    ],
)
def test_each_head_finds_its_group(
    units: int, heads: int, size: int, expected: list[list[int]]
) -> None:
    segment = Segment(units, shared_by=heads)
    found = [segment.units_of(rank, size) for rank in range(size)]
    assert found == expected
    for rank, mine in enumerate(found):
        per_process = heads // size
        for head in range(per_process):
            unit = mine[head * len(mine) // per_process]
            assert unit == (rank * per_process + head) * units // heads


def test_what_is_stored_covers_each_row_once() -> None:
    split = Split((Segment(4, 3), Segment(1, 8, shared_by=4), Segment(4)))
    rows = [
        r
        for rank in range(4)
        for start, n in split.stored(rank, 4)
        for r in range(start, start + n)
    ]
    assert sorted(rows) == list(range(12 + 8 + 4))


@pytest.mark.parametrize("degrees", [(1, 2, 1, 2), (2, 3, 1, 1), (1, 1, 4, 1), (1, 1, 1, 4)])
def test_pieces_cover_each_parameter_once_and_survive_a_file(
    tmp_path: Path, degrees: tuple[int, int, int, int]
) -> None:
    model = small_model("MSAF")
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    shape = Degrees(*degrees)
    shards = shape.data_shard * shape.context
    for rank in range(shape.processes):
        mesh: Any = SimpleNamespace(
            degrees=shape,
            tensor=SimpleNamespace(rank=rank % shape.tensor, size=shape.tensor),
            shard_rank=rank // shape.tensor % shards,
            replicate_rank=rank // (shape.tensor * shards),
        )
        layout = ModelLayout(model, mesh)
        items = []
        for name, tensor in parameters.items():
            if layout.writes(name):
                for piece in layout.pieces(name):
                    part = tensor
                    for axis, (start, n) in enumerate(zip(piece.start, piece.shape, strict=True)):
                        part = part.narrow(axis, start, n)
                    items.append((name, piece, part))
        save_pieces(items, layout.shapes, tmp_path / "model" / f"{rank:05d}.safetensors")
    stored = StoredTensors(tmp_path, "model")
    assert stored.shapes == {name: tuple(t.shape) for name, t in parameters.items()}
    for name, tensor in parameters.items():
        assert torch.equal(stored.read(name), tensor), name  # raises where a piece is missing
        sizes = sum(torch.Size(lengths).numel() for *_, lengths in stored._pieces[name])
        assert sizes == tensor.numel(), f"{name} is written more than once"
    # Any box, across the pieces' boundaries.
    box = stored.read("layers.0.mixer.in_proj.weight", (3, 5), (40, 17))
    assert torch.equal(box, parameters["layers.0.mixer.in_proj.weight"][3:43, 5:22])
    (tmp_path / "model" / "00000.safetensors").unlink()
    damaged = StoredTensors(tmp_path, "model")
    with pytest.raises(ValueError, match=r"embedding\.weight is incomplete"):
        damaged.read("embedding.weight")


def test_what_does_not_divide_is_named() -> None:
    with torch.device("meta"):
        model = LanguageModel(small_config("MA"))
    with pytest.raises(
        ConfigError, match=r"parallel\.tensor=3: in_proj\.weight of letter 'M' has 4"
    ):
        tensor_layout(model, 3)
    with torch.device("meta"):
        model = LanguageModel(small_config("A", vocab_multiple=1, vocab_size=51))
    with pytest.raises(ConfigError, match=r"parallel\.tensor=2: the vocabulary .* has 51"):
        tensor_layout(model, 2)
