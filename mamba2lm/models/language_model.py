"""The whole model: embedding → blocks → norm → head.

Axes: b batch, l length, d model width, v vocabulary.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mamba2lm.distributed import ContextGroup, DistributedWeights, TensorGroup
from mamba2lm.distributed.context import Passage
from mamba2lm.layers import Mixer, RMSNorm, State, mixer_class
from mamba2lm.models.config import ModelConfig
from mamba2lm.models.state import ModelState
from mamba2lm.ops import Norm, linear_cross_entropy, linear_step


class LanguageModelOutput(NamedTuple):
    """What a forward pass returns; fields that were not asked for are None."""

    loss: Tensor | None = None
    """Mean negative log-likelihood of the labels, nats per token, float32."""
    logits: Tensor | None = None
    """(b, l, vocab_size), or (b, 1, vocab_size) with ``last_only``, float32."""
    state: ModelState | None = None


class Block(nn.Module):
    """One residual sub-layer: ``x + mixer(norm(x))``."""

    def __init__(self, mixer: Mixer, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = mixer
        self.weights: DistributedWeights | None = None
        """Set where the mixer's heads are shared with other processes."""

    def forward(
        self,
        x_bld: Tensor,
        added_bld: Tensor | None,
        state: State | None,
        seq_idx_bl: Tensor | None,
        tensor: TensorGroup | None = None,
        context: Passage | None = None,
    ) -> tuple[Tensor, Tensor, State | None]:
        """Return the residual stream, what the mixer adds to it, and the mixer's state.

        The sum is left to the next sub-layer, whose norm takes it in the same pass.

        Args:
            x_bld: (b, l, d); of split sequences this process's stretch.
            added_bld: What the sub-layer before adds to it; None: nothing.
            state: The mixer's, or None.
            seq_idx_bl: Document ids, or None.
            tensor: With whom heads are shared, and whether ``x_bld`` is split over them too.
            context: Where other processes have the rest of each sequence.
        """
        given = {} if context is None else {"context": context}
        if tensor is None:
            normed_bld, x_bld = self.norm.of_sum(x_bld, added_bld)
            y_bld, state = self.mixer(normed_bld, state, seq_idx_bl=seq_idx_bl, **given)
            return x_bld, y_bld, state
        assert self.weights is not None
        stored = self.weights.begin(tensor)
        try:
            normed_bld, x_bld = self.norm.of_sum(x_bld, added_bld)
            y_bld, state = self.mixer.forward_divided(
                normed_bld, tensor, state, seq_idx_bl=seq_idx_bl, **given
            )
        finally:
            self.weights.end(stored)
        return x_bld, y_bld, state

    def step(
        self, x_bd: Tensor, state: State, tensor: TensorGroup | None = None
    ) -> tuple[Tensor, State]:
        """Do the same for one token; may overwrite ``x_bd``."""
        if tensor is None:
            return self.mixer.step_block(x_bd, self.norm, state)
        assert self.weights is not None
        stored = self.weights.begin(tensor)
        try:
            y_bd, state = self.mixer.step(self.norm(x_bd), state)
        finally:
            self.weights.end(stored)
        return x_bd + tensor.leave(y_bd), state


class LanguageModel(nn.Module):
    """A stack of mixers that predicts the next token."""

    def __init__(self, config: ModelConfig) -> None:
        """Build the model with uninitialised weights; call ``init_weights`` or load some.

        Args:
            config: Checked with ``config.validate()``; ``vocab_size`` must be set.
        """
        super().__init__()
        config.validate()
        assert config.vocab_size is not None
        self.config = config
        self.vocab_size = config.vocab_size
        self.activation_checkpointing = False
        self.draws = False
        """Whether training draws random numbers within blocks: recomputation draws them again."""
        self.tensor: TensorGroup | None = None
        """Whom heads and vocabulary are shared with; set by ``models.sharding``."""
        self.weights: DistributedWeights | None = None
        """Then: of embedding, last norm and head."""
        self.context: ContextGroup | None = None
        """Whom the length of sequences is shared with; calls that pass a state ignore it."""

        self.embedding = nn.Embedding(config.padded_vocab_size, config.d_model)
        self.layers = nn.ModuleList()
        for letter in config.letters:
            cls = mixer_class(config.mixer_type(letter), f"model.mixers.{letter}.type")
            self.layers.append(Block(cls(config.mixer_config(letter), config.d_model), config))
        self.norm_f = RMSNorm(config.d_model, config.norm_eps)
        self.lm_head = nn.Linear(config.d_model, config.padded_vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embedding.weight

    @property
    def blocks(self) -> list[Block]:
        """The sub-layers, typed."""
        return list(self.layers)  # type: ignore[arg-type]

    def init_weights(self, seed: int = 0) -> None:
        """Initialise every weight in place, the same for the same seed on the same device kind.

        Embedding N(0, embedding_std²); mixers as they say; what writes to the residual stream is
        divided by sqrt(number of sub-layers) (Radford et al. 2019), as in the released Mambas.
        """
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            nn.init.normal_(self.embedding.weight, std=self.config.embedding_std)
            if not self.config.tie_embeddings:
                nn.init.normal_(self.lm_head.weight, std=self.config.embedding_std)
            # No gradient ever reaches the padded rows: zero now is zero for good.
            for weight in (self.embedding.weight, self.lm_head.weight):
                weight[self.vocab_size :] = 0
            for block in self.blocks:
                block.norm.init_weights()
                block.mixer.init_weights()
                block.mixer.residual_weight().div_(math.sqrt(len(self.layers)))
            self.norm_f.init_weights()

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        *,
        seq_idx: Tensor | None = None,
        state: ModelState | None = None,
        last_only: bool = False,
        positions: Tensor | None = None,
        loss_reduction: Literal["mean", "sum", "none"] = "mean",
    ) -> LanguageModelOutput:
        """Run a stretch of tokens through the model.

        Args:
            input_ids: (b, l) int64.
            labels: (b, l) int64, what to predict at each position (already shifted), −100 where
                nothing. When given, the loss is computed and the logits are not.
            seq_idx: (b, l) integers; the sequence restarts where the value changes.
            state: What came before (``new_state`` or one returned earlier); None when nothing did
                and no state is wanted back.
            last_only: Compute the logits of the last position only.
            positions: (b, k) int64; compute the head at these positions of each row only. Labels,
                loss and logits then have k positions.
            loss_reduction: "mean" or "sum" over labels, or "none" for one loss a position (b, l).
        """
        context = None
        if self.context is not None and state is None:
            context = self.context.passage(input_ids.shape[1], seq_idx)
        tensor = self.tensor
        if tensor is not None and input_ids.shape[1] % tensor.size:
            # Not in training, where the sum over parts is made later and elsewhere.
            assert not (tensor.over_sequence and torch.is_grad_enabled()), "length does not divide"
            tensor = tensor.whole()
        with self._computing(tensor):
            x_bld, added_bld = self._embed(input_ids, tensor), None
            states: list[State | None] = []
            for i, block in enumerate(self.blocks):
                mine = None if state is None else state.layers[i]
                if self.activation_checkpointing and self.training:
                    # One tensor is kept for a block, not two.
                    x_bld, added_bld = x_bld if added_bld is None else x_bld + added_bld, None
                    x_bld, added_bld, mine = checkpoint(  # type: ignore[misc]
                        block, x_bld, added_bld, mine, seq_idx, tensor, context,
                        use_reentrant=False, preserve_rng_state=self.draws,
                    )  # fmt: skip
                else:
                    x_bld, added_bld, mine = block(x_bld, added_bld, mine, seq_idx, tensor, context)
                states.append(mine)
            new_state = None if state is None else ModelState(states)  # type: ignore[arg-type]
            hidden_bld = self._last_hidden(x_bld, added_bld, tensor)
            if positions is not None:
                index_bkd = positions[..., None].expand(-1, -1, hidden_bld.shape[-1])
                hidden_bld = hidden_bld.gather(1, index_bkd)
            if labels is not None:
                loss = linear_cross_entropy(
                    hidden_bld,
                    self._head_weight,
                    labels,
                    vocab_size=self.vocab_size,
                    reduction=loss_reduction,
                    group=None if tensor is None else tensor.group,
                )
                return LanguageModelOutput(loss=loss, state=new_state)
            return LanguageModelOutput(
                logits=self._logits(hidden_bld[:, -1:] if last_only else hidden_bld, tensor),
                state=new_state,
            )

    def step(self, ids_b: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        """Run one token; may overwrite ``state`` (``clone`` it to keep it).

        Args:
            ids_b: (b,) int64.
            state: What came before.

        Returns:
            Logits of the next token (b, vocab_size) float32, and the state.
        """
        tensor = None if self.tensor is None else self.tensor.whole()
        with self._computing(tensor):
            x_bd = self._embed(ids_b, tensor)
            for i, block in enumerate(self.blocks):
                x_bd, state.layers[i] = block.step(x_bd, state.layers[i], tensor)
            if tensor is not None:
                return self._logits(self._last_hidden(x_bd, None, tensor), tensor), state
            logits_bv = linear_step(
                x_bd,
                self._head_weight,
                norm=Norm(self.norm_f.weight, self.norm_f.eps),
                out_dtype=torch.promote_types(self._head_weight.dtype, torch.float32),
            )
            return logits_bv[:, : self.vocab_size], state

    def new_state(
        self,
        batch: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        recurrent_dtype: torch.dtype | None = None,
    ) -> ModelState:
        """Return the state before any token.

        Args:
            batch: Number of rows.
            dtype: Of activations kept as they are; default that of the weights.
            device: Default: that of the weights.
            recurrent_dtype: Of what recurrences accumulate, e.g. bfloat16 to halve a step's
                traffic at some cost in accuracy; default float32 (float64 for float64 weights).
                A step keeps it, ``forward`` returns the default again.
        """
        layers = []
        for block in self.blocks:
            state = block.mixer.new_state(batch, dtype=dtype, device=device)
            if recurrent_dtype is not None:
                cast = {n: state[n].to(recurrent_dtype) for n in block.mixer.recurrent_tensors}
                state = state.replace(**cast)
            layers.append(state)
        return ModelState(layers)

    def reserve(self, state: ModelState, tokens: int) -> ModelState:
        """Return the state with room for rows of ``tokens`` tokens in the layers that grow."""
        return ModelState(
            [
                block.mixer.reserve(layer, tokens)
                for block, layer in zip(self.blocks, state.layers, strict=True)
            ]
        )

    @torch.inference_mode()
    def state_grows(self) -> bool:
        """Return whether the state takes more memory after a token than before."""
        state = self.new_state(1)
        before = state.nbytes
        ids_bl = torch.zeros(1, 1, dtype=torch.int64, device=self.embedding.weight.device)
        after = self.forward(ids_bl, state=state, last_only=True).state
        assert after is not None
        return after.nbytes > before

    @contextlib.contextmanager
    def _computing(self, tensor: TensorGroup | None) -> Iterator[None]:
        """Have tensors to compute with in embedding, last norm and head."""
        if tensor is None:
            yield
            return
        assert self.weights is not None
        stored = self.weights.begin(tensor)
        try:
            yield
        finally:
            self.weights.end(stored)

    @property
    def _head_weight(self) -> Tensor:
        tied = self.config.tie_embeddings
        return self.embedding.weight if tied else self.lm_head.weight

    def _embed(self, ids: Tensor, tensor: TensorGroup | None) -> Tensor:
        if tensor is None:
            x = self.embedding(ids)
        else:
            # Each process has the rows of a range of ids, and zeros for all others.
            rows = self.embedding.weight.shape[0]
            mine = ids - tensor.rank * rows
            elsewhere = (mine < 0) | (mine >= rows)
            x = F.embedding(mine.masked_fill(elsewhere, 0), self.embedding.weight)
            x = tensor.leave(x.masked_fill(elsewhere.unsqueeze(-1), 0.0))
        if self.config.residual_in_fp32:
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        return x

    def _last_hidden(self, x: Tensor, added: Tensor | None, tensor: TensorGroup | None) -> Tensor:
        hidden, _ = self.norm_f.of_sum(x, added)
        return hidden if tensor is None else tensor.enter(hidden)

    def _logits(self, hidden: Tensor, tensor: TensorGroup | None) -> Tensor:
        # Padded ids have no logit at all, so nothing can ever sample one. They take part in the
        # product: on a GPU one that 8 does not divide takes several times as long.
        logits = F.linear(hidden, self._head_weight)
        logits = (logits if tensor is None else tensor.join(logits))[..., : self.vocab_size]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def float32_parameters(self) -> set[str]:
        """Return the names of parameters never cast below float32 and never decayed."""
        return {
            f"layers.{i}.mixer.{name}"
            for i, block in enumerate(self.blocks)
            for name in block.mixer.float32_parameters
        }

    def cast(self, dtype: torch.dtype) -> LanguageModel:
        """Cast weights to ``dtype``, all but those that stay float32 (A_log, D, Δ bias)."""
        kept = self.float32_parameters() if dtype.itemsize < 4 else set()
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name not in kept:
                    parameter.data = parameter.data.to(dtype)
        return self

    def materialize(self, device: torch.device | str) -> LanguageModel:
        """Give a model built on the meta device real, uninitialised storage."""
        self.to_empty(device=device)
        if self.config.tie_embeddings:
            self.lm_head.weight = self.embedding.weight  # to_empty unties
        return self

    def parameter_count(self, *, embedding: bool = True) -> int:
        """Return the number of parameters, with a tied embedding counted once."""
        count = sum(p.numel() for p in self.parameters())
        return count if embedding else count - self.embedding.weight.numel()

    def flops_per_token(self, length: int) -> float:
        """Return forward FLOPs per token in sequences of ``length``; a multiply-add is two.

        The embedding look-up is free; the head counts with the padded vocabulary. Training costs
        three times this: the backward pass does two products for each one of the forward.
        """
        head = 2 * self.lm_head.weight.numel()
        return head + sum(block.mixer.flops_per_token(length) for block in self.blocks)

    def fingerprint(self) -> str:
        """Return a hash of the configuration and of the weights' values."""
        config = self.config.resolved()
        del config["embedding_std"]  # how training began; no exported layout keeps it
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        for name, parameter in self.named_parameters():
            digest.update(name.encode())
            data = parameter.detach().reshape(-1).contiguous().cpu()
            digest.update(data.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:32]
