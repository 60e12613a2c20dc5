"""Context parallelism: sequences cut over processes, in order, each with one contiguous stretch.

A linear recurrence needs of the past one state. Every process runs its stretch from a zero state,
which gives its own contribution S and its total log decay ℓ; the state that enters process r is

    entering_r = Σ_{j<r} exp(Σ_{j<k<r} ℓ_k) S_j

One packed all-gather brings all S and ℓ; its gradient is one reduce-scatter. A document boundary
anywhere between the end of j and the beginning of r stops what j would pass on.

Axes: b batch, l positions of this process, t positions of the whole sequence, c processes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from mamba2lm.distributed.collectives import all_gather, gather_for_parts, reduce_scatter


@dataclass(frozen=True)
class ContextGroup:
    """The processes that share the length of every sequence.

    Attributes:
        group: They.
        rank: Which stretch is this process's, from the left.
        size: How many they are.
    """

    group: ProcessGroup
    rank: int
    size: int

    def stretch(self, x_bt: Tensor) -> Tensor:
        """Return this process's stretch of whole sequences (axis 1)."""
        length = x_bt.shape[1] // self.size
        assert length * self.size == x_bt.shape[1], "stretches are of one length"
        return x_bt[:, self.rank * length : (self.rank + 1) * length]

    def passage(self, length: int, seq_idx_bl: Tensor | None) -> Passage:
        """Say how stretches of a batch are joined.

        Args:
            length: Positions of each process.
            seq_idx_bl: This process's document ids, or None where each row is one document.
        """
        if seq_idx_bl is None:
            return Passage(self, length, None)
        seq_idx_bt = all_gather(seq_idx_bl, 1, self.group)
        changed_bt = F.pad(seq_idx_bt[:, 1:] != seq_idx_bt[:, :-1], (1, 0))
        return Passage(self, length, changed_bt.to(torch.int64).cumsum(dim=1))


@dataclass(frozen=True)
class Passage:
    """What passes between the processes of one batch.

    Attributes:
        context: The processes.
        length: Positions of each.
        document_bt: Ordinals of the documents of the whole sequences; None for one a row.
    """

    context: ContextGroup
    length: int
    document_bt: Tensor | None

    @property
    def offset(self) -> int:
        """Position of this process's first token in the whole sequence."""
        return self.context.rank * self.length

    def inputs_before(self, x_bld: Tensor, count: int) -> Tensor:
        """Return the last inputs of the process before, a convolution's halo.

        Args:
            x_bld: This process's inputs, (b, l, d) with l ≥ count.
            count: Inputs to fetch.

        Returns:
            (b, count, d), zero where they belong to another document than this process's first
            position or do not exist.
        """
        gathered = gather_for_parts(self._last(x_bld, count), 0, self.context.group)
        return self._before(gathered)

    def fetch_inputs_before(self, x_bld: Tensor, count: int) -> Tensor:
        """Compute ``inputs_before`` without a gradient."""
        return self._before(all_gather(self._last(x_bld, count), 0, self.context.group))

    def return_inputs_before(self, dbefore_bwd: Tensor) -> Tensor:
        """Return the gradient of this process's last inputs from those of the halos, (b, w, d)."""
        rank, size = self.context.rank, self.context.size
        dgathered = dbefore_bwd.new_zeros(size, *dbefore_bwd.shape)
        if rank:
            dgathered[rank - 1] = dbefore_bwd
            if self.document_bt is not None:
                dgathered[rank - 1] *= self._same_document(dbefore_bwd.shape[1])
        return reduce_scatter(dgathered, 0, self.context.group).squeeze(0)

    def _last(self, x_bld: Tensor, count: int) -> Tensor:
        assert x_bld.shape[1] >= count, "a stretch is at least as long as the convolution's past"
        return x_bld[:, self.length - count :].unsqueeze(0)

    def _before(self, gathered: Tensor) -> Tensor:
        rank, size = self.context.rank, self.context.size
        # Every process uses what it gathered, if only times zero: the gradient is a collective too.
        before_bwd = gathered[(rank - 1) % size]
        if rank == 0:
            return before_bwd * 0.0
        if self.document_bt is None:
            return before_bwd
        return before_bwd * self._same_document(before_bwd.shape[1])

    def _same_document(self, count: int) -> Tensor:
        """Say which of the inputs before belong to the document of this process's first one."""
        assert self.document_bt is not None
        mine_b1 = self.document_bt[:, self.offset, None]
        same_bw = self.document_bt[:, self.offset - count : self.offset] == mine_b1
        return same_bw.unsqueeze(2)

    def entering_state(self, state: Tensor, log_decay: Tensor) -> Tensor:
        """Return the state that enters this process's stretch.

        Args:
            state: What the stretch leaves when it begins from zero, (b, …).
            log_decay: Log of the factor by which it would multiply a state, of the leading axes of
                ``state``; only counts where the stretch has one document.

        Returns:
            Same shape and dtype as ``state``.
        """
        packed = _packed(state.unsqueeze(0), log_decay.unsqueeze(0))
        gathered = gather_for_parts(packed, 0, self.context.group)
        return self._entering(gathered, state.shape, log_decay.shape)

    def fetch_entering_state(self, state: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor]:
        """Compute ``entering_state`` without a gradient; return what its gradient needs too."""
        packed = _packed(state.unsqueeze(0), log_decay.unsqueeze(0))
        gathered = all_gather(packed, 0, self.context.group)
        return self._entering(gathered, state.shape, log_decay.shape), gathered

    def return_entering_state(
        self, dentering: Tensor, gathered: Tensor, decay_shape: torch.Size
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of ``state`` and ``log_decay`` from that of what entered.

        Args:
            dentering: Of the shape of the state.
            gathered: As ``fetch_entering_state`` returned it.
            decay_shape: That of ``log_decay``.
        """
        states_c, factor_c, between_ck = self._factors(gathered, dentering.shape, decay_shape)
        trailing = tuple(range(factor_c.ndim, states_c.ndim))
        dlog_factor_c = (states_c * dentering).sum(dim=trailing) * factor_c
        dlog_decay_k = torch.einsum("ck,c...->k...", between_ck.to(factor_c.dtype), dlog_factor_c)
        dstates_c = _aligned(factor_c, states_c) * dentering
        packed = _packed(dstates_c, dlog_decay_k)
        mine = reduce_scatter(packed, 0, self.context.group).squeeze(0)
        dstate, dlog_decay = mine.split([dentering.numel(), decay_shape.numel()])
        return dstate.view(dentering.shape), dlog_decay.view(decay_shape)

    def _entering(self, gathered: Tensor, shape: torch.Size, decay_shape: torch.Size) -> Tensor:
        states_c, factor_c, _ = self._factors(gathered, shape, decay_shape)
        return (_aligned(factor_c, states_c) * states_c).sum(dim=0)

    def _factors(
        self, gathered: Tensor, shape: torch.Size, decay_shape: torch.Size
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return all processes' states, by what they are multiplied, and what lies between.

        The last, (c, k), says whether process k passes on what c leaves before it is here.
        """
        rank, size = self.context.rank, self.context.size
        states_c, log_decays_c = gathered.split([shape.numel(), decay_shape.numel()], dim=1)
        process_c = torch.arange(size, device=gathered.device)
        between_ck = (process_c[None] > process_c[:, None]) & (process_c[None] < rank)
        # Not a product of matrices, which autocast would round, nor a difference of running sums,
        # where a long past would swallow a short stretch.
        factor_c = (between_ck.unsqueeze(2) * log_decays_c).sum(dim=1).exp()
        factor_c = factor_c.reshape(size, *decay_shape)
        passes_cb = (process_c < rank)[:, None]
        if self.document_bt is not None:
            ends_cb = self.document_bt[:, self.length - 1 :: self.length].t()
            passes_cb = passes_cb & (ends_cb == self.document_bt[None, :, self.offset])
        else:
            passes_cb = passes_cb.expand(size, shape[0])
        factor_c = factor_c * passes_cb.reshape(*passes_cb.shape, *[1] * (len(decay_shape) - 1))
        return states_c.reshape(size, *shape), factor_c, between_ck

    def gather(self, *tensors: Tensor) -> list[Tensor]:
        """Join every process's stretch of tensors (b, l, …) of one dtype, in one collective."""
        batch = tensors[0].shape[0]
        flat_bln = torch.cat([x.reshape(batch, self.length, -1) for x in tensors], dim=2)
        whole_btn = gather_for_parts(flat_bln, 1, self.context.group)
        parts = whole_btn.split([x[0, 0].numel() for x in tensors], dim=2)
        return [
            part.reshape(batch, -1, *x.shape[2:]) for part, x in zip(parts, tensors, strict=True)
        ]


def _packed(states_c: Tensor, log_decays_c: Tensor) -> Tensor:
    """Lay states and log decays side by side, one row each of the first axis."""
    return torch.cat([states_c.flatten(1), log_decays_c.to(states_c.dtype).flatten(1)], dim=1)


def _aligned(factor_c: Tensor, states_c: Tensor) -> Tensor:
    return factor_c.reshape(*factor_c.shape, *[1] * (states_c.ndim - factor_c.ndim))
