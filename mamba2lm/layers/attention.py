"""Causal attention, letter ``A``: grouped-query, rotary or without positions, optional window.

Axes: b batch, l new tokens, s cache slots, h query heads, k key-value heads, p head dim.

A cache is a ring of ``s`` slots: the token at absolute position ``t`` lives in slot ``t mod s``.
Without a window the ring is grown before it wraps; with one it holds ``window`` slots for ever.
Keys are stored rotated to their absolute position, so slot order never matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba2lm import ops
from mamba2lm.distributed import Plan, Segment, Split, TensorGroup
from mamba2lm.distributed.context import Passage
from mamba2lm.layers.linear import project
from mamba2lm.layers.mixer import Mixer, MixerConfig, output_and_state, register, require
from mamba2lm.layers.state import State
from mamba2lm.ops.dispatch import note_taken
from mamba2lm.ops.documents import document_bounds, document_ordinals
from mamba2lm.ops.kernels import compute_capability

_GROWTH = 128  # slots; a full cache at least doubles


@dataclass
class AttentionConfig(MixerConfig):
    """Shape of an attention mixer."""

    n_heads: int | None = None
    """Query heads; default d_model / head_dim."""
    n_kv_heads: int | None = None
    """Key-value heads, each shared by n_heads / n_kv_heads query heads; default n_heads."""
    head_dim: int | None = None
    """Width of a head; default d_model / n_heads, or 64 when neither is given."""
    rope_fraction: float = 1.0
    """Share of each head that is rotated; 0 means no positions (NoPE)."""
    rope_base: float = 10_000.0
    window: int | None = None
    """A token sees itself and the window − 1 tokens before it; null means all."""
    d_conv: int = 0
    """Width of a causal convolution over q, k and v (the released Mamba-2 hybrid has 4)."""
    bias: bool = False

    def shape(self, d_model: int) -> tuple[int, int, int]:
        """Return (query heads, key-value heads, head dim) for a model width."""
        head_dim = self.head_dim or (d_model // self.n_heads if self.n_heads else 64)
        n_heads = self.n_heads or max(d_model // head_dim, 1)
        return n_heads, self.n_kv_heads or n_heads, head_dim

    def validate(self, d_model: int, key: str) -> None:
        for name in ("n_heads", "n_kv_heads", "head_dim", "window"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{key}.{name}", value, "must be ≥ 1, or null.")
        if self.head_dim is None and self.n_heads is not None:
            require(
                d_model % self.n_heads == 0,
                f"{key}.n_heads",
                self.n_heads,
                f"must divide model.d_model={d_model} unless {key}.head_dim is given.",
            )
        if self.n_heads is None:
            require(
                d_model % (self.head_dim or 64) == 0,
                f"{key}.head_dim",
                self.head_dim or 64,
                f"must divide model.d_model={d_model} unless {key}.n_heads is given.",
            )
        n_heads, n_kv_heads, head_dim = self.shape(d_model)
        require(
            n_heads % n_kv_heads == 0,
            f"{key}.n_kv_heads",
            n_kv_heads,
            f"must divide the number of query heads, {n_heads}.",
        )
        require(
            0 <= self.rope_fraction <= 1 and int(head_dim * self.rope_fraction) % 2 == 0,
            f"{key}.rope_fraction",
            self.rope_fraction,
            f"must be in [0, 1] and rotate an even number of the head's {head_dim} channels.",
        )
        require(self.d_conv in (0, 2, 3, 4), f"{key}.d_conv", self.d_conv, "must be 0, 2, 3 or 4.")


class KVCache(State):
    """Rotated keys and values of a row's tokens in ring slots.

    Tensors: ``k_bskp``, ``v_bskp``; ``length_b`` tokens seen; ``start_b`` position of the first
    token that may still be attended to (the current document's); ``conv`` where there is one.
    """

    @property
    def slots(self) -> int:
        """Slots per row."""
        return self["k_bskp"].shape[1]

    @property
    def tokens(self) -> int:
        return int(self["length_b"].max())

    def positions_bs(self) -> Tensor:
        """Return the absolute position in each slot; those below ``start_b`` are not valid."""
        last_b1 = self["length_b"][:, None] - 1
        slot_s = torch.arange(self.slots, device=last_b1.device)
        return last_b1 - (last_b1 - slot_s) % self.slots

    def visible_bs(self) -> Tensor:
        """Return which slots hold a token that may be attended to."""
        return self.positions_bs() >= self["start_b"][:, None]

    def with_slots(self, slots: int) -> Self:
        """Return the cache with at least ``slots`` slots (only for rings that have not wrapped)."""
        grow = slots - self.slots
        if grow <= 0:
            return self
        pad = (0, 0, 0, 0, 0, grow)
        return self.replace(k_bskp=F.pad(self["k_bskp"], pad), v_bskp=F.pad(self["v_bskp"], pad))

    def row(self, index: int, tokens: int) -> KVCache:
        view = self._sliced(tokens)
        return KVCache(**{name: tensor[index : index + 1].clone() for name, tensor in view.items()})

    def put(self, index: int, row: State) -> None:
        # Where the numbers of slots differ, neither ring has wrapped and tokens keep their slots.
        slots = min(self.slots, row["k_bskp"].shape[1])
        for name, tensor in self.tensors.items():
            if name in ("k_bskp", "v_bskp"):
                tensor[index, :slots].copy_(row[name][0, :slots])
                tensor[index, slots:].zero_()  # a masked value counts 0 times, but 0 · NaN is NaN
            else:
                tensor[index].copy_(row[name][0])

    def first(self, rows: int, tokens: int) -> FixedKVCache:
        view = self._sliced(tokens)
        return FixedKVCache(**{name: tensor[:rows] for name, tensor in view.items()})

    def _sliced(self, tokens: int) -> dict[str, Tensor]:
        """Return views of the slots that rows of at most ``tokens`` tokens use."""
        return {
            name: tensor[:, :tokens] if name in ("k_bskp", "v_bskp") else tensor
            for name, tensor in self.tensors.items()
        }

    @classmethod
    def concat(cls, states: Sequence[Self]) -> Self:  # type: ignore[override]
        # Windowed caches all have `window` slots; the others have not wrapped and may grow.
        slots = max(state.slots for state in states)
        return super().concat([state.with_slots(slots) for state in states])

    def _fits(self, name: str, mine: Tensor, theirs: Tensor) -> bool:
        if name in ("k_bskp", "v_bskp"):
            return mine.shape[2:] == theirs.shape[2:]
        return super()._fits(name, mine, theirs)


class FixedKVCache(KVCache):
    """A view of a cache whose owner has made room for the tokens to come: a step never grows it.

    Rows that nobody uses any more go round in their ring, whatever they have counted.
    """


@register("attention", letter="A")
class Attention(Mixer):
    """Causal multi-head attention through torch's scaled_dot_product_attention."""

    config_class = AttentionConfig
    constant_state = False
    supports_context = True

    def __init__(self, config: AttentionConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.d_model = d_model
        self.n_heads, self.n_kv_heads, self.head_dim = config.shape(d_model)
        self.rope_dim = int(self.head_dim * config.rope_fraction)
        self.d_q, self.d_kv = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        self.d_qkv = d_qkv = self.d_q + 2 * self.d_kv

        self.in_proj = nn.Linear(d_model, d_qkv, bias=config.bias)  # rows [q, k, v]
        self.conv1d = (
            nn.Conv1d(d_qkv, d_qkv, config.d_conv, groups=d_qkv) if config.d_conv else None
        )
        self.out_proj = nn.Linear(self.d_q, d_model, bias=config.bias)

    def init_weights(self) -> None:
        self.in_proj.reset_parameters()
        if self.conv1d is not None:
            self.conv1d.reset_parameters()
        self.out_proj.reset_parameters()

    def forward(
        self,
        x_bld: Tensor,
        state: State | None = None,
        *,
        seq_idx_bl: Tensor | None = None,
        context: Passage | None = None,
    ) -> tuple[Tensor, State | None]:
        if context is not None:
            return self._forward_stretch(x_bld, seq_idx_bl, context), None
        assert state is None or isinstance(state, KVCache)
        batch, length, _ = x_bld.shape
        document_bl = None if seq_idx_bl is None else document_ordinals(seq_idx_bl)
        qkv_blc, conv_state = project(self.in_proj, x_bld), None
        if self.conv1d is not None:
            conv = ops.causal_conv1d(
                qkv_blc,
                self.conv1d.weight.squeeze(1),
                self.conv1d.bias,
                initial_states=None if state is None else state["conv"],
                seq_idx=seq_idx_bl,
                return_final_states=state is not None,
            )
            qkv_blc, conv_state = output_and_state(conv)

        new_l = torch.arange(length, device=x_bld.device)
        position_bl = new_l[None] if state is None else state["length_b"][:, None] + new_l
        q_blhp, k_blkp, v_blkp = self._heads(qkv_blc, position_bl)
        if state is None:
            if self._flashes(q_blhp, document_bl):
                note_taken("attention", "flash by document")
                y_blhp = self._attend_documents(q_blhp, k_blkp, v_blkp, seq_idx_bl)
            else:
                mask = self._mask(new_l[None], new_l[None], document_bl)
                y_blhp = self._attend(q_blhp, k_blkp, v_blkp, mask)
            return project(self.out_proj, y_blhp.reshape(batch, length, self.d_q)), None

        # Past slots first, then the new tokens; the past belongs to document number 0.
        past_bs = state.positions_bs().masked_fill(~state.visible_bs(), -(2**40))
        key_bt = torch.cat([past_bs, position_bl], dim=1)
        mask = self._mask(position_bl, key_bt, document_bl, past=state.slots)
        y_blhp = self._attend(
            q_blhp,
            torch.cat([state["k_bskp"].to(k_blkp.dtype), k_blkp], dim=1),
            torch.cat([state["v_bskp"].to(v_blkp.dtype), v_blkp], dim=1),
            mask,
        )
        out_bld = self.out_proj(y_blhp.reshape(batch, length, self.d_q))
        return out_bld, self._append(state, k_blkp, v_blkp, document_bl, conv_state)

    def _forward_stretch(
        self, x_bld: Tensor, seq_idx_bl: Tensor | None, context: Passage
    ) -> Tensor:
        """Run this process's stretch of longer sequences, with the keys and values of all."""
        batch, length, _ = x_bld.shape
        qkv_blc = project(self.in_proj, x_bld)
        if self.conv1d is not None:
            qkv_blc = ops.causal_conv1d(
                qkv_blc,
                self.conv1d.weight.squeeze(1),
                self.conv1d.bias,
                initial_states=context.inputs_before(qkv_blc, self.config.d_conv - 1),
                seq_idx=seq_idx_bl,
            )
        query_l = torch.arange(context.offset, context.offset + length, device=x_bld.device)
        q_blhp, k_blkp, v_blkp = self._heads(qkv_blc, query_l[None])
        k_btkp, v_btkp = context.gather(k_blkp, v_blkp)
        # Nobody looks ahead of this process's last token.
        seen = context.offset + length
        k_btkp, v_btkp = k_btkp[:, :seen], v_btkp[:, :seen]
        if context.document_bt is None and self.config.window is None:
            # Imported here: it brings torch's compiler, a second of every program's start.
            from torch.nn.attention.bias import causal_lower_right

            mask = causal_lower_right(length, seen)
        else:
            key_t = torch.arange(seen, device=x_bld.device)
            distance_lt = query_l[:, None] - key_t
            mask = (distance_lt >= 0)[None]
            if self.config.window is not None:
                mask = mask & (distance_lt < self.config.window)
            if context.document_bt is not None:
                key_bt = context.document_bt[:, :seen]
                mask = mask & (key_bt[:, context.offset :, None] == key_bt[:, None])
            mask = mask[:, None]
        y_blhp = self._attend(q_blhp, k_btkp, v_btkp, mask)
        return project(self.out_proj, y_blhp.reshape(batch, length, self.d_q))

    def step(self, x_bd: Tensor, state: State) -> tuple[Tensor, State]:
        assert isinstance(state, KVCache)
        qkv_bc = self.in_proj(x_bd)
        if self.conv1d is not None:
            qkv_bc, conv_state = ops.causal_conv1d_update(
                qkv_bc, state["conv"], self.conv1d.weight.squeeze(1), self.conv1d.bias
            )
            state["conv"].copy_(conv_state)
        length_b = state["length_b"]
        q_b1hp, k_b1kp, v_b1kp = self._heads(qkv_bc[:, None], length_b[:, None])
        state = self._make_room(state, 1)
        row_b = torch.arange(x_bd.shape[0], device=x_bd.device)
        slot_b = length_b % state.slots
        state["k_bskp"][row_b, slot_b] = k_b1kp[:, 0].to(state["k_bskp"].dtype)
        state["v_bskp"][row_b, slot_b] = v_b1kp[:, 0].to(state["v_bskp"].dtype)
        length_b += 1
        y_b1hp = self._attend(
            q_b1hp,
            state["k_bskp"].to(q_b1hp.dtype),
            state["v_bskp"].to(q_b1hp.dtype),
            state.visible_bs()[:, None, None, :],
        )
        return self.out_proj(y_b1hp.reshape(-1, self.d_q)), state

    def _heads(self, qkv_blc: Tensor, position_bl: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.n_heads, self.n_kv_heads
        if self.rope_dim:
            cos, sin = rotary_angles(position_bl, self.rope_dim, self.config.rope_base)
            return ops.rotary_heads(qkv_blc, cos, sin, n_heads=heads[0], n_kv_heads=heads[1])
        qkv_blhp = qkv_blc.unflatten(-1, (-1, self.head_dim))
        q_blhp, k_blkp, v_blkp = qkv_blhp.split([heads[0], heads[1], heads[1]], dim=2)
        return q_blhp, k_blkp, v_blkp

    def _mask(
        self, query_bl: Tensor, key_bt: Tensor, document_bl: Tensor | None, past: int = 0
    ) -> Tensor | None:
        """Return which keys each query sees, (b, 1, l, t); None means plain causal, no past."""
        if document_bl is None and self.config.window is None and past == 0:
            return None
        distance_blt = query_bl[:, :, None] - key_bt[:, None, :]
        mask_blt = (distance_blt >= 0) & (key_bt[:, None, :] >= 0)
        if self.config.window is not None:
            mask_blt = mask_blt & (distance_blt < self.config.window)
        if document_bl is not None:
            key_document_bt = F.pad(document_bl, (past, 0))
            mask_blt = mask_blt & (document_bl[:, :, None] == key_document_bt[:, None, :])
        return mask_blt[:, None]

    def _attend(
        self, q_blhp: Tensor, k_btkp: Tensor, v_btkp: Tensor, mask: Tensor | None
    ) -> Tensor:
        note_taken(
            "attention", "scaled_dot_product_attention" + ("" if mask is None else " masked")
        )
        y_bhlp = F.scaled_dot_product_attention(
            q_blhp.transpose(1, 2),
            k_btkp.transpose(1, 2),
            v_btkp.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=self.n_kv_heads != self.n_heads,
        )
        return y_bhlp.transpose(1, 2)

    def _flashes(self, q_blhp: Tensor, document_bl: Tensor | None) -> bool:
        """Return whether documents or a window are better parted by flash attention than masked.

        Without either, scaled_dot_product_attention takes flash attention by itself.
        """
        return (
            (document_bl is not None or self.config.window is not None)
            and q_blhp.is_cuda
            and q_blhp.dtype in (torch.bfloat16, torch.float16)
            and self.head_dim % 8 == 0
            and self.head_dim <= 256
            and compute_capability(q_blhp.device) >= 8
        )

    # How many documents there are only the device knows, which parts a compiled graph in any case;
    # out of it, layers share the answer.
    @torch.compiler.disable()
    def _attend_documents(
        self, q_blhp: Tensor, k_blkp: Tensor, v_blkp: Tensor, seq_idx_bl: Tensor | None
    ) -> Tensor:
        """Attend within each document, every one a sequence of its own: no mask, no work across."""
        batch, length = q_blhp.shape[:2]
        if seq_idx_bl is None:
            bounds = torch.arange(batch + 1, device=q_blhp.device, dtype=torch.int32) * length
        else:
            bounds = document_bounds(document_ordinals(seq_idx_bl))
        shared = self.n_heads // self.n_kv_heads
        if shared > 1:
            k_blkp, v_blkp = (x.repeat_interleave(shared, dim=2) for x in (k_blkp, v_blkp))
        # As above.
        from torch.nn.attention.varlen import varlen_attn

        y_thp = varlen_attn(
            *(x.flatten(0, 1) for x in (q_blhp, k_blkp, v_blkp)),
            cu_seq_q=bounds,
            cu_seq_k=bounds,
            max_q=length,
            max_k=length,
            window_size=(-1 if self.config.window is None else self.config.window - 1, 0),
        )
        assert isinstance(y_thp, Tensor)
        return y_thp.unflatten(0, (batch, length))

    def _make_room(self, state: KVCache, tokens: int) -> KVCache:
        """Return the cache with room for ``tokens`` more in every row."""
        if isinstance(state, FixedKVCache):
            return state
        if self.config.window is not None:
            return state.with_slots(self.config.window)  # a copy of a row may be shorter
        needed = int(state["length_b"].max()) + tokens
        if needed <= state.slots:
            return state
        return state.with_slots(max(needed + _GROWTH, 2 * state.slots))

    def reserve(self, state: State, tokens: int) -> KVCache:
        assert isinstance(state, KVCache)
        return state if self.config.window is not None else state.with_slots(tokens)

    def _append(
        self,
        state: KVCache,
        k_blkp: Tensor,
        v_blkp: Tensor,
        document_bl: Tensor | None,
        conv_state: Tensor | None,
    ) -> KVCache:
        length = k_blkp.shape[1]
        state = self._make_room(state, length)
        kept = min(length, state.slots)  # of a long stretch a ring keeps only the end
        length_b, start_b = state["length_b"], state["start_b"]
        new_l = torch.arange(length, device=length_b.device)
        slot_bl = (length_b[:, None] + new_l[length - kept :]) % state.slots
        index = slot_bl[:, :, None, None].expand(-1, -1, self.n_kv_heads, self.head_dim)
        cached = state["k_bskp"].dtype
        if document_bl is not None:
            # The current document begins where its number first appears; number 0 began earlier.
            current_bl = document_bl == document_bl[:, -1:]
            begin_b = length_b + current_bl.int().argmax(dim=1)
            start_b = torch.where(document_bl[:, -1] == 0, start_b, begin_b)
        tensors = {
            "k_bskp": state["k_bskp"].scatter(1, index, k_blkp[:, length - kept :].to(cached)),
            "v_bskp": state["v_bskp"].scatter(1, index, v_blkp[:, length - kept :].to(cached)),
            "length_b": length_b + length,
            "start_b": start_b,
        }
        if conv_state is not None:
            tensors["conv"] = conv_state.to(state["conv"].dtype)
        return state.replace(**tensors)

    def new_state(
        self, batch: int, *, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> KVCache:
        weight = self.out_proj.weight
        dtype, device = dtype or weight.dtype, device or weight.device
        slots = self.config.window or 0
        shape = (batch, slots, self.n_kv_heads, self.head_dim)
        tensors = {
            "k_bskp": torch.zeros(shape, dtype=dtype, device=device),
            "v_bskp": torch.zeros(shape, dtype=dtype, device=device),
            "length_b": torch.zeros(batch, dtype=torch.int64, device=device),
            "start_b": torch.zeros(batch, dtype=torch.int64, device=device),
        }
        if self.conv1d is not None:
            tensors["conv"] = torch.zeros(
                batch, self.config.d_conv - 1, self.d_qkv, dtype=dtype, device=device
            )
        return KVCache(**tensors)

    def residual_weight(self) -> Tensor:
        return self.out_proj.weight

    def flops_per_token(self, length: int) -> float:
        projections = 2 * (self.in_proj.weight.numel() + self.out_proj.weight.numel())
        convolution = 2 * self.conv1d.weight.numel() if self.conv1d is not None else 0
        window = min(length, self.config.window or length)
        # Keys seen on average by a causal query, in the score and in the value product.
        seen = window * (1 - (window - 1) / (2 * length))
        return projections + convolution + 2 * 2 * self.d_q * seen

    def tensor_plan(self) -> Plan:
        q = Segment(self.n_heads, self.head_dim)
        k = v = Segment(self.n_kv_heads, self.head_dim, shared_by=self.n_heads)
        plan = {"in_proj.weight": Split((q, k, v)), "out_proj.weight": Split((q,), dim=1)}
        if self.config.bias:
            plan["in_proj.bias"] = plan["in_proj.weight"]
            plan["out_proj.bias"] = Split((Segment(self.d_model),), once=True)
        if self.conv1d is not None:
            plan["conv1d.weight"] = plan["conv1d.bias"] = plan["in_proj.weight"]
        return plan

    def take_part(self, tensor: TensorGroup) -> None:
        kv_heads = Segment(self.n_kv_heads, shared_by=self.n_heads)
        self.tensor = tensor
        self.n_kv_heads = len(kv_heads.units_of(tensor.rank, tensor.size))
        self.n_heads //= tensor.size
        self.d_q, self.d_kv = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        self.d_qkv = self.d_q + 2 * self.d_kv


def rotary_angles(position_bl: Tensor, dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Return cosines and sines (b, l, dim/2) of rotary embedding (Su et al. 2021), float64."""
    frequency = base ** (
        -torch.arange(0, dim, 2, device=position_bl.device, dtype=torch.float64) / dim
    )
    angle = position_bl[..., None].double() * frequency  # exact to 2^52 positions
    return angle.cos(), angle.sin()
