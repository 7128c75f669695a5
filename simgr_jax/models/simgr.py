"""SimGR: a user is the backbone's state after a history, an item is the aggregate of its semantic-ID tokens, and both
live in one space where similarity scores every item at once (arXiv 2602.07847)."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from simgr_jax import sharding
from simgr_jax.batch import RankBatch, TrainBatch
from simgr_jax.errors import UserError
from simgr_jax.models import item_encoders, user_pooling
from simgr_jax.models.inputs import Catalog, ModelInputs, check_label_smoothing
from simgr_jax.models.token_embeddings import embed_tokens, new_embedding
from simgr_jax.models.transformer import Transformer
from simgr_jax.ops import sampled_loss
from simgr_jax.ops.sampled_loss import Negatives, sampled_cross_entropy
from simgr_jax.ops.similarity_loss import (
    SIMILARITIES,
    full_catalog_cross_entropy,
    in_batch_cross_entropy,
    mean_of_valid,
    to_similarity_space,
)
from simgr_jax.ops.streamed_loss import choose_chunk, streamed_cross_entropy
from simgr_jax.ops.top_k import Ranking, rank_catalog, without_history

# As `catalog_chunk`.
AUTO_CHUNK = -1

SAMPLED_FROM = ("uniform", "popularity")


@dataclasses.dataclass(frozen=True)
class SimGRConfig:
    """The head around the backbone.

    Attributes:
      history: "item" gives the backbone one position an item, its vector; "tokens" gives it token embeddings.
      user_pooling: see `user_pooling.POOLINGS`.
      item_encoder: see `item_encoders.ITEM_ENCODERS`.
      item_encoder_width: inner width of the MLP encoders.
      similarity: "cosine" or "dot".
      temperature: τ, or its first value where it is learned.
      learn_temperature: whether τ is a parameter.
      temperature_min, temperature_max: bounds of a learned τ.
      full_catalog_weight, sampled_weight, in_batch_weight: weights of the losses; one of weight 0 is not computed.
      sampled_negatives: items that the sampled loss draws for each batch.
      sampled_from: "uniform", or "popularity", as likely as their number in training plus one.
      log_q: whether the in-batch loss corrects for the items' frequency.
      label_smoothing: ε of all losses.
      catalog_chunk: items that the full-catalog loss encodes and scores at once; 0 is all, and keeps them; AUTO_CHUNK
        chooses by the device's memory.
    """

    history: str
    user_pooling: str
    item_encoder: str
    item_encoder_width: int
    similarity: str
    temperature: float
    learn_temperature: bool
    temperature_min: float
    temperature_max: float
    full_catalog_weight: float
    sampled_weight: float
    sampled_negatives: int
    sampled_from: str
    in_batch_weight: float
    log_q: bool
    label_smoothing: float
    catalog_chunk: int

    def __post_init__(self):
        if self.history not in ("item", "tokens"):
            raise UserError(f'config.model.history: "{self.history}" is unknown; choose "item" or "tokens"')
        if self.similarity not in SIMILARITIES:
            raise UserError(
                f'config.model.similarity: "{self.similarity}" is unknown; choose one of {", ".join(SIMILARITIES)}'
            )
        if not 0 < self.temperature_min <= self.temperature <= self.temperature_max:
            raise UserError(
                f"config.model.temperature: {self.temperature} is not in [temperature_min, temperature_max] = "
                f"[{self.temperature_min}, {self.temperature_max}]; give a positive one between them"
            )
        weights = self.full_catalog_weight, self.sampled_weight, self.in_batch_weight
        if min(weights) < 0 or not any(weights):
            raise UserError(
                "config.loss.full_catalog_weight, sampled_weight, in_batch_weight: one is negative, or all are zero; "
                "give one that is positive"
            )
        if self.sampled_negatives < 1:
            raise UserError(
                f"config.loss.sampled_negatives: {self.sampled_negatives} is too few; give a number from 1, like 4096"
            )
        if self.sampled_from not in SAMPLED_FROM:
            raise UserError(
                f'config.loss.sampled_from: "{self.sampled_from}" is unknown; choose one of {", ".join(SAMPLED_FROM)}'
            )
        if self.catalog_chunk < AUTO_CHUNK:
            raise UserError(
                f"config.loss.catalog_chunk: can't be {self.catalog_chunk}; give a number of items, 0 for all at once, "
                f"or {AUTO_CHUNK} to have it chosen by memory"
            )
        check_label_smoothing(self.label_smoothing)


def create(config: ml_collections.ConfigDict, inputs: ModelInputs) -> SimGR:
    head = config.model.to_dict()
    del head["name"]
    head = SimGRConfig(**head, **config.loss)
    backbone = inputs.backbone()
    return SimGR(
        head,
        backbone.decoder,
        inputs.semantic_ids.tokens,
        inputs.semantic_ids.codebook_sizes,
        inputs.item_counts,
        inputs.rngs,
        embedding=backbone.embedding,
        text_embedding=backbone.text_embedding,
    )


class SimGR(nnx.Module):
    """Implements `recommender.Recommender`.

    Args:
      tokens: int32 [N, L], rows of the embedding table that spell each item.
      codebook_sizes: tokens of each level; they sum to the table's length V.
      item_counts: int [N], how often each item trains (for the log-Q correction, and negatives drawn by popularity).
      embedding: where the semantic-ID tokens' embeddings begin; None begins at random.
      text_embedding: [W, D], the embeddings of the LLM's own tokens that prompts have, if they have any.
    """

    windows = "history"

    def __init__(
        self,
        config: SimGRConfig,
        backbone: Transformer,
        tokens: np.ndarray,
        codebook_sizes: tuple[int, ...],
        item_counts: np.ndarray,
        rngs: nnx.Rngs,
        *,
        embedding: Float[Array, "V D"] | None = None,
        text_embedding: nnx.Variable | None = None,
    ):
        self.config = config
        self.num_items = len(tokens)
        # Every device has as many items; those that fill up the last ones' parts never count.
        padding = (0, -len(tokens) % sharding.shards("items"))
        self.tokens = Catalog(jnp.asarray(np.pad(tokens, (padding, (0, 0))), jnp.int32))
        # One added to every count keeps log q finite for items that never train.
        log_q = np.log((item_counts + 1) / (item_counts + 1).sum())
        self.log_q = Catalog(jnp.asarray(np.pad(log_q, padding), jnp.float32))
        if config.sampled_weight and config.sampled_from == "popularity":
            self.cumulative_weights = Catalog(jnp.asarray(sampled_loss.cumulative_weights(item_counts)))
        twins, twin_group = _twins(tokens)
        self.twins = Catalog(jnp.asarray(twins, jnp.int32))
        self.twin_group = Catalog(jnp.asarray(np.pad(twin_group, padding, constant_values=-1), jnp.int32))

        width, heads = backbone.config.width, backbone.config.heads
        self.embedding = new_embedding(sum(codebook_sizes), width, rngs, embedding)
        self.text_embedding = text_embedding
        self.item_encoder = item_encoders.create(
            config.item_encoder, width, heads, config.item_encoder_width, codebook_sizes, rngs
        )
        self.backbone = backbone
        self.user_pooling = user_pooling.create(config.user_pooling, width, rngs)
        log_temperature = jnp.log(jnp.float32(config.temperature))
        self.log_temperature = nnx.Param(log_temperature) if config.learn_temperature else Catalog(log_temperature)

    @property
    def temperature(self) -> Float[Array, ""]:
        learned = self.log_temperature[...]
        bounded = jnp.clip(learned, jnp.log(self.config.temperature_min), jnp.log(self.config.temperature_max))
        # The gradient passes the clip, or a temperature that once overshot a bound would stay there for good.
        return jnp.exp(learned + jax.lax.stop_gradient(bounded - learned))

    def encode_items(self, items: Int[Array, " M"] | None = None) -> Float[Array, "M D"]:
        """Item vectors before the similarity's normalisation; of the whole catalog if `items` is None."""
        tokens = self.tokens[...] if items is None else self.tokens[items]
        encoder, table = self._whole_encoder()
        return encoder(table, tokens)

    def _whole_encoder(self) -> tuple[nnx.Module, Float[Array, "V D"]]:
        """The item encoder and the table of token embeddings, gathered on every device: they are small, and read by
        all."""
        graphdef, parameters = nnx.split(self.item_encoder)
        encoder = nnx.merge(graphdef, sharding.gather_kernels(parameters, "float32"))
        return encoder, sharding.constrain(self.embedding[...], None, None)

    def user_states(
        self,
        inputs: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        item_vectors: Float[Array, "N D"] | None,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B T D"]:
        """The user's state after each input.

        Args:
          inputs: items with history "item"; token ids with "tokens" (see `data.prompts.Prompt`).
          item_vectors: `encode_items()` where it has been computed already; None encodes the batch's items.
        """
        embeddings = self._embed(inputs, item_vectors)
        return self.user_pooling(self.backbone(embeddings, segment_ids, positions, rngs), segment_ids)

    def _embed(self, inputs: Int[Array, "B T"], item_vectors: Float[Array, "N D"] | None) -> Float[Array, "B T D"]:
        """What the backbone reads, of `user_states`' arguments."""
        if self.config.history == "tokens":
            return embed_tokens(self.embedding, self.text_embedding, inputs)
        if item_vectors is None:
            return self.encode_items(inputs.reshape(-1)).reshape(*inputs.shape, -1)
        return item_vectors[inputs]

    def loss(self, batch: TrainBatch, rngs: nnx.Rngs) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        config = self.config
        chunk = self._catalog_chunk(batch.targets.size)
        # Where the catalog is split, its vectors are nowhere together.
        dense = config.full_catalog_weight and not chunk and not sharding.item_axes()
        item_vectors = self.encode_items() if dense else None
        states = self.user_states(batch.inputs, batch.segment_ids, batch.positions, item_vectors, rngs)
        states = batch.at_readouts(states).reshape(-1, states.shape[-1])
        states = to_similarity_space(states, config.similarity)
        targets, valid = batch.targets.reshape(-1), batch.valid.reshape(-1)
        temperature = self.temperature

        def vectors_of(items):
            vectors = self.encode_items(items) if item_vectors is None else item_vectors[items]
            return to_similarity_space(vectors, config.similarity)

        target_vectors = vectors_of(targets)
        loss, scalars = jnp.float32(0), {"temperature": temperature}
        if config.full_catalog_weight:
            if dense:
                vectors = to_similarity_space(item_vectors, config.similarity)
                losses = full_catalog_cross_entropy(states, vectors, targets, temperature, config.label_smoothing)
            else:
                losses = self._streamed_cross_entropy(states, target_vectors, temperature, chunk)
            scalars["full_catalog_loss"] = mean_of_valid(losses, valid)
            loss += config.full_catalog_weight * scalars["full_catalog_loss"]
        if config.sampled_weight:
            negatives = self._draw_negatives(rngs.negatives())
            losses = sampled_cross_entropy(
                states,
                target_vectors,
                targets,
                negatives,
                vectors_of(negatives.items),
                self.num_items,
                temperature,
                config.label_smoothing,
            )
            scalars["sampled_loss"] = mean_of_valid(losses, valid)
            loss += config.sampled_weight * scalars["sampled_loss"]
        if config.in_batch_weight:
            log_q = self.log_q[targets] if config.log_q else None
            losses = in_batch_cross_entropy(
                states, target_vectors, targets, valid, temperature, log_q, config.label_smoothing
            )
            scalars["in_batch_loss"] = mean_of_valid(losses, valid)
            loss += config.in_batch_weight * scalars["in_batch_loss"]
        return loss, scalars

    def _draw_negatives(self, key: Array) -> Negatives:
        count = self.config.sampled_negatives
        if self.config.sampled_from == "uniform":
            return sampled_loss.uniform_negatives(key, self.num_items, count)
        return sampled_loss.popularity_negatives(key, self.cumulative_weights[...], count)

    def _streamed_cross_entropy(
        self,
        states: Float[Array, "B D"],
        target_vectors: Float[Array, "B D"],
        temperature: Float[Array, ""],
        chunk: int,
    ) -> Float[Array, " B"]:
        encoder, table = self._whole_encoder()
        graphdef, parameters = nnx.split(encoder)

        def encode(learned, tokens):
            parameters, tables = learned
            vectors = nnx.merge(graphdef, parameters).combine(tables, tokens)
            return to_similarity_space(vectors, self.config.similarity)

        return streamed_cross_entropy(
            encode,
            (parameters, encoder.tables(table)),
            self.tokens[...],
            self.num_items,
            states,
            target_vectors,
            temperature,
            self.config.label_smoothing,
            chunk,
        )

    def _catalog_chunk(self, num_queries: int) -> int:
        """How many of a device's items the full-catalog loss takes at once; 0 is all."""
        if self.config.catalog_chunk != AUTO_CHUNK:
            return self.config.catalog_chunk
        return choose_chunk(
            len(self.tokens) // sharding.shards("items"),
            num_queries // sharding.shards("queries"),
            self.embedding.shape[1],
            sharding.device_memory(),
        )

    @property
    def has_collisions(self) -> bool:
        """Whether some items have the same tokens, and so one score."""
        return len(self.twins) > 0

    def first_with_same_tokens(self) -> Int[np.ndarray, " N"]:
        """For each item, the first item that has the same tokens; int32."""
        group = np.asarray(self.twin_group)
        return np.where(group >= 0, np.asarray(self.twins)[group], np.arange(len(group), dtype=np.int32))

    def catalog(self) -> Float[Array, "N D"]:
        """Item vectors before the similarity's normalisation; where the catalog is split, padded at the end."""
        return sharding.constrain(self.encode_items(), "items", None)

    def log_probabilities(self, batch: RankBatch, catalog: Float[Array, "N D"]) -> Float[Array, "B N"]:
        vectors = to_similarity_space(catalog[: self.num_items], self.config.similarity)
        scores = self._users(batch, catalog) @ vectors.T
        if len(self.twins):
            # As `_share_scores`, of a catalog that is whole.
            group = self.twin_group[: self.num_items]
            scores = jnp.where(group >= 0, scores[:, self.twins[...]][:, group], scores)
        return jax.nn.log_softmax(scores / self.temperature)

    def rank(self, batch: RankBatch, catalog: Float[Array, "N D"], k: int, filter_history: bool) -> Ranking:
        users = self._users(batch, catalog)
        by_user, by_item = sharding.spec("queries"), sharding.spec("items")
        rank = sharding.per_device(
            partial(self._rank, k, filter_history),
            (by_user, by_item, sharding.spec(), by_item, by_user, by_user),
            by_user,
            check_vma=False,  # It can't tell that what all_gather brings together is the same everywhere.
        )
        return rank(users, catalog, self.twins[...], self.twin_group[...], batch.history, batch.targets)

    def _users(self, batch: RankBatch, catalog: Float[Array, "N D"]) -> Float[Array, "B D"]:
        """The users after their whole histories, in the similarity's space."""
        item_vectors = None if sharding.item_axes() else catalog
        if isinstance(self.user_pooling, user_pooling.LastToken):
            states = self.backbone.at_end(self._embed(batch.inputs, item_vectors), batch.lengths)
        else:
            states = self.user_states(batch.inputs, batch.segment_ids, batch.positions, item_vectors)
            states = batch.at_end(states)
        return to_similarity_space(states, self.config.similarity)

    def _rank(
        self,
        k: int,
        filter_history: bool,
        users: Float[Array, "B D"],
        vectors: Float[Array, "N D"],
        twins: Int[Array, " G"],
        twin_group: Int[Array, " N"],
        history: Int[Array, "B M"],
        targets: Int[Array, " B"],
    ) -> Ranking:
        """With the items that are here."""
        scores = users @ to_similarity_space(vectors, self.config.similarity).T
        first = sharding.part_index("items") * len(vectors)
        if len(twins):
            scores = _share_scores(scores, twins - first, twin_group)
        if filter_history:
            scores = without_history(scores, history)
        return rank_catalog(scores, targets, k, self.num_items)


def _twins(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the G groups of items with the same tokens: the first item of each; and the group of each item, or -1."""
    _, first, group, count = np.unique(tokens, axis=0, return_index=True, return_inverse=True, return_counts=True)
    is_shared = count > 1
    group_number = np.where(is_shared, np.cumsum(is_shared) - 1, -1)
    return first[is_shared], group_number[group.reshape(-1)]


def _share_scores(
    scores: Float[Array, "B N"], twins: Int[Array, " G"], twin_group: Int[Array, " N"]
) -> Float[Array, "B N"]:
    """Gives items of one group the score of its first, which is column `twins[group]`, here or on another device.

    They have one vector, but a matrix product may round equal columns differently.
    """
    here = scores.shape[1]
    is_here = (twins >= 0) & (twins < here)
    shared = sharding.psum(jnp.where(is_here, scores[:, jnp.clip(twins, 0, here - 1)], 0), "items")
    return jnp.where(twin_group >= 0, shared[:, twin_group], scores)
