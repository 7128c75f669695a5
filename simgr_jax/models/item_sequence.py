"""The base of recommenders that know items by their index: each item has an embedding, an encoder makes the user's
state from the history, and their dot product is the score."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from simgr_jax.devices import sharding
from simgr_jax.inputs.batch import RankBatch, TrainBatch
from simgr_jax.models.embed_tokens import new_embedding
from simgr_jax.models.model_inputs import ModelInputs
from simgr_jax.models.options import COMPUTATION_KEYS, ModelOptions
from simgr_jax.models.transformer_config import TransformerConfig
from simgr_jax.ops.similarity_loss import full_catalog_cross_entropy, mean_of_valid
from simgr_jax.ops.top_k import Ranking, rank_catalog, without_history

# The keys of `config.backbone` that a Transformer encoder of these models reads.
TRANSFORMER_KEYS = ("width", "layers", "heads", "head_width", "mlp_width", "norm_epsilon", *COMPUTATION_KEYS)


def encoder_config(config: ml_collections.ConfigDict, options: ModelOptions, **changes) -> TransformerConfig:
    """The shape of an encoder as in the SASRec and BERT4Rec papers, with the sizes from `config.backbone`.

    It has LayerNorm, biases, an MLP without a gate, and one learned position per item of a training window.

    Args:
      options: the model's; only its `backbone_keys` are read.
      changes: fields to replace.

    Raises:
      UserError: a config value is invalid.
    """
    # Sizes that the model does not read are 1.
    sizes = dict.fromkeys(("heads", "head_width", "mlp_width"), 1)
    shape = sizes | {key: config.backbone[key] for key in options.backbone_keys}
    shape |= {
        "kv_heads": shape["heads"],
        "rope": (),
        "windows": (0,) * shape["layers"],
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

    p(i | u) = exp(u·v_i + b_i) / Σ_j exp(u·v_j + b_j). The embeddings v are also the encoder's inputs.

    Args:
      encoder: (embeddings [B, T, D], segment_ids [B, T], positions [B, T], rngs or None) -> states [B, T, D]. A state
        depends only on its segment up to its position. The rngs have a "dropout" stream in training.
      width: D, of the encoder's states.
      label_smoothing: ε of the cross-entropy.
      item_bias: whether items have a bias b.
    """

    def __init__(
        self,
        encoder: nnx.Module,
        width: int,
        label_smoothing: float,
        inputs: ModelInputs,
        *,
        item_bias: bool = False,
    ):
        self.num_items, self.label_smoothing = inputs.num_items, label_smoothing
        self.encoder = encoder
        self.embedding = new_embedding(self.num_items, width, inputs.rngs)
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
        """The mean of `losses` over the valid targets."""
        losses = self.losses(states.reshape(-1, states.shape[-1]), targets.reshape(-1), rngs)
        return mean_of_valid(losses, valid.reshape(-1))

    def losses(self, states: Float[Array, "M D"], targets: Int[Array, " M"], rngs: nnx.Rngs) -> Float[Array, " M"]:
        """Each state's cross-entropy over the whole catalog."""
        queries = self._with_bias(states, 1)
        return full_catalog_cross_entropy(queries, self.catalog(), targets, 1.0, self.label_smoothing)

    def catalog(self) -> Float[Array, "N E"]:
        """The items' embeddings, E = D. If items have biases, these are the last column, and E = D + 1."""
        vectors = sharding.constrain(self.embedding[...], None, None)
        return self._with_bias(vectors, None if self.item_bias is None else self.item_bias[...])

    def _with_bias(self, vectors: Float[Array, "M D"], last: Float[Array, " M"] | int | None) -> Float[Array, "M E"]:
        """Appends a column if items have biases, so that a dot product includes the bias."""
        if self.item_bias is None:
            return vectors
        last = jnp.broadcast_to(jnp.float32(last), len(vectors))
        return jnp.concatenate([vectors, last[:, None]], axis=1)

    def users(self, batch: RankBatch) -> Float[Array, "B D"]:
        """The users' states after their whole histories."""
        return batch.at_end(self.states(batch.inputs, batch.segment_ids, batch.positions))

    def rank(self, batch: RankBatch, catalog: Float[Array, "N E"], k: int, filter_history: bool) -> Ranking:
        scores = self._scores(batch, catalog)
        if filter_history:
            scores = without_history(scores, batch.history)
        return rank_catalog(scores, batch.targets, k)

    def log_probabilities(self, batch: RankBatch, catalog: Float[Array, "N E"]) -> Float[Array, "B N"]:
        return jax.nn.log_softmax(self._scores(batch, catalog))

    def _scores(self, batch: RankBatch, catalog: Float[Array, "N E"]) -> Float[Array, "B N"]:
        return sharding.constrain(self.user_vectors(batch, catalog) @ catalog.T, "batch", None)

    def item_vectors(self, catalog: Float[Array, "N E"]) -> Float[Array, "N E"]:
        return catalog

    def user_vectors(self, batch: RankBatch, catalog: Float[Array, "N E"]) -> Float[Array, "B E"]:
        return self._with_bias(self.users(batch), 1)
