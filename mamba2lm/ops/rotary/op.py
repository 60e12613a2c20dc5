"""The public rotation of queries and keys.

Letters: b batch, l length, h query heads, k key-value heads, p head dim, r rotated pairs,
c channels of the projection (q, k and v side by side).
"""

from __future__ import annotations

from torch import Tensor

from mamba2lm.ops.dispatch import Impl, choose_impl, expect_shape
from mamba2lm.ops.kernels import no_kernels
from mamba2lm.ops.rotary.launch import rotary_heads_triton
from mamba2lm.ops.rotary.reference import rotary_reference


def rotary_heads(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    n_heads: int,
    n_kv_heads: int,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Part a fused projection into heads, and rotate queries and keys to their positions.

    Args:
        qkv: (b, l, c), c = (n_heads + 2 n_kv_heads) p: queries, keys, values.
        cos: Cosines of each position's angles, (b, l, r) or (1, l, r), r ≤ p / 2.
        sin: Sines, the same shape.
        n_heads: Query heads, h.
        n_kv_heads: Key-value heads, k.
        impl: ``"auto"`` (the kernel on a GPU), ``"triton"`` or ``"reference"``.

    Returns:
        Queries (b, l, h, p), keys and values (b, l, k, p) in the dtype of ``qkv``; computed in
        float32 (float64 for float64). The first 2r channels of a head are rotated, channel i
        with i + r. Values are a view of ``qkv``, inside torch.compile a copy.

    Raises:
        ValueError: Shapes that do not fit, or an implementation that does not exist.
    """
    sizes: dict[str, int] = {}
    expect_shape("qkv", qkv, "b l c", sizes)
    heads = n_heads + 2 * n_kv_heads
    if sizes["c"] % heads:
        raise ValueError(f"qkv has {sizes['c']} channels, which {heads} heads do not divide.")
    if cos.shape[:1] == (1,):
        sizes["b"] = 1
    expect_shape("cos", cos, "b l r", sizes)
    expect_shape("sin", sin, "b l r", sizes)
    if 2 * sizes["r"] > sizes["c"] // heads:
        raise ValueError(
            f"cos has {sizes['r']} angles a position (axis 2); heads of {sizes['c'] // heads} "
            "channels have fewer pairs."
        )
    if choose_impl("rotary_heads", impl, qkv, unsupported=no_kernels(qkv)) == "triton":
        return rotary_heads_triton(qkv, cos, sin, n_heads, n_kv_heads)
    q, k, v = qkv.unflatten(-1, (heads, -1)).split([n_heads, n_kv_heads, n_kv_heads], dim=2)
    return rotary_reference(q, cos, sin), rotary_reference(k, cos, sin), v
