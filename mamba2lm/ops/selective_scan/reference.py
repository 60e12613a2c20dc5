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
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Scan blocks of ``chunk_size`` positions in parallel, carrying the state between blocks.

    The expanded state (b, chunk_size, d, n) exists for one block at a time: the backward pass
    recomputes it from the carried state, as the paper's kernel does (section 3.3.2).

    Args, Returns: as ``selective_scan_sequential``.
    """
    dtype = state_dtype(x_bld)
    b, length, d = x_bld.shape
    keep_bl = _keep(document_bl)
    state_bdn = _initial(initial_states_bdn, b, d, A_dn.shape[1], dtype, x_bld)
    outputs = []
    for start in range(0, length, chunk_size):
        block = slice(start, start + chunk_size)
        y_bqd, state_bdn = checkpoint(
            _scan_block,
            x_bld[:, block],
            dt_bld[:, block],
            A_dn.to(dtype),
            B_bln[:, block].to(dtype),
            C_bln[:, block].to(dtype),
            state_bdn,
            None if keep_bl is None else keep_bl[:, block],
            use_reentrant=False,
            preserve_rng_state=False,
        )
        outputs.append(y_bqd)
    return torch.cat(outputs, dim=1).to(x_bld.dtype), state_bdn


def _scan_block(
    x_bqd: Tensor,
    dt_bqd: Tensor,
    A_dn: Tensor,
    B_bqn: Tensor,
    C_bqn: Tensor,
    state_bdn: Tensor,
    keep_bq: Tensor | None,
) -> tuple[Tensor, Tensor]:
    a_bqdn = (dt_bqd.unsqueeze(-1) * A_dn).exp()
    if keep_bq is not None:
        a_bqdn = a_bqdn * keep_bq[:, :, None, None]
    u_bqdn = (dt_bqd * x_bqd).unsqueeze(-1) * B_bqn.unsqueeze(2)
    prefix_a_bqdn, prefix_u_bqdn = associative_scan(a_bqdn, u_bqdn)
    h_bqdn = torch.addcmul(prefix_u_bqdn, prefix_a_bqdn, state_bdn.unsqueeze(1))
    y_bqd = (h_bqdn @ C_bqn.unsqueeze(-1)).squeeze(-1)
    return y_bqd, h_bqdn[:, -1]


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
