"""Short causal convolutions over the positions of packed rows, each channel on its own."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def causal_convolution(
    x: Float[Array, "B T C"], kernel: Float[Array, "C K"], segment_ids: Int[Array, "B T"]
) -> Float[Array, "B T C"]:
    """y[t] = sum over j < K of kernel[K - 1 - j] x[t - j], where positions outside t's segment count as 0. Computed in
    float32.

    `kernel` is in torch's order: its last entry is for the position itself.
    """

    def shift(y: Array, distance: int, fill: int) -> Array:
        padding = [(0, 0), (distance, 0)] + [(0, 0)] * (y.ndim - 2)
        return jnp.pad(y, padding, constant_values=fill)[:, : y.shape[1]]

    x32, total = x.astype(jnp.float32), jnp.float32(0)
    for distance in range(kernel.shape[1]):
        is_same = shift(segment_ids, distance, -1) == segment_ids
        total += jnp.where(is_same[..., None], shift(x32, distance, 0), 0) * kernel[:, kernel.shape[1] - 1 - distance]
    return total.astype(x.dtype)


def last_inputs(x: Float[Array, "B T C"], lengths: Int[Array, " B"], count: int) -> Float[Array, "B count C"]:
    """The last `count` of the first `lengths` positions; zeros stand for positions before the first."""
    places = lengths[:, None] - count + jnp.arange(count)
    found = jnp.take_along_axis(x, jnp.maximum(places, 0)[..., None], axis=1)
    return jnp.where(places[..., None] >= 0, found, 0)


def continued_convolution(
    x: Float[Array, "B S C"], kernel: Float[Array, "C K"], past: Float[Array, "B K-1 C"]
) -> tuple[Float[Array, "B S C"], Float[Array, "B K-1 C"]]:
    """`causal_convolution` for S positions that follow others.

    Args:
      past: the K - 1 positions before them.

    Returns:
      The values, and the `past` of the positions that follow.
    """
    known = past.shape[1]
    whole = jnp.concatenate([past, x], axis=1)
    values = causal_convolution(whole, kernel, jnp.ones(whole.shape[:2], jnp.int32))
    return values[:, known:], whole[:, whole.shape[1] - known :]
