"""What the layers of Gemma 4's small models (https://ai.google.dev/gemma/docs/core/model_card_4) read of the inputs
themselves, beside the states of the layer before."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from simgr_jax.models.linear import Linear
from simgr_jax.models.mlp import ACTIVATIONS
from simgr_jax.models.norm import Norm
from simgr_jax.models.transformer_config import TransformerConfig


class PerLayerInputs(nnx.Module):
    """For each layer, a projection of the inputs plus the tokens' embeddings for this layer."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        self.config = config
        shape = config.width, config.per_layer_count * config.per_layer_width
        self.projection = nnx.Param(
            nnx.initializers.normal(0.02)(rngs.params(), shape, jnp.float32), axes=("embed", None)
        )
        self.norm = Norm(config.per_layer_width, config)

    def __call__(
        self, x: Float[Array, "B T D"], embeddings: Float[Array, "B T layers*P"] | None
    ) -> Float[Array, "layers B T P"]:
        """
        Args:
          x: the first layer's input.
          embeddings: of the tokens; None, or zeros, for inputs that are no tokens of the checkpoint.
        """
        layers, width = self.config.per_layer_count, self.config.per_layer_width
        by_layer = lambda y: y.reshape(*y.shape[:2], layers, width)  # noqa: E731
        projected = x @ self.projection[...].astype(x.dtype)
        total = self.norm(by_layer(projected) * self.config.width**-0.5)
        if embeddings is not None:
            total = total + (by_layer(embeddings) * width**0.5).astype(x.dtype)
        return jnp.moveaxis(total * 2**-0.5, 2, 0)


class PerLayerInput(nnx.Module):
    """A layer's part: what it reads, gated by its states, is added to them."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        self.activation = config.activation
        width, inner, dtype = config.width, config.per_layer_width, config.dtype
        self.per_layer_gate = Linear(width, inner, False, dtype, rngs, ("embed", None))
        self.per_layer_proj = Linear(inner, width, False, dtype, rngs, (None, "embed"))
        self.norm = Norm(config.width, config)

    def __call__(
        self, x: Float[Array, "B Q D"], per_layer: Float[Array, "B Q P"], rngs: nnx.Rngs | None
    ) -> Float[Array, "B Q D"]:
        gate = ACTIVATIONS[self.activation](self.per_layer_gate(x, rngs))
        return self.norm(self.per_layer_proj(gate * per_layer, rngs))
