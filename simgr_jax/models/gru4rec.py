"""GRU4Rec: a recurrent network over items (Hidasi et al., ICLR 2016, arXiv 1511.06939), with a cross-entropy over the
catalog (Hidasi & Karatzoglou, CIKM 2018, arXiv 1706.03847, without its sampling)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from simgr_jax.devices import sharding
from simgr_jax.models.item_sequence import ItemSequenceModel, encoder_config
from simgr_jax.models.model_inputs import ModelInputs
from simgr_jax.models.options import ModelOptions
from simgr_jax.models.transformer_config import TransformerConfig


@dataclasses.dataclass(frozen=True)
class Options(ModelOptions):
    """
    Attributes:
      label_smoothing: ε of the cross-entropy over the catalog.
    """

    name = "gru4rec"
    backbone_keys = ("width", "layers", "dropout", "dtype")

    label_smoothing: float = 0.0

    def __post_init__(self):
        self.require_label_smoothing()


def create(config: ml_collections.ConfigDict, options: Options, inputs: ModelInputs) -> ItemSequenceModel:
    """
    Raises:
      UserError: a config value is invalid.
    """
    encoder = StackedGRU(encoder_config(config, options), inputs.rngs)
    return ItemSequenceModel(encoder, encoder.width, options.label_smoothing, inputs, item_bias=True)


class StackedGRU(nnx.Module):
    """An encoder of `ItemSequenceModel`: GRU layers with dropout before each.

    Args:
      config: only its width, layers, dropout and dtype are read.
    """

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        self.width = config.width
        self.dropout = nnx.Dropout(config.dropout)
        self.layers = nnx.List([GRU(config.width, config.dtype, rngs) for _ in range(config.layers)])

    def __call__(
        self,
        embeddings: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B T D"]:
        states = embeddings
        for layer in self.layers:
            graphdef, parameters = nnx.split(layer)
            layer = nnx.merge(graphdef, sharding.gather_kernels(parameters, layer.dtype))
            states = layer(self.dropout(states, deterministic=rngs is None, rngs=rngs), positions == 0)
        return states


class GRU(nnx.Module):
    """A gated recurrent unit (Cho et al., arXiv 1406.1078), as cuDNN computes it:

        r = σ(W_r x + U_r h), z = σ(W_z x + U_z h), n = tanh(W_n x + r ∘ (U_n h)), h' = (1 - z) ∘ n + z ∘ h

    where each product has a bias.
    """

    def __init__(self, width: int, dtype: str, rngs: nnx.Rngs):
        self.dtype = dtype
        axes = ("embed", None)
        self.input = nnx.Linear(width, 3 * width, dtype=dtype, kernel_metadata={"axes": axes}, rngs=rngs)
        square = lambda: nnx.initializers.orthogonal()(rngs.params(), (width, width), jnp.float32)  # noqa: E731
        self.recurrent_kernel = nnx.Param(jnp.concatenate([square() for _ in range(3)], axis=1), axes=axes)
        self.recurrent_bias = nnx.Param(jnp.zeros(3 * width, jnp.float32))

    def __call__(self, x: Float[Array, "B T D"], is_first: Bool[Array, "B T"]) -> Float[Array, "B T D"]:
        """The states, float32. Each input with `is_first` starts from a zero state."""
        kernel, bias = self.recurrent_kernel[...].astype(self.dtype), self.recurrent_bias[...]

        def step(state, now):
            from_input, is_first = now
            state = jnp.where(is_first[:, None], 0, state)
            reset, update, new = jnp.split(from_input.astype(jnp.float32), 3, axis=-1)
            from_state = (state.astype(self.dtype) @ kernel).astype(jnp.float32) + bias
            state_reset, state_update, state_new = jnp.split(from_state, 3, axis=-1)
            update = jax.nn.sigmoid(update + state_update)
            new = jnp.tanh(new + jax.nn.sigmoid(reset + state_reset) * state_new)
            state = (1 - update) * new + update * state
            return state, state

        by_time = jnp.swapaxes(self.input(x), 0, 1), jnp.swapaxes(is_first, 0, 1)
        _, states = jax.lax.scan(step, jnp.zeros((x.shape[0], x.shape[2]), jnp.float32), by_time)
        return jnp.swapaxes(states, 0, 1)
