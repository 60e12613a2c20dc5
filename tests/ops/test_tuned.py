"""Launch configurations by class of shapes, and how tuning puts one together."""

from __future__ import annotations

import json
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from benchmarks.ops import best_config, candidates, tuning_work
from mamba2lm.ops.ssd.launch import Blocks, Config
from mamba2lm.ops.tuned import Tuned


@dataclass(frozen=True)
class Sizes:
    rows: int = 1


@dataclass(frozen=True, eq=False)
class Choice:
    chunk: int = 64
    first: Sizes = field(default_factory=Sizes)
    second: Sizes | None = None


@pytest.fixture
def tuned(tmp_path: Path) -> Tuned[Choice]:
    files = {
        "sm90": [
            {"when": {"n": [1, 16], "bits": [32, 32]}, "use": {"chunk": 32}},
            {"when": {"n": [1, 16]}, "use": {"first": {"rows": 4}, "second": {"rows": 2}}},
            {"when": {}, "use": {"second": None}},
        ],
        "default": [{"when": {}, "use": {"chunk": 16}}],
    }
    for name, entries in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(entries))
    return Tuned(tmp_path, Choice, Sizes)


def test_the_first_entry_whose_bounds_hold_is_taken(tuned: Tuned[Choice]) -> None:
    assert tuned.choose(9, n=16, bits=32).chunk == 32
    found = tuned.choose(9, n=16, bits=16)
    assert (found.chunk, found.first, found.second) == (64, Sizes(4), Sizes(2))
    assert tuned.choose(9, n=17, bits=32).second is None
    assert tuned.choose(8, n=16, bits=32).chunk == 16


def test_one_entry_is_one_object(tuned: Tuned[Choice]) -> None:
    """Launch keys compare configurations by identity."""
    assert tuned.choose(9, n=1, bits=16) is tuned.choose(9, n=2, bits=16)


def entry(ms: float, chunk: int, *, ok: bool = True) -> dict[str, Any]:
    return {"ms": ms, "chunk": chunk, "ok": ok, "blocks": {"warps": round(ms * 100)}}


def test_the_faster_forward_schedule_is_chosen() -> None:
    chunked = {
        "states": [entry(0.2, 128), entry(0.3, 64)],
        "scan": [entry(0.40, 64), entry(0.45, 128)],
    }
    fused = {"fused": [entry(0.5, 64, ok=False), entry(0.6, 64)]}
    assert best_config(chunked | fused, Config()) == {
        "fused": {"warps": 60}, "forward_chunk": 64,
    }  # fmt: skip
    slow = {"fused": [entry(0.7, 64)]}
    assert best_config(chunked | slow, Config()) == {
        "fused": None, "forward_chunk": 128, "states": {"warps": 20}, "scan": {"warps": 45},
    }  # fmt: skip


def test_kernels_tuned_without_their_companions_keep_the_chunk() -> None:
    found = {"states_backward": [entry(0.5, 128), entry(0.8, 64)]}
    assert best_config(found, Config(chunk=64)) == {
        "chunk": 64, "states_backward": {"warps": 80},
    }  # fmt: skip
    wrong = {"states_backward": [entry(0.5, 64, ok=False)]}
    assert best_config(wrong, Config(chunk=64)) == {}


def test_candidates_change_one_kernel_and_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "torch.cuda.get_device_properties", lambda *_: types.SimpleNamespace(major=9, minor=0)
    )
    work = tuning_work(["S*"], ["fused", "states_backward"])
    assert [each.kernel_name for each in work] == ["fused", "states_backward"]
    for each in work:
        assert {config.chunk for config in each.tried} == {each.base.chunk}
        assert {config.through for config in each.tried} == {each.base.through}
    both = candidates("states_backward", work[0].shape, work[0].base)
    assert {config.chunk for config in both} == {64, 128}
    assert all(config.through == Blocks(8, 2, n=64) for config in both if config.chunk == 128)
