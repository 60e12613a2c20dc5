"""Attention against the definition, written out per query."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mamba2lm.layers.attention import Attention, rotary_angles
from mamba2lm.ops.documents import document_ordinals
from mamba2lm.ops.rotary.reference import rotary_reference
from tests.layers.cases import Case, inputs

SHAPES = {
    "multi-head": {"n_heads": 4},
    "grouped-query": {"n_heads": 4, "n_kv_heads": 2},
    "multi-query-window": {"n_heads": 4, "n_kv_heads": 1, "window": 4},
    "no-positions": {"n_heads": 2, "rope_fraction": 0.0},
    "part-rotated": {"n_heads": 2, "rope_fraction": 0.25},
}


def rotated(vector_p: Tensor, position: int, width: int, base: float) -> Tensor:
    """Rotate pairs (i, i + width/2) of a head as complex numbers."""
    half = width // 2
    turned = vector_p.clone()
    for i in range(half):
        angle = position * base ** (-2 * i / width)
        z = complex(vector_p[i], vector_p[i + half]) * complex(math.cos(angle), math.sin(angle))
        turned[i], turned[i + half] = z.real, z.imag
    return turned


def by_definition(mixer: Attention, x_ld: Tensor) -> Tensor:
    """Softmax attention, one query and head at a time."""
    config, p = mixer.config, mixer.head_dim
    weight = mixer.in_proj.weight
    q_lhp = (x_ld @ weight[: mixer.d_q].T).unflatten(-1, (-1, p))
    k_lkp = (x_ld @ weight[mixer.d_q : mixer.d_q + mixer.d_kv].T).unflatten(-1, (-1, p))
    v_lkp = (x_ld @ weight[mixer.d_q + mixer.d_kv :].T).unflatten(-1, (-1, p))
    outputs = []
    for t in range(x_ld.shape[0]):
        first = 0 if config.window is None else max(0, t - config.window + 1)
        heads = []
        for h in range(mixer.n_heads):
            k = h * mixer.n_kv_heads // mixer.n_heads
            query = rotated(q_lhp[t, h], t, mixer.rope_dim, config.rope_base)
            scores = torch.stack(
                [
                    query @ rotated(k_lkp[s, k], s, mixer.rope_dim, config.rope_base)
                    for s in range(first, t + 1)
                ]
            )
            share = (scores / math.sqrt(p)).softmax(0)
            heads.append(share @ v_lkp[first : t + 1, k])
        outputs.append(torch.cat(heads))
    return torch.stack(outputs) @ mixer.out_proj.weight.T


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@torch.no_grad()
def test_matches_the_definition(shape: dict[str, object]) -> None:
    mixer = Case("attention", shape).build()
    assert isinstance(mixer, Attention)
    x_bld = inputs(2, 9)
    y_bld, _ = mixer(x_bld)
    for row in range(2):
        torch.testing.assert_close(
            y_bld[row], by_definition(mixer, x_bld[row]), rtol=1e-10, atol=1e-10
        )


def test_rotation_keeps_relative_positions_far_from_the_origin() -> None:
    q_blhp, k_blhp = torch.randn(2, 1, 1, 3, 16, generator=torch.Generator().manual_seed(0))
    scores = []
    for shift in (0, 1_000_000):
        at = [rotary_angles(torch.tensor([[shift + p]]), 16, 10_000.0) for p in (11, 4)]
        scores.append((rotary_reference(q_blhp, *at[0]) * rotary_reference(k_blhp, *at[1])).sum(-1))
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-4, atol=1e-5)


def test_documents_are_numbered_where_the_id_changes() -> None:
    ids_bl = torch.tensor([[5, 5, 2, 5, 5], [1, 2, 2, 2, 1]])
    assert document_ordinals(ids_bl).tolist() == [[0, 0, 1, 2, 2], [0, 1, 1, 1, 2]]


@torch.no_grad()
def test_a_window_forgets_what_left_it() -> None:
    mixer = Case("attention", {"n_heads": 4, "window": 5}).build()
    x_bld, other_bld = inputs(1, 30), inputs(1, 30, seed=2)
    mixed_bld = torch.cat([other_bld[:, :10], x_bld[:, 10:]], dim=1)
    y_bld, mixed_y_bld = mixer(x_bld)[0], mixer(mixed_bld)[0]
    torch.testing.assert_close(mixed_y_bld[:, 14:], y_bld[:, 14:], rtol=1e-10, atol=1e-10)
    assert not torch.allclose(mixed_y_bld[:, 13], y_bld[:, 13])
    _, state = mixer(mixed_bld, mixer.new_state(1))
    _, whole = mixer(x_bld, mixer.new_state(1))
    assert state["k_bskp"].shape[1] == 5
    torch.testing.assert_close(state["k_bskp"], whole["k_bskp"], rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_a_growing_cache_doubles_and_keeps_its_tokens() -> None:
    mixer = Case("attention", {"n_heads": 4}).build()
    state, slots = mixer.new_state(1), set()
    x_bld = inputs(1, 700)
    for t in range(700):
        y_bd, state = mixer.step(x_bld[:, t], state)
        slots.add(state["k_bskp"].shape[1])
    assert len(slots) <= 4  # growing is rare
    torch.testing.assert_close(y_bd, mixer(x_bld)[0][:, -1], rtol=1e-10, atol=1e-10)
    assert state["length_b"].tolist() == [700]


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("fields", [{"n_kv_heads": 2}, {"window": 37}], ids=["grouped", "window"])
def test_flash_attention_by_document_equals_masked(fields: dict[str, int], packed: bool) -> None:
    mixer = Case("attention", {"n_heads": 4, "head_dim": 64, **fields}).build(torch.float32)
    assert isinstance(mixer, Attention)
    mixer = mixer.to("cuda")
    x_bld, dy_bld = (inputs(3, 300, dtype=torch.float32, seed=seed).cuda() for seed in (1, 2))
    generator = torch.Generator().manual_seed(0)
    seq_idx_bl = (torch.rand(3, 300, generator=generator) < 0.02).cumsum(dim=1).cuda()
    heads_blhp = x_bld.new_empty(1, 1, 4, 64, dtype=torch.bfloat16)
    by_document = packed or mixer.config.window is not None
    assert mixer._flashes(heads_blhp, seq_idx_bl if packed else None) == by_document
    found = []
    for masked in (False, True):
        if masked:
            mixer._flashes = lambda *_: False  # type: ignore[method-assign]
        leaf = x_bld.requires_grad_()
        with torch.autocast("cuda", torch.bfloat16):
            y_bld, _ = mixer(leaf, seq_idx_bl=seq_idx_bl if packed else None)
        leaves = [leaf, *mixer.parameters()]
        found.append([y_bld, *torch.autograd.grad(y_bld, leaves, dy_bld.to(y_bld.dtype))])
    for flash, plain in zip(*found, strict=True):
        assert (flash - plain).norm() <= 1e-2 * plain.norm()
