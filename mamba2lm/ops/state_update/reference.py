"""One step of each recurrence.

Letters: b batch, h heads, p head dim, g groups, d channels, n state.
"""

from __future__ import annotations

from torch import Tensor


def ssd_step(
    state_bhpn: Tensor, x_bhp: Tensor, dt_bh: Tensor, A_h: Tensor, B_bgn: Tensor, C_bgn: Tensor
) -> tuple[Tensor, Tensor]:
    """Advance the Mamba-2 recurrence by one token (Dao & Gu 2024, equation 1).

    Args:
        state_bhpn: State before the token, (b, h, p, n), float32 or float64.
        x_bhp: Input, (b, h, p), in the state's dtype, as the others.
        dt_bh: Step size Δ, (b, h).
        A_h: Decay rates, (h,).
        B_bgn: Input map, (b, g, n).
        C_bgn: Output map, (b, g, n).

    Returns:
        y (b, h, p) and the new state (b, h, p, n).
    """
    heads_per_group = x_bhp.shape[1] // B_bgn.shape[1]
    B_bhn = B_bgn.repeat_interleave(heads_per_group, dim=1)
    C_bhn = C_bgn.repeat_interleave(heads_per_group, dim=1)
    a_bh = (dt_bh * A_h).exp()
    update_bhpn = (dt_bh.unsqueeze(-1) * x_bhp).unsqueeze(-1) * B_bhn.unsqueeze(-2)
    state_bhpn = a_bh[:, :, None, None] * state_bhpn + update_bhpn
    return (state_bhpn @ C_bhn.unsqueeze(-1)).squeeze(-1), state_bhpn


def selective_step(
    state_bdn: Tensor, x_bd: Tensor, dt_bd: Tensor, A_dn: Tensor, B_bn: Tensor, C_bn: Tensor
) -> tuple[Tensor, Tensor]:
    """Advance the Mamba-1 recurrence by one token (Gu & Dao 2023, equation 2a).

    Args:
        state_bdn: State before the token, (b, d, n), float32 or float64.
        x_bd: Input, (b, d), in the state's dtype, as the others.
        dt_bd: Step size Δ, (b, d).
        A_dn: Decay rates, (d, n).
        B_bn: Input map, (b, n).
        C_bn: Output map, (b, n).

    Returns:
        y (b, d) and the new state (b, d, n).
    """
    a_bdn = (dt_bd.unsqueeze(-1) * A_dn).exp()
    update_bdn = (dt_bd * x_bd).unsqueeze(-1) * B_bn.unsqueeze(1)
    state_bdn = a_bdn * state_bdn + update_bdn
    return (state_bdn @ C_bn.unsqueeze(-1)).squeeze(-1), state_bdn
