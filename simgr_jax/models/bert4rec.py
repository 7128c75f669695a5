"""BERT4Rec: a bidirectional Transformer that predicts masked items (Sun et al., CIKM 2019, arXiv 1904.06690)."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from simgr_jax.inputs.batch import RankBatch, TrainBatch
from simgr_jax.models.item_sequence import TRANSFORMER_KEYS, ItemSequenceModel, encoder_config
from simgr_jax.models.model_inputs import ModelInputs
from simgr_jax.models.options import ModelOptions
from simgr_jax.models.transformer import Transformer
from simgr_jax.ops.attention import segment_mask


@dataclasses.dataclass(frozen=True)
class Options(ModelOptions):
    """
    Attributes:
      mask_fraction: share of a training sequence's items that are masked; at least one item is.
      last_fraction: share of the training sequences in which only the last item is masked, as when recommending.
      label_smoothing: ε of the cross-entropy over the catalog.
    """

    name = "bert4rec"
    windows = "with_target"
    backbone_keys = TRANSFORMER_KEYS

    mask_fraction: float = 0.2
    last_fraction: float = 0.5
    label_smoothing: float = 0.0

    def __post_init__(self):
        self.require(0 < self.mask_fraction < 1, "mask_fraction", "give a fraction between 0 and 1, like 0.2")
        self.require(0 <= self.last_fraction <= 1, "last_fraction", "give a fraction from 0 to 1, like 0.1")
        self.require_label_smoothing()


def create(config: ml_collections.ConfigDict, options: Options, inputs: ModelInputs) -> BERT4Rec:
    """
    Raises:
      UserError: a config value is invalid.
    """
    # A training window is a history and the item after it, and it fits in a row.
    longest = min(config.data.max_items + 1, config.training.row_length or config.data.max_items + 1)
    shape = encoder_config(config, options, causal=False, activation="gelu", max_positions=longest)
    return BERT4Rec(Transformer(shape, inputs.rngs), options, inputs)


class BERT4Rec(ItemSequenceModel):
    """A masked item is read as the mask vector, and its state predicts the item. To recommend, a mask is put after the
    history.

    Unlike in the paper, a norm precedes each residual branch, and the state is the last norm's output: with the
    paper's additional layer (its Eq. 7) the model learned more slowly.

    Args:
      encoder: not causal, with positions for a history and the mask.
    """

    def __init__(self, encoder: Transformer, options: Options, inputs: ModelInputs):
        width = encoder.config.width
        super().__init__(encoder, width, options.label_smoothing, inputs, item_bias=True)
        self.mask_fraction, self.last_fraction = options.mask_fraction, options.last_fraction
        init = nnx.initializers.normal(0.02)
        self.mask_vector = nnx.Param(init(inputs.rngs.params(), (width,), jnp.float32))

    def states_with_hidden(
        self,
        inputs: Int[Array, "B T"],
        hidden: Bool[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B T D"]:
        """The state at each position, float32; the `hidden` inputs are masked."""
        embeddings = jnp.where(hidden[..., None], self.mask_vector[...], self.embed(inputs))
        return self.encoder(embeddings, segment_ids, positions, rngs).astype(jnp.float32)

    def loss(self, batch: TrainBatch, rngs: nnx.Rngs) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        hidden = hide(rngs.dropout(), batch.segment_ids, self.mask_fraction, self.last_fraction)
        states = self.states_with_hidden(batch.inputs, hidden, batch.segment_ids, batch.positions, rngs)
        # Only hidden items are scored against the catalog. Sequences have at least two items, which limits how many.
        most = math.ceil(hidden.shape[1] * max(self.mask_fraction, 0.5))
        valid, places = jax.lax.top_k(hidden.astype(jnp.int32), most)
        states = jnp.take_along_axis(states, places[..., None], axis=1)
        targets = jnp.take_along_axis(batch.inputs, places, axis=1)
        return self.mean_loss(states, targets, valid > 0, rngs), {"targets": jnp.sum(valid)}

    def users(self, batch: RankBatch) -> Float[Array, "B D"]:
        longest = self.encoder.config.max_positions
        # If a history leaves no room for the mask, its oldest item is dropped.
        first = jnp.maximum(batch.lengths - (longest - 1), 0)
        ends = (batch.lengths - first)[:, None]
        positions = jnp.broadcast_to(jnp.arange(longest), (len(batch.inputs), longest))
        inputs = jnp.take_along_axis(batch.inputs, positions + first[:, None], axis=1, mode="clip")
        states = self.states_with_hidden(inputs, positions == ends, (positions <= ends).astype(jnp.int32), positions)
        return jnp.take_along_axis(states, ends[..., None], axis=1)[:, 0]


def hide(key: Array, segment_ids: Int[Array, "B T"], fraction: float, last_fraction: float) -> Bool[Array, "B T"]:
    """Draws the items to mask.

    In a sequence of l items, max(1, ⌊l fraction⌋) random ones are masked; or, with probability `last_fraction`, only
    the last one, as when recommending.

    Args:
      segment_ids: the sequence of each item; 0 is padding, which is never masked.
    """
    order_key, last_key = jax.random.split(key)
    same = segment_mask(segment_ids)
    order = jax.random.uniform(order_key, segment_ids.shape)
    rank = jnp.sum(same & (order[:, None, :] < order[:, :, None]), axis=-1)
    count = jnp.maximum(1, jnp.floor(jnp.sum(same, axis=-1) * fraction))
    is_last = segment_ids != jnp.pad(segment_ids[:, 1:], ((0, 0), (0, 1)))
    # One draw per segment that a row can have.
    last_only = jax.random.uniform(last_key, (len(segment_ids), segment_ids.shape[1] + 1)) < last_fraction
    last_only = jnp.take_along_axis(last_only, segment_ids, axis=1)
    return jnp.where(last_only, is_last, rank < count) & (segment_ids > 0)
