"""RMSNorm and LayerNorm."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from simgr_jax.models.transformer_config import TransformerConfig


def scaled_to_one(x: Float[Array, "*B D"], epsilon: float) -> Float[Array, "*B D"]:
    """x with a root mean square of 1."""
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + epsilon)


class Norm(nnx.Module):
    """RMSNorm or LayerNorm, computed in float32."""

    def __init__(self, width: int, config: TransformerConfig):
        self.subtracts_mean = config.norm == "layer"
        self.epsilon, self.offset = config.norm_epsilon, config.norm_offset
        self.scale = nnx.Param(jnp.full(width, 1 - self.offset, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(width, jnp.float32)) if self.subtracts_mean else None

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        x32 = x.astype(jnp.float32)
        if self.subtracts_mean:
            x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        x32 = scaled_to_one(x32, self.epsilon)
        x32 = x32 * (self.scale[...].astype(jnp.float32) + self.offset)
        return (x32 if self.bias is None else x32 + self.bias[...]).astype(x.dtype)
