"""HSTU: layers of attention without a softmax, gated, and without an MLP (Zhai et al., ICML 2024, arXiv 2402.17152)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from simgr_jax.models.inputs import ModelInputs
from simgr_jax.models.item_sequence import ItemSequenceModel, encoder_config
from simgr_jax.models.transformer import Linear, Norm, TransformerConfig
from simgr_jax.ops.attention import causal_segment_mask


def create(config: ml_collections.ConfigDict, inputs: ModelInputs) -> ItemSequenceModel:
    """
    Raises:
      UserError: a value that the model can't have.
    """
    return ItemSequenceModel(HSTU(encoder_config(config), inputs.rngs), config, inputs)


class HSTU(nnx.Module):
    """An encoder of `ItemSequenceModel`.

    Of the paper's relative bias there is the part that knows how many items lie between two; batches have no
    timestamps for the other. A LayerNorm ends the stack, where the paper's code makes states unit length.

    Args:
      config: its width, layers, heads, head_width, max_positions, norm_epsilon, dropout and dtype count.
    """

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        self.config = config
        self.dropout = nnx.Dropout(config.dropout)
        self.layers = nnx.List([HSTULayer(config, rngs) for _ in range(config.layers)])
        self.final_norm = Norm(config.width, config)

    def __call__(
        self,
        embeddings: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B T D"]:
        x = self.dropout(embeddings.astype(self.config.dtype), deterministic=rngs is None, rngs=rngs)
        mask = causal_segment_mask(segment_ids)
        for layer in self.layers:
            x = layer(x, mask, rngs)
        return self.final_norm(x)


class HSTULayer(nnx.Module):
    """The paper's equations 1 to 3, around which its code has a norm and the residual connection:

        U, V, Q, K = silu(X W);  A = silu(Q Kᵀ + b(t - s)) / n;  Y = X + (norm(A V) ∘ U) W'

    n is the most items that are read, whatever is packed into a row.
    """

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        self.config = config
        inner_width = config.heads * config.head_width
        self.input_norm = Norm(config.width, config)
        self.uvqk = Linear(config.width, 4 * inner_width, False, config, rngs)
        init = nnx.initializers.normal(0.02)
        self.distance_bias = nnx.Param(init(rngs.params(), (config.max_positions, config.heads), jnp.float32))
        self.mixed_norm = Norm(inner_width, config)
        self.dropout = nnx.Dropout(config.dropout)
        self.output = Linear(inner_width, config.width, True, config, rngs)

    def __call__(
        self, x: Float[Array, "B T D"], mask: Bool[Array, "B T T"], rngs: nnx.Rngs | None
    ) -> Float[Array, "B T D"]:
        gate, *by_head = jnp.split(jax.nn.silu(self.uvqk(self.input_norm(x), rngs)), 4, axis=-1)
        value, query, key = (y.reshape(*y.shape[:2], self.config.heads, -1) for y in by_head)
        scores = jnp.einsum("bthd,bshd->bhts", query, key, preferred_element_type=jnp.float32) + self._bias(x.shape[1])
        weights = jnp.where(mask[:, None], jax.nn.silu(scores), 0) / self.config.max_positions
        mixed = jnp.einsum("bhts,bshd->bthd", weights.astype(value.dtype), value).reshape(gate.shape)
        gated = self.dropout(gate * self.mixed_norm(mixed), deterministic=rngs is None, rngs=rngs)
        return x + self.output(gated, rngs)

    def _bias(self, length: int) -> Float[Array, "H T T"]:
        """By distance within the row, which is that within the segment wherever the mask lets it count."""
        positions = jnp.arange(length)
        distance = jnp.clip(positions[:, None] - positions, 0, self.config.max_positions - 1)
        return jnp.moveaxis(self.distance_bias[...][distance], -1, 0)
