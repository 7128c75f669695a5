"""A clip for parameters that are trained: it never leaves them stuck beyond a bound."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.custom_vjp
def clip_between(x: Float[Array, ""], lowest: Float[Array, ""], highest: Float[Array, ""]) -> Float[Array, ""]:
    """min(max(x, lowest), highest).

    The gradient of a plain clip is zero beyond the bounds, so x would never come back. A gradient that always passed
    would push x ever further out. This one passes unless gradient descent would push x out of the bounds.
    """
    return jnp.clip(x, lowest, highest)


def _forward(x, lowest, highest):
    return clip_between(x, lowest, highest), (x, lowest, highest)


def _backward(residuals, gradient):
    x, lowest, highest = residuals
    outward = ((x >= highest) & (gradient < 0)) | ((x <= lowest) & (gradient > 0))
    return jnp.where(outward, 0, gradient), None, None


clip_between.defvjp(_forward, _backward)
