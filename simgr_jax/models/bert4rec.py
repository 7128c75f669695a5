"""BERT4Rec: a Transformer that sees a history from both sides and fills in hidden items (Sun et al., CIKM 2019,
arXiv 1904.06690)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from simgr_jax.batch import RankBatch, TrainBatch
from simgr_jax.errors import UserError
from simgr_jax.models.inputs import ModelInputs
from simgr_jax.models.item_sequence import ItemSequenceModel, encoder_config
from simgr_jax.models.transformer import Transformer
from simgr_jax.ops.attention import segment_mask


def create(config: ml_collections.ConfigDict, inputs: ModelInputs) -> BERT4Rec:
    """
    Raises:
      UserError: a value that the model can't have.
    """
    options = config.bert4rec
    if not 0 < options.mask_fraction < 1:
        raise UserError(f"config.bert4rec.mask_fraction: {options.mask_fraction} is not in (0, 1); give one like 0.2")
    if not 0 <= options.last_fraction <= 1:
        raise UserError(f"config.bert4rec.last_fraction: {options.last_fraction} is not in [0, 1]; give one like 0.1")
    # A training window is a history and the item after it; it fits into a row.
    longest = min(config.data.max_items + 1, config.training.row_length)
    shape = encoder_config(config, causal=False, activation="gelu", max_positions=longest)
    return BERT4Rec(Transformer(shape, inputs.rngs), config, inputs)


class BERT4Rec(ItemSequenceModel):
    """A hidden item is read as the mask, and its state is asked for the item. To recommend is to fill in what follows
    the history.

    Unlike in the paper, norms are before the layers' branches, and the state is the last norm's output, not that of one
    more layer (its Eq. 7), with which the model learned more slowly.

    Args:
      encoder: not causal; it has positions for a history and the mask.
    """

    windows = "with_target"

    def __init__(self, encoder: Transformer, config: ml_collections.ConfigDict, inputs: ModelInputs):
        super().__init__(encoder, config, inputs, item_bias=True)
        self.mask_fraction, self.last_fraction = config.bert4rec.mask_fraction, config.bert4rec.last_fraction
        init = nnx.initializers.normal(0.02)
        self.mask_vector = nnx.Param(init(inputs.rngs.params(), (config.backbone.width,), jnp.float32))

    def states_with_hidden(
        self,
        inputs: Int[Array, "B T"],
        hidden: Bool[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B T D"]:
        """The state at each position, float32, where the `hidden` inputs are not seen."""
        embeddings = jnp.where(hidden[..., None], self.mask_vector[...], self.embed(inputs))
        return self.encoder(embeddings, segment_ids, positions, rngs).astype(jnp.float32)

    def loss(self, batch: TrainBatch, rngs: nnx.Rngs) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        hidden = hide(rngs.dropout(), batch.segment_ids, self.mask_fraction, self.last_fraction)
        states = self.states_with_hidden(batch.inputs, hidden, batch.segment_ids, batch.positions, rngs)
        # A sequence has two items at least, so that no more than this can be hidden; the catalog is not scored for the
        # others.
        most = math.ceil(hidden.shape[1] * max(self.mask_fraction, 0.5))
        valid, places = jax.lax.top_k(hidden.astype(jnp.int32), most)
        states = jnp.take_along_axis(states, places[..., None], axis=1)
        targets = jnp.take_along_axis(batch.inputs, places, axis=1)
        return self.mean_loss(states, targets, valid > 0, rngs), {"targets": jnp.sum(valid)}

    def users(self, batch: RankBatch) -> Float[Array, "B D"]:
        longest = self.encoder.config.max_positions
        # Where there is no room for the mask after a history, its oldest item goes.
        first = jnp.maximum(batch.lengths - (longest - 1), 0)
        ends = (batch.lengths - first)[:, None]
        positions = jnp.broadcast_to(jnp.arange(longest), (len(batch.inputs), longest))
        inputs = jnp.take_along_axis(batch.inputs, positions + first[:, None], axis=1, mode="clip")
        states = self.states_with_hidden(inputs, positions == ends, (positions <= ends).astype(jnp.int32), positions)
        return jnp.take_along_axis(states, ends[..., None], axis=1)[:, 0]


def hide(key: Array, segment_ids: Int[Array, "B T"], fraction: float, last_fraction: float) -> Bool[Array, "B T"]:
    """Draws the items that a model has to fill in.

    Of a sequence of l items these are max(1, ⌊l fraction⌋), all choices as likely; but with probability `last_fraction`
    the last one alone, as when recommending.

    Args:
      segment_ids: of the sequences; 0 is padding, of which nothing is hidden.
    """
    order_key, last_key = jax.random.split(key)
    same = segment_mask(segment_ids)
    order = jax.random.uniform(order_key, segment_ids.shape)
    rank = jnp.sum(same & (order[:, None, :] < order[:, :, None]), axis=-1)
    count = jnp.maximum(1, jnp.floor(jnp.sum(same, axis=-1) * fraction))
    is_last = segment_ids != jnp.pad(segment_ids[:, 1:], ((0, 0), (0, 1)))
    # One draw for each segment that a row can have.
    last_only = jax.random.uniform(last_key, (len(segment_ids), segment_ids.shape[1] + 1)) < last_fraction
    last_only = jnp.take_along_axis(last_only, segment_ids, axis=1)
    return jnp.where(last_only, is_last, rank < count) & (segment_ids > 0)
