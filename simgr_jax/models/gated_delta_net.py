"""The gated delta net of Qwen3.5 (https://arxiv.org/abs/2412.06464): linear attention whose state forgets and corrects
itself. It takes attention's place in a layer."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from simgr_jax.devices import sharding
from simgr_jax.models.linear import Linear
from simgr_jax.models.norm import Norm
from simgr_jax.models.reading import Layer, Reading
from simgr_jax.models.short_convolution import convolution_kernel
from simgr_jax.models.transformer_config import TransformerConfig


class GatedDeltaNet(nnx.Module):
    """Queries, keys and values go through short convolutions; the outputs are normalized and gated, head by head."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        self.shape = shape = config.delta_net
        keys, values = shape.key_heads * shape.key_width, shape.value_heads * shape.value_width
        project = lambda width: Linear(config.width, width, False, config.dtype, rngs, ("embed", "heads"))  # noqa: E731
        self.q_proj, self.k_proj, self.v_proj, self.z_proj = map(project, (keys, keys, values, values))
        self.a_proj, self.b_proj = project(shape.value_heads), project(shape.value_heads)
        convolution = lambda channels: convolution_kernel(channels, config, rngs, "heads")  # noqa: E731
        self.q_conv, self.k_conv, self.v_conv = map(convolution, (keys, keys, values))
        self.log_decay_scale = nnx.Param(jnp.zeros(shape.value_heads, jnp.float32))
        self.step_bias = nnx.Param(jnp.ones(shape.value_heads, jnp.float32))
        self.norm = Norm(shape.value_width, dataclasses.replace(config, norm_offset=0.0))
        self.o_proj = Linear(values, config.width, False, config.dtype, rngs, ("heads", "embed"))

    def __call__(
        self, x: Float[Array, "B T D"], layer: Layer, reading: Reading, rngs: nnx.Rngs | None
    ) -> tuple[Float[Array, "B Q D"], Any]:
        shape, mixed, windows = self.shape, [], []
        parts = (
            (self.q_proj, self.q_conv, shape.key_width),
            (self.k_proj, self.k_conv, shape.key_width),
            (self.v_proj, self.v_conv, shape.value_width),
        )
        for index, (projection, kernel, width) in enumerate(parts):
            y, window = reading.convolve(projection(x, rngs), kernel[...][:, 0], layer.cached.part(index))
            y = jax.nn.silu(y).reshape(*y.shape[:2], -1, width)
            mixed.append(sharding.constrain(y, "batch", None, "heads", None))
            windows.append(window)
        query, key, value = mixed
        # Value heads that follow each other share a key head.
        shared = shape.value_heads // shape.key_heads
        query, key = (jnp.repeat(_unit(y), shared, axis=2) for y in (query, key))
        step = jax.nn.softplus(self.a_proj(x, rngs).astype(jnp.float32) + self.step_bias[...])
        log_decay = -jnp.exp(self.log_decay_scale[...].astype(jnp.float32)) * step
        beta = jax.nn.sigmoid(self.b_proj(x, rngs).astype(jnp.float32))
        output, state = reading.delta_rule(
            query * shape.key_width**-0.5, key, value, log_decay, beta, layer.cached.part(3)
        )
        gate = self.z_proj(reading.asked(x), rngs).reshape(output.shape).astype(jnp.float32)
        output = (self.norm(output) * jax.nn.silu(gate)).astype(x.dtype)
        return self.o_proj(output.reshape(*output.shape[:2], -1), rngs), (*windows, state)


def _unit(x: Float[Array, "*B width"]) -> Float[Array, "*B width"]:
    """x divided by its length, float32."""
    x32 = x.astype(jnp.float32)
    return x32 * jax.lax.rsqrt(jnp.sum(x32**2, axis=-1, keepdims=True) + 1e-6)
