"""HSTU: gated attention layers, without a softmax and without an MLP (Zhai et al., ICML 2024, arXiv 2402.17152)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from simgr_jax.devices import sharding
from simgr_jax.models.item_sequence import ItemSequenceModel, encoder_config
from simgr_jax.models.linear import Linear
from simgr_jax.models.model_inputs import ModelInputs
from simgr_jax.models.norm import Norm
from simgr_jax.models.options import ModelOptions
from simgr_jax.models.transformer_config import TransformerConfig
from simgr_jax.ops.attention import causal_segment_mask


@dataclasses.dataclass(frozen=True)
class Options(ModelOptions):
    """
    Attributes:
      label_smoothing: ε of the cross-entropy over the catalog.
    """

    name = "hstu"
    backbone_keys = ("width", "layers", "heads", "head_width", "norm_epsilon", "dropout", "dtype")

    label_smoothing: float = 0.0

    def __post_init__(self):
        self.require_label_smoothing()


def create(config: ml_collections.ConfigDict, options: Options, inputs: ModelInputs) -> ItemSequenceModel:
    """
    Raises:
      UserError: a config value is invalid.
    """
    encoder = HSTU(encoder_config(config, options), inputs.rngs)
    return ItemSequenceModel(encoder, encoder.config.width, options.label_smoothing, inputs)


class HSTU(nnx.Module):
    """An encoder for `ItemSequenceModel`.

    The paper's relative bias depends on the number of items and on the time between two items; here it depends only on
    the number, because batches have no timestamps. The stack ends with a LayerNorm; the paper's code normalizes states
    to unit length instead.

    Args:
      config: only its width, layers, heads, head_width, max_positions, norm_epsilon, dropout and dtype are read.
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
            graphdef, parameters = nnx.split(layer)
            layer = nnx.merge(graphdef, sharding.gather_kernels(parameters, self.config.dtype))
            x = layer(x, mask, rngs)
        return self.final_norm(x)


class HSTULayer(nnx.Module):
    """The paper's equations 1 to 3, with the norm and the residual connection of its code:

        U, V, Q, K = silu(X W);  A = silu(Q Kᵀ + b(t - s)) / n;  Y = X + (norm(A V) ∘ U) W'

    n is the largest number of items in a history, however rows are packed.
    """

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        self.config = config
        inner_width = config.heads * config.head_width
        self.input_norm = Norm(config.width, config)
        self.uvqk = Linear(config.width, 4 * inner_width, False, config.dtype, rngs, ("embed", None))
        init = nnx.initializers.normal(0.02)
        self.distance_bias = nnx.Param(init(rngs.params(), (config.max_positions, config.heads), jnp.float32))
        self.mixed_norm = Norm(inner_width, config)
        self.dropout = nnx.Dropout(config.dropout)
        self.output = Linear(inner_width, config.width, True, config.dtype, rngs, (None, "embed"))

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
        """The bias by distance in the row. Wherever the mask is open, this equals the distance in the segment."""
        positions = jnp.arange(length)
        distance = jnp.clip(positions[:, None] - positions, 0, self.config.max_positions - 1)
        return jnp.moveaxis(self.distance_bias[...][distance], -1, 0)
