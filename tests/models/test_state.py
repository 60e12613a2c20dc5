"""The state of a whole model can be kept, joined, divided and given back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mamba2lm.models import LanguageModel, ModelState
from mamba2lm.schema import ConfigError
from tests.models.small import PATTERNS, small_model, tokens

by_pattern = pytest.mark.parametrize("pattern", PATTERNS)


def after(model: LanguageModel, length: int, batch: int = 2, seed: int = 0) -> ModelState:
    """Return the state after random tokens."""
    ids_bl = tokens(batch, length, seed)
    with torch.no_grad():
        state = model(ids_bl, state=model.new_state(batch)).state
    assert state is not None
    return state


@torch.no_grad()
def continued(model: LanguageModel, state: ModelState, batch: int = 2) -> torch.Tensor:
    """Return what the model says after three more tokens, leaving the state alone."""
    state, logits = state.clone(), []
    for ids_b in tokens(batch, 3, seed=9).unbind(1):
        logits_bv, state = model.step(ids_b, state)
        logits.append(logits_bv)
    return torch.stack(logits)


@by_pattern
def test_a_saved_state_goes_on_as_before(pattern: str, tmp_path: Path) -> None:
    model = small_model(pattern)
    state, path = after(model, 11), tmp_path / "state.safetensors"
    state.save(path, fingerprint=model.fingerprint(), extra={"text": "ὄνομα\n"})
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    loaded, extra = model.new_state(1).load(path, fingerprint=model.fingerprint(), key="load_state")
    assert extra == {"text": "ὄνομα\n"}
    assert loaded.nbytes == state.nbytes
    assert torch.equal(continued(model, loaded), continued(model, state))


def test_saving_again_replaces_the_file(tmp_path: Path) -> None:
    model, path = small_model("MA"), tmp_path / "state.safetensors"
    for length in (4, 9):
        after(model, length).save(path, fingerprint="f")
    loaded, _ = model.new_state(1).load(path, fingerprint="f", key="load_state")
    assert torch.equal(continued(model, loaded), continued(model, after(model, 9)))


def test_a_state_of_another_model_is_refused(tmp_path: Path) -> None:
    model, path = small_model("MA", seed=0), tmp_path / "state.safetensors"
    after(model, 5).save(path, fingerprint=model.fingerprint())
    other = small_model("MA", seed=1)
    with pytest.raises(ConfigError, match=r"^load_state='.*': was saved from another model"):
        other.new_state(1).load(path, fingerprint=other.fingerprint(), key="load_state")


def test_files_that_are_no_states_are_refused(tmp_path: Path) -> None:
    model = small_model("MA")
    empty = model.new_state(1)
    with pytest.raises(ConfigError, match="no such file"):
        empty.load(tmp_path / "none", fingerprint="f", key="load_state")
    text = tmp_path / "text"
    text.write_text("It is a truth universally acknowledged")
    with pytest.raises(ConfigError, match="not a readable state file"):
        empty.load(text, fingerprint="f", key="load_state")
    path = tmp_path / "state"
    after(model, 5).save(path, fingerprint="f")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ConfigError, match="not a readable state file"):
        empty.load(path, fingerprint="f", key="load_state")


def test_a_state_that_does_not_fit_names_its_layer(tmp_path: Path) -> None:
    path = tmp_path / "state"
    after(small_model("MS"), 5).save(path, fingerprint="f")
    with pytest.raises(ConfigError, match="layer 1: state"):
        small_model("MM").new_state(1).load(path, fingerprint="f", key="load_state")
    with pytest.raises(ConfigError, match=r"layer 1: state has \['conv', 'ssm'\]"):
        small_model("MA").new_state(1).load(path, fingerprint="f", key="load_state")


@by_pattern
def test_rows_can_leave_and_join(pattern: str) -> None:
    model = small_model(pattern, dtype=torch.float64)
    a, b = after(model, 3, batch=2), after(model, 140, batch=1, seed=4)
    joined = ModelState.concat([b, a]).rows([2, 0])
    # Each row is fed its own tokens: the expected ones stand at the same place.
    first, second = a.rows([1, 1]), ModelState.concat([b, b])
    expected = torch.cat([continued(model, first)[:, :1], continued(model, second)[:, 1:]], dim=1)
    torch.testing.assert_close(continued(model, joined), expected, rtol=1e-9, atol=1e-9)


@by_pattern
def test_bytes_are_those_of_the_tensors(pattern: str) -> None:
    state = after(small_model(pattern), 7)
    tensors = [layer[name] for layer in state.layers for name in layer]
    assert state.nbytes == sum(t.numel() * t.element_size() for t in tensors)
    assert state.to("meta").nbytes == state.nbytes


def test_detaching_ends_the_history_and_keeps_the_values() -> None:
    model, ids_bl = small_model("MA"), tokens(2, 6)
    state = model(ids_bl, state=model.new_state(2)).state
    assert state is not None
    assert state.layers[0]["ssm"].requires_grad
    detached = state.detach()
    assert not any(layer[name].requires_grad for layer in detached.layers for name in layer)
    assert torch.equal(detached.layers[0]["ssm"], state.layers[0]["ssm"])
    # Truncated back-propagation: a second stretch goes back no further than its own tokens.
    model(tokens(2, 5, seed=3), tokens(2, 5, seed=4), state=detached).loss.backward()
    assert model.blocks[0].mixer.A_log.grad.abs().max() > 0  # type: ignore[union-attr]
