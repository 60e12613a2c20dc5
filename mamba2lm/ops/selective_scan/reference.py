"""The selective scan of Mamba-1 (Gu & Dao 2023, arXiv:2312.00752), one step after another and
in parallel.

    h_t = exp(Δ_t A) h_{t-1} + Δ_t x_t B_t,   y_t = h_t · C_t

Every channel is an SSM of its own with n states and its own decay per state.

Letters: b batch, l length, d channels, n state, q position in a block of time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mamba2lm.ops.dispatch import state_dtype


def combine(earlier: tuple[Tensor, Tensor], later: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Compose two steps of h → a h + u: (a₂, u₂)∘(a₁, u₁) = (a₂ a₁, a₂ u₁ + u₂)."""
    return later[0] * earlier[0], torch.addcmul(later[1], later[0], earlier[1])


def associative_scan(a: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Compose all prefixes of the steps h → a h + u along axis 1.

    The up and down sweeps of Blelloch's scan, written as a recursion: neighbours are combined,
    the half-length scan is solved, and every other prefix is completed with one more step. About
    2 l compositions in 2 log₂ l rounds. Nothing is divided, so a decay of 0 (a document's first
    position) is exact.

    Args:
        a: Decays, (b, l, …).
        u: Updates, same shape.

    Returns:
        Prefix decays a_t ⋯ a_0 and prefix states h_t from h_{-1} = 0, both (b, l, …).
    """
    length = a.shape[1]
    if length == 1:
        return a, u
    even = length - length % 2
    pair_a, pair_u = combine((a[:, 0:even:2], u[:, 0:even:2]), (a[:, 1:even:2], u[:, 1:even:2]))
    odd_a, odd_u = associative_scan(pair_a, pair_u)  # prefixes that end at positions 1, 3, 5, …
    if length > 2:
        before = (length - 1) // 2  # positions 2, 4, … continue the prefixes 1, 3, …
        rest_a, rest_u = combine((odd_a[:, :before], odd_u[:, :before]), (a[:, 2::2], u[:, 2::2]))
        even_a, even_u = torch.cat([a[:, :1], rest_a], 1), torch.cat([u[:, :1], rest_u], 1)
    else:
        even_a, even_u = a[:, :1], u[:, :1]
    return _interleave(even_a, odd_a), _interleave(even_u, odd_u)


def _interleave(even: Tensor, odd: Tensor) -> Tensor:
    pairs = odd.shape[1]
    woven = torch.stack([even[:, :pairs], odd], dim=2).flatten(1, 2)
    return woven if even.shape[1] == pairs else torch.cat([woven, even[:, pairs:]], dim=1)


def selective_scan_sequential(
    x_bld: Tensor,
    dt_bld: Tensor,
    A_dn: Tensor,
    B_bln: Tensor,
    C_bln: Tensor,
    *,
    initial_states_bdn: Tensor | None = None,
    document_bl: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence one position after another.

    Args:
        x_bld: Inputs, (b, l, d).
        dt_bld: Step sizes Δ, (b, l, d), float32 (float64 for float64 inputs).
        A_dn: Decay rates, (d, n).
        B_bln: Input maps, (b, l, n).
        C_bln: Output maps, (b, l, n).
        initial_states_bdn: State before position 0, (b, d, n), or None for zero.
        document_bl: Document ordinals, (b, l); the state restarts from zero where they change.

    Returns:
        y (b, l, d) in the dtype of x and the state after the last position (b, d, n) in float32
        or float64 (Gu & Dao 2023, equation 2 and algorithm 2).
    """
    dtype = state_dtype(x_bld)
    b, length, d = x_bld.shape
    # unbind, not indexing: the gradient of an index is as long as the sequence.
    dt_l, scaled_l = dt_bld.unbind(1), (dt_bld * x_bld.to(dtype)).unbind(1)
    B_l, C_l = B_bln.to(dtype).unbind(1), C_bln.to(dtype).unbind(1)
    A_dn = A_dn.to(dtype)
    keep_bl = _keep(document_bl)
    state_bdn = _initial(initial_states_bdn, b, d, A_dn.shape[1], dtype, x_bld)
    outputs = []
    for t in range(length):
        a_bdn = (dt_l[t].unsqueeze(-1) * A_dn).exp()
        if keep_bl is not None:
            a_bdn = a_bdn * keep_bl[:, t, None, None]
        update_bdn = scaled_l[t].unsqueeze(-1) * B_l[t].unsqueeze(1)
        state_bdn = torch.addcmul(update_bdn, a_bdn, state_bdn)
        outputs.append((state_bdn @ C_l[t].unsqueeze(-1)).squeeze(-1))
    return torch.stack(outputs, dim=1).to(x_bld.dtype), state_bdn


def selective_scan_parallel(
    x_bld: Tensor,
    dt_bld: Tensor,
    A_dn: Tensor,
    B_bln: Tensor,
    C_bln: Tensor,
    *,
    initial_states_bdn: Tensor | None = None,
    document_bl: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scan all positions in parallel, in a number of rounds that grows as log₂ l.

    Args, Returns: as ``selective_scan_sequential`` (Gu & Dao 2023, section 3.3).
    """
    dtype = state_dtype(x_bld)
    b, _, d = x_bld.shape
    a_bldn = (dt_bld.unsqueeze(-1) * A_dn.to(dtype)).exp()
    keep_bl = _keep(document_bl)
    if keep_bl is not None:
        a_bldn = a_bldn * keep_bl[:, :, None, None]
    u_bldn = (dt_bld * x_bld.to(dtype)).unsqueeze(-1) * B_bln.to(dtype).unsqueeze(2)
    decay_bldn, h_bldn = associative_scan(a_bldn, u_bldn)
    state_bdn = _initial(initial_states_bdn, b, d, A_dn.shape[1], dtype, x_bld)
    h_bldn = torch.addcmul(h_bldn, decay_bldn, state_bdn.unsqueeze(1))
    y_bld = (h_bldn @ C_bln.to(dtype).unsqueeze(-1)).squeeze(-1)
    return y_bld.to(x_bld.dtype), h_bldn[:, -1]


def selective_scan_blocked(
    x_bld: Tensor,
    dt_bld: Tensor,
    A_dn: Tensor,
    B_bln: Tensor,
    C_bln: Tensor,
    *,
    initial_states_bdn: Tensor | None = None,
    document_bl: Tensor | None = None,
    chunk_size: int = 64,
    parallel: bool = False,
) -> tuple[Tensor, Tensor]:
    """Scan ``chunk_size`` positions at a time with either scan, carrying the state.

    The expanded states (b, chunk_size, d, n) exist for one block at a time: the backward pass
    recomputes them from the carried state, as the paper's kernel does (section 3.3.2).

    Args:
        chunk_size: Positions per block, at least 1.
        parallel: Whether blocks are scanned by ``selective_scan_parallel``, which suits
            accelerators, or by ``selective_scan_sequential``, which is faster on a CPU.

    Other Args, Returns: as ``selective_scan_sequential``.
    """
    scan = selective_scan_parallel if parallel else selective_scan_sequential
    dtype = state_dtype(x_bld)
    b, length, d = x_bld.shape
    state_bdn = _initial(initial_states_bdn, b, d, A_dn.shape[1], dtype, x_bld)
    outputs = []
    for start in range(0, length, chunk_size):
        block = slice(start, start + chunk_size)
        if start and document_bl is not None:
            same_b = document_bl[:, start] == document_bl[:, start - 1]
            state_bdn = state_bdn * same_b[:, None, None]
        y_bqd, state_bdn = checkpoint(
            scan,
            x_bld[:, block],
            dt_bld[:, block],
            A_dn,
            B_bln[:, block],
            C_bln[:, block],
            initial_states_bdn=state_bdn,
            document_bl=None if document_bl is None else document_bl[:, block],
            use_reentrant=False,
            preserve_rng_state=False,
        )
        outputs.append(y_bqd)
    return torch.cat(outputs, dim=1), state_bdn


def _keep(document_bl: Tensor | None) -> Tensor | None:
    if document_bl is None:
        return None
    return F.pad(document_bl[:, 1:] == document_bl[:, :-1], (1, 0), value=True)


def _initial(
    initial_states_bdn: Tensor | None, b: int, d: int, n: int, dtype: torch.dtype, like: Tensor
) -> Tensor:
    if initial_states_bdn is None:
        return torch.zeros(b, d, n, dtype=dtype, device=like.device)
    return initial_states_bdn.to(dtype)
