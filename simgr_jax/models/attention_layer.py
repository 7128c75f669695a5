"""Self-attention with rotary positions."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from simgr_jax.devices import sharding
from simgr_jax.models.linear import Linear
from simgr_jax.models.norm import Norm, scaled_to_one
from simgr_jax.models.reading import Layer, Reading
from simgr_jax.models.transformer_config import TransformerConfig


def apply_rotary(
    x: Float[Array, "B T H head"],
    positions: Int[Array, "B T"],
    frequencies: Float[Array, " F"],
    scale: Float[Array, ""],
) -> Float[Array, "B T H head"]:
    """Rotates each pair (x[i], x[i + F]) by position * frequencies[i], as Hugging Face's decoders do.

    F <= head / 2; dimensions from 2F on are unchanged.
    """
    pairs = frequencies.shape[0]
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    # The barrier keeps XLA from computing them again for every head and for every use of the result.
    cos, sin = jax.lax.optimization_barrier((jnp.cos(angles) * scale, jnp.sin(angles) * scale))
    first, second, rest = jnp.split(x.astype(jnp.float32), [pairs, 2 * pairs], axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query self-attention (https://arxiv.org/abs/2305.13245)."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        self.config = config
        query_width, kv_width = config.heads * config.head_width, config.kv_heads * config.head_width
        bias, into_heads = config.attention_bias, ("embed", "heads")
        q_proj_width = query_width * (2 if config.attention_gate else 1)
        self.q_proj = Linear(config.width, q_proj_width, bias, config.dtype, rngs, into_heads)
        kv_proj = lambda exists: (  # noqa: E731
            Linear(config.width, kv_width, bias, config.dtype, rngs, into_heads) if exists else None
        )
        self.k_proj = kv_proj(not config.takes_kv)
        self.v_proj = kv_proj(not (config.takes_kv or config.values_are_keys))
        self.o_proj = Linear(
            query_width, config.width, config.attention_output_bias, config.dtype, rngs, ("heads", "embed")
        )
        normed = {"none": (0, 0), "head": (config.head_width,) * 2, "all_heads": (query_width, kv_width)}
        query_normed, key_normed = normed[config.qk_norm]
        self.q_norm = Norm(query_normed, config) if query_normed else None
        self.k_norm = Norm(key_normed, config) if key_normed and not config.takes_kv else None

    def __call__(
        self, x: Float[Array, "B T D"], layer: Layer, reading: Reading, rngs: nnx.Rngs | None
    ) -> tuple[Float[Array, "B Q D"], Any]:
        config = self.config
        asks, asking_positions = reading.asked(x), reading.asked(reading.positions)
        query = self.q_proj(asks, rngs)
        if config.qk_norm == "all_heads":
            query = self.q_norm(query)
        query = sharding.constrain(query.reshape(*query.shape[:2], config.heads, -1), "batch", None, "heads", None)
        if config.attention_gate:
            query, gate = jnp.split(query, 2, axis=-1)
        if config.qk_norm == "head":
            query = self.q_norm(query)
        if config.rope:
            query = apply_rotary(query, asking_positions, layer.frequencies, layer.rotary_scale)
        growth, length = config.query_growth
        if growth:
            scale = 1 + growth * jnp.log1p(jnp.floor(asking_positions.astype(jnp.float32) / length))
            query = (query * scale[..., None, None]).astype(query.dtype)
        key, value = layer.shared[config.kv_group] if config.takes_kv else self._keys_values(x, layer, reading, rngs)
        if config.kv_group:
            layer.shared[config.kv_group] = key, value
        options = {
            "windows": layer.windows,
            "window_index": layer.window_index,
            "scale": config.attention_scale or config.head_width**-0.5,
            "softcap": config.attention_softcap,
        }
        mixed, kept = reading.attend(query, key, value, layer.cached, **options)
        if config.attention_gate:
            mixed = mixed * jax.nn.sigmoid(gate)
        return self.o_proj(mixed.reshape(*asks.shape[:2], -1), rngs), kept

    def _keys_values(
        self, x: Float[Array, "B T D"], layer: Layer, reading: Reading, rngs: nnx.Rngs | None
    ) -> tuple[Float[Array, "B T Hkv head"], Float[Array, "B T Hkv head"]]:
        config, key = self.config, self.k_proj(x, rngs)
        value = key if config.values_are_keys else self.v_proj(x, rngs)
        if config.qk_norm == "all_heads":
            key = self.k_norm(key)
        key, value = (y.reshape(*y.shape[:2], -1, config.head_width) for y in (key, value))
        key, value = (sharding.constrain(y, "batch", None, "heads", None) for y in (key, value))
        if config.qk_norm == "head":
            key = self.k_norm(key)
        if config.value_norm:
            value = scaled_to_one(value.astype(jnp.float32), config.norm_epsilon).astype(value.dtype)
        if config.rope:
            key = apply_rotary(key, reading.positions, layer.frequencies, layer.rotary_scale)
        return key, value
