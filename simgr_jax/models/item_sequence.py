"""What recommenders that know items by their index alone have in common: each item has an embedding, a history has an
encoder's state, and their dot product is the score."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from simgr_jax import sharding
from simgr_jax.batch import RankBatch, TrainBatch
from simgr_jax.errors import UserError
from simgr_jax.models.create import COMPUTATION_KEYS
from simgr_jax.models.inputs import ModelInputs, check_label_smoothing
from simgr_jax.models.token_embeddings import new_embedding
from simgr_jax.models.transformer import TransformerConfig
from simgr_jax.ops.similarity_loss import full_catalog_cross_entropy, mean_of_valid
from simgr_jax.ops.top_k import Ranking, rank_catalog, without_history

# What of `config.backbone` these models have.
_BACKBONE_KEYS = ("width", "layers", "heads", "head_width", "mlp_width", "norm_epsilon")


def encoder_config(config: ml_collections.ConfigDict, **changes) -> TransformerConfig:
    """The shape of an encoder as the papers of SASRec and BERT4Rec have it, as large as `config.backbone`.

    LayerNorm, biases, and an MLP without a gate. As many positions are learned as a training window has items.

    Args:
      changes: fields that differ.

    Raises:
      UserError: histories are not items, or a value that no encoder can have.
    """
    if config.model.history != "item":
        raise UserError(
            f'config.model.history: {config.model.name} reads items, not "{config.model.history}"; set it to "item"'
        )
    check_label_smoothing(config.loss.label_smoothing)
    shape = {key: config.backbone[key] for key in _BACKBONE_KEYS + COMPUTATION_KEYS}
    shape |= {
        "kv_heads": config.backbone.heads,
        "rope": (),
        "windows": (0,) * config.backbone.layers,
        "max_positions": config.data.max_items,
        "norm": "layer",
        "attention_bias": True,
        "attention_output_bias": True,
        "mlp_bias": True,
        "gated_mlp": False,
    }
    return TransformerConfig(**shape | changes)


class ItemSequenceModel(nnx.Module):
    """Implements `recommender.Recommender` with an encoder that reads from left to right.

    p(i | u) = exp(u·v_i + b_i) / Σ_j exp(u·v_j + b_j), and a history is read by the same embeddings v that score it.

    Args:
      encoder: (embeddings [B, T, D], segment_ids [B, T], positions [B, T], rngs or None) -> states [B, T, D], each of
        what its segment holds up to there; "dropout" of the rngs is for training.
      config: a run's; states are of its backbone's width D, and it has the label smoothing.
      item_bias: whether items have a bias b.
    """

    windows = "history"

    def __init__(
        self,
        encoder: nnx.Module,
        config: ml_collections.ConfigDict,
        inputs: ModelInputs,
        *,
        item_bias: bool = False,
    ):
        self.num_items, self.label_smoothing = inputs.semantic_ids.num_items, config.loss.label_smoothing
        self.encoder = encoder
        self.embedding = new_embedding(self.num_items, config.backbone.width, inputs.rngs)
        self.item_bias = nnx.Param(jnp.zeros(self.num_items, jnp.float32)) if item_bias else None

    def embed(self, items: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return sharding.constrain(self.embedding[...], None, None)[items]

    def states(
        self,
        inputs: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B T D"]:
        """The user's state after each input, float32."""
        return self.encoder(self.embed(inputs), segment_ids, positions, rngs).astype(jnp.float32)

    def loss(self, batch: TrainBatch, rngs: nnx.Rngs) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        states = self.states(batch.inputs, batch.segment_ids, batch.positions, rngs)
        return self.mean_loss(batch.at_readouts(states), batch.targets, batch.valid, rngs), {}

    def mean_loss(
        self,
        states: Float[Array, "B R D"],
        targets: Int[Array, "B R"],
        valid: Bool[Array, "B R"],
        rngs: nnx.Rngs,
    ) -> Float[Array, ""]:
        """Over the valid targets."""
        losses = self.losses(states.reshape(-1, states.shape[-1]), targets.reshape(-1), rngs)
        return mean_of_valid(losses, valid.reshape(-1))

    def losses(self, states: Float[Array, "M D"], targets: Int[Array, " M"], rngs: nnx.Rngs) -> Float[Array, " M"]:
        """Each state's cross-entropy over the whole catalog."""
        queries = self._with_bias(states, 1)
        return full_catalog_cross_entropy(queries, self.catalog(), targets, 1.0, self.label_smoothing)

    def catalog(self) -> Float[Array, "N E"]:
        """The items' embeddings, E = D; with biases E = D + 1, the bias last."""
        vectors = sharding.constrain(self.embedding[...], None, None)
        return self._with_bias(vectors, None if self.item_bias is None else self.item_bias[...])

    def _with_bias(self, vectors: Float[Array, "M D"], last: Float[Array, " M"] | int | None) -> Float[Array, "M E"]:
        """With one column more where items have biases, so that a dot product has the bias in it."""
        if self.item_bias is None:
            return vectors
        last = jnp.broadcast_to(jnp.float32(last), len(vectors))
        return jnp.concatenate([vectors, last[:, None]], axis=1)

    def users(self, batch: RankBatch) -> Float[Array, "B D"]:
        """The users after their whole histories."""
        return batch.at_end(self.states(batch.inputs, batch.segment_ids, batch.positions))

    def rank(self, batch: RankBatch, catalog: Float[Array, "N E"], k: int, filter_history: bool) -> Ranking:
        scores = self._scores(batch, catalog)
        if filter_history:
            scores = without_history(scores, batch.history)
        return rank_catalog(scores, batch.targets, k)

    def log_probabilities(self, batch: RankBatch, catalog: Float[Array, "N E"]) -> Float[Array, "B N"]:
        return jax.nn.log_softmax(self._scores(batch, catalog))

    def _scores(self, batch: RankBatch, catalog: Float[Array, "N E"]) -> Float[Array, "B N"]:
        return sharding.constrain(self._with_bias(self.users(batch), 1) @ catalog.T, "batch", None)
