"""A decoder-only transformer driven by its config: RMSNorm, rotary positions, grouped-query attention, gated MLP.

It takes embeddings and returns hidden states; what the embeddings stand for is the recommender's business. Parts are
named and shaped as in Hugging Face's Llama-like decoders (`q_proj`, `gate_proj`, `input_layernorm`, ...).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from simgr_jax.errors import UserError
from simgr_jax.ops.attention import attention


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """The shape of a decoder.

    Attributes:
      width: D, the hidden size.
      layers: number of blocks.
      heads: H, query heads.
      kv_heads: key and value heads; divides `heads`.
      head_width: size of a head; even, for rotary positions.
      mlp_width: inner size of the gated MLP.
      rope_theta: base of the rotary frequencies (RoFormer, https://arxiv.org/abs/2104.09864).
      norm_epsilon: RMSNorm's epsilon.
      dropout: rate on each residual branch and on the input.
      dtype: of the computation ("float32" or "bfloat16"); parameters and norms are float32.
    """

    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    rope_theta: float = 10_000.0
    norm_epsilon: float = 1e-6
    dropout: float = 0.0
    dtype: str = "float32"

    def __post_init__(self):
        for key in ("width", "layers", "heads", "kv_heads", "head_width", "mlp_width"):
            if getattr(self, key) < 1:
                raise UserError(f"config.backbone.{key}: {getattr(self, key)} is not positive; give at least 1")
        if self.heads % self.kv_heads:
            raise UserError(
                f"config.backbone.kv_heads: {self.kv_heads} does not divide the {self.heads} heads; choose a divisor"
            )
        if self.head_width % 2:
            raise UserError(
                f"config.backbone.head_width: {self.head_width} is odd and rotary positions turn pairs; make it even"
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f"config.backbone.dropout: {self.dropout} is not a rate; give a number in [0, 1)")
        if self.dtype not in ("float32", "bfloat16"):
            raise UserError(f'config.backbone.dtype: "{self.dtype}" is unknown; choose "float32" or "bfloat16"')


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation (https://arxiv.org/abs/1910.07467), computed in float32."""

    def __init__(self, width: int, epsilon: float):
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + self.epsilon)
        return (x32 * self.scale[...]).astype(x.dtype)


def apply_rotary(
    x: Float[Array, "B T H head"], positions: Int[Array, "B T"], theta: float
) -> Float[Array, "B T H head"]:
    """Rotates the pairs (x[i], x[i + head/2]) by position * theta^(-2i/head), as Hugging Face's decoders do."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _linear(in_width: int, out_width: int, dtype: str, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(
        in_width, out_width, use_bias=False, dtype=dtype, kernel_init=nnx.initializers.normal(0.02), rngs=rngs
    )


class Attention(nnx.Module):
    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        self.config = config
        self.q_proj = _linear(config.width, config.heads * config.head_width, config.dtype, rngs)
        self.k_proj = _linear(config.width, config.kv_heads * config.head_width, config.dtype, rngs)
        self.v_proj = _linear(config.width, config.kv_heads * config.head_width, config.dtype, rngs)
        self.o_proj = _linear(config.heads * config.head_width, config.width, config.dtype, rngs)

    def __call__(self, x, segment_ids, positions):
        heads_of = lambda y: y.reshape(*y.shape[:2], -1, self.config.head_width)  # noqa: E731
        query = apply_rotary(heads_of(self.q_proj(x)), positions, self.config.rope_theta)
        key = apply_rotary(heads_of(self.k_proj(x)), positions, self.config.rope_theta)
        mixed = attention(query, key, heads_of(self.v_proj(x)), segment_ids)
        return self.o_proj(mixed.reshape(*x.shape[:2], -1))


class GatedMLP(nnx.Module):
    """SwiGLU (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        self.gate_proj = _linear(config.width, config.mlp_width, config.dtype, rngs)
        self.up_proj = _linear(config.width, config.mlp_width, config.dtype, rngs)
        self.down_proj = _linear(config.mlp_width, config.width, config.dtype, rngs)

    def __call__(self, x):
        return self.down_proj(nnx.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config.width, config.norm_epsilon)
        self.self_attn = Attention(config, rngs)
        self.post_attention_layernorm = RMSNorm(config.width, config.norm_epsilon)
        self.mlp = GatedMLP(config, rngs)
        self.dropout = nnx.Dropout(config.dropout)

    def __call__(self, x, segment_ids, positions, rngs):
        drop = lambda y: self.dropout(y, deterministic=rngs is None, rngs=rngs)  # noqa: E731
        x = x + drop(self.self_attn(self.input_layernorm(x), segment_ids, positions))
        return x + drop(self.mlp(self.post_attention_layernorm(x)))


class Transformer(nnx.Module):
    """The decoder stack."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        self.config = config
        self.layers = nnx.List([Block(config, rngs) for _ in range(config.layers)])
        self.norm = RMSNorm(config.width, config.norm_epsilon)
        self.dropout = nnx.Dropout(config.dropout)

    def __call__(
        self,
        embeddings: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B T D"]:
        """Causal hidden states, segment by segment.

        Args:
          segment_ids: which sequence of a packed row a position belongs to; 0 is padding.
          positions: position within the segment.
          rngs: with a "dropout" stream in training; None switches dropout off.
        """
        x = embeddings.astype(self.config.dtype)
        x = self.dropout(x, deterministic=rngs is None, rngs=rngs)
        for layer in self.layers:
            x = layer(x, segment_ids, positions, rngs)
        return self.norm(x)
