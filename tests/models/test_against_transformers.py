"""The same weights give what the models of the transformers library give, computed their way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

from mamba2lm.models import LanguageModel, ModelConfig
from tests.models.small import tokens


def pair(letter: str, **fields: Any) -> tuple[LanguageModel, torch.nn.Module]:
    """Return two models of one shape with our weights, every vector of them random."""
    config = ModelConfig(pattern=letter, n_layers=3, d_model=48, vocab_size=50, vocab_multiple=8)
    config.mixers[letter].update(fields)
    model = LanguageModel(config)
    model.init_weights(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.5 * torch.randn_like(parameter))
    shape = {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "vocab_size": 56,
        "state_size": fields["d_state"],
        "tie_word_embeddings": True,
    }
    if letter == "S":
        theirs: Any = MambaForCausalLM(MambaConfig(**shape))
    else:
        heads = 96 // fields["headdim"]
        theirs = Mamba2ForCausalLM(
            Mamba2Config(
                **shape,
                num_heads=heads,
                head_dim=fields["headdim"],
                n_groups=fields["ngroups"],
                chunk_size=16,
            )
        )
    weights = {
        f"backbone.{name.replace('embedding.weight', 'embeddings.weight')}": tensor
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected
    theirs.tie_weights()
    return model, theirs.eval()


@pytest.mark.parametrize(
    ("letter", "fields"),
    [
        ("S", {"d_state": 6}),
        ("M", {"d_state": 16, "headdim": 12, "ngroups": 1}),
        ("M", {"d_state": 16, "headdim": 12, "ngroups": 1, "chunk_size": 5}),
    ],
)
@pytest.mark.parametrize("length", [1, 40])
@torch.no_grad()
def test_logits_match(letter: str, fields: dict[str, Any], length: int) -> None:
    model, theirs = pair(letter, **fields)
    ids_bl = tokens(2, length)
    expected_blv = theirs(ids_bl).logits[..., :50].float()
    torch.testing.assert_close(model(ids_bl).logits, expected_blv, rtol=1e-3, atol=1e-4)
