"""The whole model: head, vocabulary, precision, loss, recomputation, identity.

Axes: b batch, l length, d model width, v vocabulary.
"""

from __future__ import annotations

import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mamba2lm.models import LanguageModel, ModelConfig
from mamba2lm.schema import ConfigError
from mamba2lm.training.parallelize import compile_blocks
from tests.models.small import PATTERNS, small_config, small_model, tokens

by_pattern = pytest.mark.parametrize("pattern", PATTERNS)


@by_pattern
@torch.no_grad()
def test_steps_equal_the_full_forward(pattern: str) -> None:
    model, ids_bl = small_model(pattern, dtype=torch.float64), tokens(2, 21)
    whole_blv = model(ids_bl).logits
    output = model(ids_bl[:, :6], state=model.new_state(2))
    logits, state = [output.logits], output.state
    for ids_b in ids_bl[:, 6:].unbind(1):
        logits_bv, state = model.step(ids_b, state)
        logits.append(logits_bv[:, None])
    torch.testing.assert_close(torch.cat(logits, dim=1), whole_blv, rtol=1e-9, atol=1e-9)


@by_pattern
@torch.no_grad()
def test_packed_documents_equal_separate_ones(pattern: str) -> None:
    model, ids_bl = small_model(pattern, dtype=torch.float64), tokens(1, 15)
    seq_idx = torch.tensor([[3] * 4 + [1] * 6 + [3] * 5])
    packed_blv = model(ids_bl, seq_idx=seq_idx).logits
    apart_blv = torch.cat([model(part).logits for part in ids_bl.split([4, 6, 5], dim=1)], dim=1)
    torch.testing.assert_close(packed_blv, apart_blv, rtol=1e-9, atol=1e-9)


@by_pattern
def test_loss_is_the_cross_entropy_of_the_logits(pattern: str) -> None:
    model, ids_bl = small_model(pattern), tokens(3, 12)
    labels_bl = tokens(3, 12, seed=5)
    labels_bl[0, :7] = -100
    labels_bl[2] = -100
    with torch.no_grad():
        logits_blv = model(ids_bl).logits
    expected_bl = F.cross_entropy(logits_blv.transpose(1, 2), labels_bl, reduction="none")
    for reduction, expected in (
        ("mean", expected_bl.sum() / (labels_bl != -100).sum()),
        ("sum", expected_bl.sum()),
        ("none", expected_bl),
    ):
        output = model(ids_bl, labels_bl, loss_reduction=reduction)
        assert output.logits is None
        torch.testing.assert_close(output.loss.detach(), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_an_untrained_model_knows_nothing() -> None:
    model, ids_bl = small_model("MA"), tokens(4, 64)
    loss = model(ids_bl, tokens(4, 64, seed=9)).loss
    assert abs(float(loss) - math.log(model.vocab_size)) < 0.1


@torch.no_grad()
def test_last_only_is_the_last_position() -> None:
    model, ids_bl = small_model("MA"), tokens(2, 9)
    logits_b1v = model(ids_bl, last_only=True).logits
    assert logits_b1v.shape == (2, 1, model.vocab_size)
    torch.testing.assert_close(logits_b1v, model(ids_bl).logits[:, -1:])


def test_a_tied_head_is_the_embedding() -> None:
    tied, free = small_model("M"), small_model("M", tie_embeddings=False)
    assert tied.lm_head.weight is tied.embedding.weight
    assert free.lm_head.weight is not free.embedding.weight
    assert free.parameter_count() - tied.parameter_count() == tied.embedding.weight.numel()
    assert tied.parameter_count(embedding=False) == sum(
        p.numel() for n, p in tied.named_parameters() if n != "embedding.weight"
    )
    tied(tokens(1, 5), tokens(1, 5, seed=2)).loss.backward()
    gradient = tied.embedding.weight.grad
    assert gradient is not None
    # Ids that were never read have a gradient too: from the head.
    unread = torch.ones(tied.config.padded_vocab_size, dtype=torch.bool)
    unread[tokens(1, 5)] = False
    unread[tied.vocab_size :] = False
    assert (gradient[unread].abs().sum(1) > 0).all()


@pytest.mark.parametrize(
    ("vocab_size", "multiple", "rows"), [(50, 16, 64), (64, 16, 64), (51, 1, 51)]
)
def test_the_vocabulary_is_padded_and_the_padding_has_no_logits(
    vocab_size: int, multiple: int, rows: int
) -> None:
    model = small_model("M", vocab_size=vocab_size, vocab_multiple=multiple)
    assert model.embedding.weight.shape[0] == rows
    ids_bl = tokens(2, 7)
    with torch.no_grad():
        expected_blv = model(ids_bl).logits
        expected = model(ids_bl, ids_bl).loss
        model.embedding.weight[vocab_size:] = 1e4  # would win every argmax and blow up every loss
        assert model(ids_bl).logits.shape == (2, 7, vocab_size)
        assert torch.equal(model(ids_bl).logits, expected_blv)
        torch.testing.assert_close(model(ids_bl, ids_bl).loss, expected)
        step_bv, _ = model.step(ids_bl[:, 0], model.new_state(2))
        assert step_bv.shape == (2, vocab_size)


def residual_dtypes(model: LanguageModel) -> set[torch.dtype]:
    """Return the dtypes that enter and leave the blocks."""
    seen: set[torch.dtype] = set()

    def look(module: torch.nn.Module, arguments: tuple[Tensor, ...], output: tuple[Tensor]) -> None:
        seen.update((arguments[0].dtype, output[0].dtype))

    handles = [block.register_forward_hook(look) for block in model.blocks]
    with torch.no_grad():
        logits = model(tokens(1, 5)).logits
    for handle in handles:
        handle.remove()
    assert logits.dtype == torch.float32
    return seen


def test_the_residual_stream_is_float32_beside_bf16_weights() -> None:
    model = small_model("MSAF").cast(torch.bfloat16)
    assert residual_dtypes(model) == {torch.float32}
    inside: list[torch.dtype] = []
    for block in model.blocks:
        block.mixer.register_forward_pre_hook(lambda m, a: inside.append(a[0].dtype))
    with torch.no_grad():
        model(tokens(1, 5))
    assert inside == [torch.bfloat16] * 4
    model = small_model("MSAF", residual_in_fp32=False).cast(torch.bfloat16)
    assert residual_dtypes(model) == {torch.bfloat16}


@torch.no_grad()
def test_under_autocast_the_stream_is_the_float32_sum_of_what_mixers_add() -> None:
    model, ids_bl = small_model("MSAF"), tokens(2, 9)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(ids_bl).logits
        x_bld = model.embedding(ids_bl)
        for block in model.blocks:
            y_bld, _ = block.mixer(block.norm(x_bld))
            assert y_bld.dtype == torch.bfloat16
            x_bld = x_bld + y_bld
            assert x_bld.dtype == torch.float32
        expected = F.linear(model.norm_f(x_bld), model.embedding.weight)[..., : model.vocab_size]
    assert torch.equal(found, expected.float())


def test_cast_keeps_what_must_stay_float32() -> None:
    model = small_model("MSAF")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.cast(torch.bfloat16)
    kept = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    mamba = {"layers.0.mixer.A_log", "layers.0.mixer.D", "layers.0.mixer.dt_bias"}
    mamba1 = {"layers.1.mixer.A_log", "layers.1.mixer.D", "layers.1.mixer.dt_proj.bias"}
    assert kept == mamba | mamba1 == model.float32_parameters()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name].to(parameter.dtype)), name
    assert model.lm_head.weight is model.embedding.weight
    model.cast(torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}


@torch.no_grad()
def test_bf16_weights_stay_close_to_float32() -> None:
    model, reference, ids_bl = small_model("MSAF"), small_model("MSAF"), tokens(2, 30)
    model.cast(torch.bfloat16)
    expected_blv, logits_blv = reference(ids_bl).logits, model(ids_bl).logits
    assert (logits_blv - expected_blv).abs().max() < 0.05 * expected_blv.abs().max()


@by_pattern
def test_activation_checkpointing_gives_identical_gradients(pattern: str) -> None:
    gradients, kept = [], []
    for on in (False, True):
        model = small_model(pattern)
        model.activation_checkpointing = on
        seq_idx = torch.tensor([[0] * 10 + [1] * 13] * 2)
        saved: list[int] = []

        def record(tensor: Tensor, saved: list[int] = saved) -> Tensor:
            saved.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
            loss = model(tokens(2, 23), tokens(2, 23, seed=2), seq_idx=seq_idx).loss
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
        kept.append(sum(saved))
    assert kept[1] < kept[0] / 2
    for without, with_checkpointing in zip(*gradients, strict=True):
        assert without is not None
        assert torch.equal(without, with_checkpointing)


def test_every_parameter_learns() -> None:
    model = small_model("MSAF")
    model(tokens(2, 20), tokens(2, 20, seed=2)).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_a_few_steps_memorise_a_sequence() -> None:
    model, ids_bl = small_model("MAF"), tokens(1, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model(ids_bl[:, :-1], ids_bl[:, 1:]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


def test_flops_are_those_of_the_mixers_and_the_head() -> None:
    model = small_model("MSAF")
    head = 2 * model.config.padded_vocab_size * model.config.d_model
    mixers = sum(block.mixer.flops_per_token(100) for block in model.blocks)
    assert model.flops_per_token(100) == pytest.approx(head + mixers)
    assert model.flops_per_token(1000) > model.flops_per_token(100)  # attention


def test_fingerprint_follows_weights_and_configuration() -> None:
    fingerprints = [small_model("MA", seed=0).fingerprint()]
    assert small_model("MA", seed=0).fingerprint() == fingerprints[0]
    fingerprints.append(small_model("MA", seed=1).fingerprint())
    fingerprints.append(small_model("MA", seed=0, norm_eps=1e-6).fingerprint())
    model = small_model("MA", seed=0)
    with torch.no_grad():
        model.blocks[1].norm.weight[3] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    fingerprints.append(model.fingerprint())
    fingerprints.append(small_model("MA", seed=0).cast(torch.bfloat16).fingerprint())
    assert len(set(fingerprints)) == 5
    model = LanguageModel(small_config("MA", embedding_std=0.1))
    model.load_state_dict(small_model("MA", seed=0).state_dict())
    assert model.fingerprint() == fingerprints[0]  # not what the weights began from


def test_the_embedding_begins_as_wide_as_asked() -> None:
    narrow, wide = (small_model("M", seed=0, embedding_std=std) for std in (0.02, 0.1))
    assert torch.allclose(wide.embedding.weight, 5 * narrow.embedding.weight)
    weights = [dict(model.named_parameters()) for model in (narrow, wide)]
    others = [name for name in weights[0] if name != "embedding.weight"]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in others)
    with pytest.raises(ConfigError, match=r"^model\.embedding_std=0: must be > 0"):
        small_config("M", embedding_std=0)


def test_meta_model_takes_storage_and_weights() -> None:
    original = small_model("MSAF")
    with torch.device("meta"):
        model = LanguageModel(small_config("MSAF"))
    assert all(p.is_meta for p in model.parameters())
    assert model.parameter_count() == original.parameter_count()
    model.materialize("cpu")
    assert model.lm_head.weight is model.embedding.weight
    model.load_state_dict(original.state_dict())
    with torch.no_grad():
        assert torch.equal(model(tokens(1, 9)).logits, original(tokens(1, 9)).logits)
    model.init_weights(3)
    assert model.fingerprint() == small_model("MSAF", seed=3).fingerprint()


def test_hybrid_state_bytes_grow_by_attention_only() -> None:
    for pattern, grows in (("MS", False), ("MSA", True)):
        model = small_model(pattern)
        with torch.no_grad():
            sizes = {
                length: model(tokens(1, length), state=model.new_state(1)).state.nbytes
                for length in (10, 400)
            }
        assert (sizes[400] > sizes[10]) is grows


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_compute_the_same() -> None:
    ids_bl, labels_bl = tokens(2, 40), tokens(2, 40, seed=2)
    results = []
    for compiled in (False, True):
        model = small_model("MA")
        if compiled:
            compile_blocks(model, torch.device("cpu"))
        loss = model(ids_bl, labels_bl, seq_idx=torch.tensor([[0] * 25 + [1] * 15] * 2)).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-3, atol=1e-5)


def test_the_vocabulary_must_be_known() -> None:
    with pytest.raises(AssertionError):
        LanguageModel(ModelConfig(pattern="M", d_model=64))
