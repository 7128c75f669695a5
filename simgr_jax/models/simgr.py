"""SimGR: scores every item at once by the similarity of a user vector, the backbone's state after the history, and an
item vector, the aggregate of the item's semantic-ID tokens (arXiv 2602.07847)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from simgr_jax.devices import sharding
from simgr_jax.inputs.batch import RankBatch, TrainBatch
from simgr_jax.models import item_encoders, readout, user_pooling
from simgr_jax.models.embed_tokens import embed_tokens, new_embedding
from simgr_jax.models.item_readings import Fresh, ItemReadings, TrainedReadings
from simgr_jax.models.model_inputs import Backbone, Catalog, ModelInputs
from simgr_jax.models.options import COMPUTATION_KEYS, SHAPE_KEYS, ModelOptions
from simgr_jax.models.repeat_bias import RepeatBias, newest_in_history
from simgr_jax.models.text_reader import TextReader
from simgr_jax.models.text_similarity import TextSimilarity
from simgr_jax.ops import sampled_loss
from simgr_jax.ops.clip_between import clip_between
from simgr_jax.ops.sampled_loss import Negatives, sampled_cross_entropy
from simgr_jax.ops.similarity_loss import (
    MASKED,
    SIMILARITIES,
    full_catalog_cross_entropy,
    in_batch_cross_entropy,
    mean_of_valid,
    to_similarity_space,
)
from simgr_jax.ops.streamed_loss import choose_chunk, streamed_cross_entropy
from simgr_jax.ops.top_k import Ranking, rank_catalog, without_history
from simgr_jax.semantic_ids.codes import SemanticIds

# The value of `catalog_chunk` that chooses by memory.
AUTO_CHUNK = -1

HISTORIES = ("item", "tokens")
SAMPLED_FROM = ("uniform", "popularity")
ITEM_TEXTS = ("none", "read", "trained")


@dataclasses.dataclass(frozen=True)
class Options(ModelOptions):
    """
    Attributes:
      history: what the backbone reads: "item", one position per item, its vector; or "tokens", one position per token
        of the prompt, as an LLM reads.
      user_pooling: "last", "mean" or "attention" (see `user_pooling`).
      readout: how the state becomes the user's vector: "state" (the paper's), "last_item" (see `readout.LastItem`), or
        "auto", which is "last_item" for a checkpoint and for more than 4 layers.
      item_encoder: how an item's codes become its vector: "mean" (the paper's), "gated", "attention",
        "cross_attention", "mlp" or "mean_mlp" (see `item_encoders`).
      item_encoder_width: inner width of the MLP encoders.
      item_text: whether an item is also known by an LLM's reading of its text (`config.item_reader`): "none", or
        "read", which adds a trained map of it to the codes' aggregate, and the texts' similarity to the score (see
        `text_similarity`); or "trained", where this LLM is trained, too, by adapters (see `item_readings`).
      item_text_tokens: how many tokens of items' texts a training step reads with "trained".
      item_text_dtype: how the readings are kept on the devices: "float32" or "bfloat16".
      item_text_dropout: rate on the history's text in the texts' similarity.
      similarity: "cosine" or "dot".
      temperature: τ, or its initial value if it is learned.
      learn_temperature: whether τ is a parameter.
      temperature_min, temperature_max: bounds of a learned τ.
      full_catalog_weight, sampled_weight, in_batch_weight: weights of the losses; one of weight 0 is not computed.
      sampled_negatives: items that the sampled loss draws for each batch. The sampled loss is for catalogs too large to
        score in full (docs/large_catalogs.md).
      sampled_from: how they are drawn: "uniform", or "popularity", in proportion to an item's training count plus one.
      log_q: whether the in-batch loss corrects for the items' frequency.
      popularity_prior: α. The full-catalog loss adds α log q(i) to the logits, where q is an item's share of the
        training interactions, and ranking does not. So similarity learns less of how popular items were (logit
        adjustment, https://arxiv.org/abs/2007.07314).
      repeat_bias: whether a learned number is added to the scores of the history's items (see `repeat_bias`). The
        full-catalog loss trains it.
      label_smoothing: ε of all losses.
      catalog_chunk: items, on each device, that the full-catalog loss encodes and scores at once, so that memory does
        not grow with the catalog. 0 takes all at once; -1 takes as many as the device's memory has room for.
    """

    name = "simgr"
    reads_semantic_ids = True
    backbone_keys = SHAPE_KEYS + COMPUTATION_KEYS
    takes_checkpoint = True
    prompt_keys = ("prefix", "item", "max_title_tokens")

    history: str = "item"
    user_pooling: str = "last"
    readout: str = "auto"
    item_encoder: str = "mean_mlp"
    item_encoder_width: int = 256
    item_text: str = "none"
    item_text_tokens: int = 4096
    item_text_dtype: str = "float32"
    item_text_dropout: float = 0.5
    similarity: str = "cosine"
    temperature: float = 0.07
    learn_temperature: bool = False
    temperature_min: float = 0.01
    temperature_max: float = 1.0
    full_catalog_weight: float = 1.0
    sampled_weight: float = 0.0
    sampled_negatives: int = 4096
    sampled_from: str = "uniform"
    in_batch_weight: float = 0.0
    log_q: bool = True
    popularity_prior: float = 0.0
    repeat_bias: bool = False
    label_smoothing: float = 0.0
    catalog_chunk: int = AUTO_CHUNK

    def __post_init__(self):
        self.require_choice("history", HISTORIES)
        self.require_choice("user_pooling", user_pooling.POOLINGS)
        self.require_choice("readout", readout.READOUTS)
        self.require_choice("item_encoder", item_encoders.ITEM_ENCODERS)
        self.require(self.item_encoder_width >= 1, "item_encoder_width", "give a number from 1")
        self.require_choice("item_text", ITEM_TEXTS)
        self.require_choice("item_text_dtype", ("float32", "bfloat16"))
        self.require(self.item_text_tokens >= 1, "item_text_tokens", "give a number from 1, like 4096")
        self.require(0 <= self.item_text_dropout < 1, "item_text_dropout", "give a rate from 0 to below 1, like 0.5")
        self.require_choice("similarity", SIMILARITIES)
        self.require(self.temperature > 0, "temperature", "give a number above 0, like 0.07")
        if self.learn_temperature:
            self.require(self.temperature_min > 0, "temperature_min", "give a number above 0, like 0.01")
            self.require(
                self.temperature_min <= self.temperature <= self.temperature_max,
                "temperature",
                f"give one from temperature_min = {self.temperature_min} to temperature_max = {self.temperature_max}",
            )
        weights = ("full_catalog_weight", "sampled_weight", "in_batch_weight")
        for key in weights:
            self.require(getattr(self, key) >= 0, key, "give 0 or more")
        self.require(
            any(getattr(self, key) for key in weights), weights[0], f"one of {', '.join(weights)} must be above 0"
        )
        self.require(self.sampled_negatives >= 1, "sampled_negatives", "give a number from 1, like 4096")
        self.require_choice("sampled_from", SAMPLED_FROM)
        self.require(
            self.catalog_chunk >= AUTO_CHUNK,
            "catalog_chunk",
            f"give a number of items, 0 for all at once, or {AUTO_CHUNK} to choose it by memory",
        )
        self.require(self.popularity_prior >= 0, "popularity_prior", "give 0 or more, like 0.5")
        self.require_label_smoothing()
        has_bias = self.repeat_bias and self.full_catalog_weight
        self.require(not (has_bias and self.label_smoothing), "label_smoothing", "give 0 with repeat_bias")

    @property
    def reads_item_texts(self) -> bool:
        return self.item_text != "none"

    @property
    def trains_item_reader(self) -> bool:
        return self.item_text == "trained"

    def unread(self) -> dict[str, str]:
        unread = {}
        if self.item_encoder not in item_encoders.WITH_WIDTH:
            unread["item_encoder_width"] = f"item_encoder={item_encoders.WITH_WIDTH[0]}"
        if self.item_text == "none":
            unread |= dict.fromkeys(("item_text_dtype", "item_text_dropout"), "item_text=read")
        if not self.trains_item_reader:
            unread["item_text_tokens"] = "item_text=trained"
        if not self.learn_temperature:
            unread |= dict.fromkeys(("temperature_min", "temperature_max"), "learn_temperature=True")
        if not self.sampled_weight:
            unread |= dict.fromkeys(("sampled_negatives", "sampled_from"), "sampled_weight above 0")
        if not self.in_batch_weight:
            unread["log_q"] = "in_batch_weight above 0"
        if not self.full_catalog_weight:
            unread |= dict.fromkeys(("catalog_chunk", "popularity_prior", "repeat_bias"), "full_catalog_weight above 0")
        return unread


def create(config: ml_collections.ConfigDict, options: Options, inputs: ModelInputs) -> SimGR:
    chosen = readout.choose(options.readout, bool(config.backbone.checkpoint), config.backbone.layers)
    options = dataclasses.replace(options, readout=chosen)
    readings = inputs.item_readings() if options.reads_item_texts else None
    reader = inputs.text_reader(options.item_text_tokens) if options.trains_item_reader else None
    return SimGR(options, inputs.backbone(), inputs.semantic_ids, inputs.item_counts, inputs.rngs, readings, reader)


class SimGR(nnx.Module):
    """Implements `recommender.Recommender`.

    Args:
      item_counts: int [N], how often each item occurs in training; for the log-Q correction, and for drawing negatives
        by popularity.
      item_readings: the LLM's readings of the items' texts, for `options.item_text`.
      text_reader: what makes them, if it is trained.
    """

    def __init__(
        self,
        options: Options,
        backbone: Backbone,
        semantic_ids: SemanticIds,
        item_counts: np.ndarray,
        rngs: nnx.Rngs,
        item_readings: Float[np.ndarray, "N X"] | None = None,
        text_reader: TextReader | None = None,
    ):
        self.options = options
        self.num_items, tokens = semantic_ids.num_items, semantic_ids.tokens
        # Pads the catalog so that every device has the same number of items. Padding is never scored.
        padding = (0, -len(tokens) % sharding.shards("items"))
        by_item = {"axes": ("items",)}
        self.tokens = Catalog(jnp.asarray(np.pad(tokens, (padding, (0, 0))), jnp.int32), axes=("items", None))
        # Adds one to every count, so that log q is finite for items that never occur in training.
        log_q = np.log((item_counts + 1) / (item_counts + 1).sum())
        self.log_q = Catalog(jnp.asarray(np.pad(log_q, padding), jnp.float32), **by_item)
        if options.sampled_weight and options.sampled_from == "popularity":
            self.cumulative_weights = Catalog(jnp.asarray(sampled_loss.cumulative_weights(item_counts)))
        twins, twin_group = _twins(tokens, item_readings)
        self.twins = Catalog(jnp.asarray(twins, jnp.int32))
        self.twin_group = Catalog(jnp.asarray(np.pad(twin_group, padding, constant_values=-1), jnp.int32), **by_item)

        shape, initial = backbone.decoder.config, backbone.embedding
        self.readout = readout.LastItem(shape.width) if options.readout == "last_item" else None
        if self.readout is not None and initial is not None:
            # An LLM's embeddings have a common mean, which is longer than what tells them apart. With it, all items'
            # vectors would point one way.
            initial = initial - initial.mean(axis=0)
        self.embedding = new_embedding(semantic_ids.vocab_size, shape.width, rngs, initial)
        self.text_embedding = backbone.text_embedding
        self.item_encoder = item_encoders.create(
            options.item_encoder,
            shape.width,
            shape.heads,
            options.item_encoder_width,
            tuple(semantic_ids.codebook_sizes),
            rngs,
        )
        self.readings, self.text_similarity = nnx.data(None), nnx.data(None)
        if item_readings is not None:
            self.text_similarity = TextSimilarity(item_readings.shape[1], options.item_text_dropout)
            self.readings = (
                ItemReadings(item_readings, options.item_text_dtype)
                if text_reader is None
                else TrainedReadings(item_readings, options.item_text_dtype, text_reader)
            )
            norm = jnp.sqrt(jnp.mean(jnp.sum(jnp.square(self.embedding[...]), axis=1)))
            self.item_encoder = item_encoders.WithText(self.item_encoder, self.readings.width, shape.width, norm)
        self.backbone = backbone.decoder
        self.user_pooling = user_pooling.create(options.user_pooling, shape.width, rngs)
        self.repeat_bias = RepeatBias() if options.repeat_bias and options.full_catalog_weight else None
        log_temperature = jnp.log(jnp.float32(options.temperature))
        self.log_temperature = nnx.Param(log_temperature) if options.learn_temperature else Catalog(log_temperature)

    @property
    def temperature(self) -> Float[Array, ""]:
        if not self.options.learn_temperature:
            return jnp.exp(self.log_temperature[...])
        lowest, highest = jnp.log(self.options.temperature_min), jnp.log(self.options.temperature_max)
        return jnp.exp(clip_between(self.log_temperature[...], lowest, highest))

    def encode_items(self, items: Int[Array, " M"] | None = None) -> Float[Array, "M D"]:
        """Item vectors before the similarity's normalization; for the whole catalog if `items` is None."""
        encoder, _, table = self._whole_encoder()
        return encoder(table, self._contents(items))

    def _contents(self, items: Int[Array, " M"] | None = None) -> item_encoders.Contents:
        """What items' vectors are encoded from; the whole catalog's if `items` is None."""
        tokens = self.tokens[...] if items is None else self.tokens[items]
        return tokens if self.readings is None else (tokens, self._readings_of(items))

    def _readings_of(self, items: Int[Array, " M"] | None = None) -> Float[Array, "M X"] | None:
        """The readings of items' texts, those of the whole catalog if `items` is None; None if the model has none."""
        if self.readings is None:
            return None
        return self.readings.table[...] if items is None else self.readings.of(items)

    def _whole_encoder(self) -> tuple[item_encoders.ItemEncoder, TextSimilarity | None, Float[Array, "V D"]]:
        """The item encoder, the texts' similarity and the table of token embeddings, whole on every device: they are
        small, and all devices read them."""
        table = sharding.constrain(self.embedding[...], None, None)
        if not sharding.item_axes():
            return self.item_encoder, self.text_similarity, table
        graphdef, parameters = nnx.split((self.item_encoder, self.text_similarity))
        return *nnx.merge(graphdef, sharding.gather_kernels(parameters, "float32")), table

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
          inputs: items with history "item", token ids with "tokens" (see `inputs.prompts.Prompt`).
          item_vectors: `encode_items()`, if it has been computed already; None encodes the batch's items.
        """
        embeddings = self._embed(inputs, item_vectors)
        return self.user_pooling(self.backbone(embeddings, segment_ids, positions, rngs), segment_ids)

    def _embed(self, inputs: Int[Array, "B T"], item_vectors: Float[Array, "N D"] | None) -> Float[Array, "B T D"]:
        """The backbone's input embeddings; the arguments are those of `user_states`."""
        if self.options.history == "tokens":
            return embed_tokens(self.embedding, self.text_embedding, inputs)
        return self._vectors_of(inputs.reshape(-1), item_vectors).reshape(*inputs.shape, -1)

    def _vectors_of(self, items: Int[Array, " M"], item_vectors: Float[Array, "N D"] | None) -> Float[Array, "M D"]:
        """Item vectors before the similarity's normalization, from the whole catalog's if they have been computed."""
        return self.encode_items(items) if item_vectors is None else item_vectors[items]

    def loss(self, batch: TrainBatch, rngs: nnx.Rngs) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        options = self.options
        chunk = self._catalog_chunk(batch.targets.size)
        # If the catalog is split over devices, no device holds all of its vectors.
        dense = options.full_catalog_weight and not chunk and not sharding.item_axes()
        fresh = self._read_texts(batch, rngs)  # First, so that all that follows knows of the readings.
        item_vectors = self.encode_items() if dense else None
        # What was read is known of the users' items.
        of_users = item_vectors if fresh is None else None
        states = self.user_states(batch.inputs, batch.segment_ids, batch.positions, of_users, rngs)
        states = batch.at_readouts(states).reshape(-1, states.shape[-1])
        targets, valid = batch.targets.reshape(-1), batch.valid.reshape(-1)
        temperature = self.temperature

        def vectors_of(items):
            return self._compared(self._vectors_of(items, item_vectors), self._readings_of(items))

        if self.readout is not None:
            last_vectors = self._vectors_of(batch.last_items.reshape(-1), of_users)
            states = self.readout(states, to_similarity_space(last_vectors, options.similarity))
        states = to_similarity_space(states, options.similarity)
        if self.text_similarity is not None:
            texts = self.text_similarity.of_users(self.readings.of(batch.last_items), batch.starts, rngs)
            states = jnp.concatenate([states, texts.reshape(len(states), -1)], axis=-1)
        loss, scalars = jnp.float32(0), {"temperature": temperature}
        if fresh is not None:
            losses, is_fresh = self._losses_among(fresh, batch, states[:, : self.embedding.shape[1]])
            scalars["item_text_loss"] = mean_of_valid(losses, valid & is_fresh)
            loss += scalars["item_text_loss"]
            # Below, all items have the readings that are remembered. If only the targets had fresh ones, the model
            # would learn to tell which are fresh.
            self.readings.fresh = nnx.data(None)
        target_vectors = vectors_of(targets)
        if options.full_catalog_weight:
            losses = self._full_catalog_losses(batch, states, target_vectors, vectors_of, item_vectors, chunk)
            scalars["full_catalog_loss"] = mean_of_valid(losses, valid)
            loss += options.full_catalog_weight * scalars["full_catalog_loss"]
        if options.sampled_weight:
            negatives = self._draw_negatives(rngs.negatives())
            losses = sampled_cross_entropy(
                states,
                target_vectors,
                targets,
                negatives,
                vectors_of(negatives.items),
                self.num_items,
                temperature,
                options.label_smoothing,
            )
            scalars["sampled_loss"] = mean_of_valid(losses, valid)
            loss += options.sampled_weight * scalars["sampled_loss"]
        if options.in_batch_weight:
            log_q = self.log_q[targets] if options.log_q else None
            losses = in_batch_cross_entropy(
                states, target_vectors, targets, valid, temperature, log_q, options.label_smoothing
            )
            scalars["in_batch_loss"] = mean_of_valid(losses, valid)
            loss += options.in_batch_weight * scalars["in_batch_loss"]
        return loss, scalars

    def _read_texts(self, batch: TrainBatch, rngs: nnx.Rngs) -> Fresh | None:
        """Reads texts with the LLM that is trained; None if there is none."""
        if not isinstance(self.readings, TrainedReadings):
            return None
        items = jnp.concatenate([jnp.where(batch.valid, of, -1) for of in (batch.targets, batch.last_items)])
        return self.readings.read_some(items.reshape(-1), self.num_items, rngs.negatives())

    def _losses_among(
        self, fresh: Fresh, batch: TrainBatch, states: Float[Array, "B*R D"]
    ) -> tuple[Float[Array, " B*R"], Bool[Array, " B*R"]]:
        """The cross-entropy over the catalog, estimated from the items whose texts this step has read; and whether the
        target is one of them. A history's own items don't count.

        The LLM learns from it, and nothing else does: the other losses know the whole catalog.

        Args:
          states: the users' in the similarity's space, without their texts.
        """
        *parts, table = self._whole_encoder()
        graphdef, learned = nnx.split(parts)
        encoder, texts = nnx.merge(graphdef, jax.lax.stop_gradient(learned))
        read_texts = texts.of_users(self.readings.of(batch.last_items), batch.starts)
        states = jnp.concatenate([jax.lax.stop_gradient(states), read_texts.reshape(len(states), -1)], axis=-1)
        vectors = encoder(jax.lax.stop_gradient(table), self._contents(fresh.items))
        vectors = to_similarity_space(vectors, self.options.similarity)
        vectors = jnp.concatenate([vectors, texts.of_items(fresh.readings)], axis=-1)
        temperature = jax.lax.stop_gradient(self.temperature)
        targets = batch.targets.reshape(-1)
        # The chance that an item is in the batch, for as many draws as there are targets.
        in_batch = -jnp.expm1(-jnp.sum(batch.valid) * jnp.exp(self.log_q[fresh.items]))
        chance = 1 - (1 - fresh.share_of_batch * in_batch) * (1 - fresh.share_of_others)
        logits = states @ vectors.T / temperature - jnp.log(jnp.maximum(chance, 1e-9))
        in_history = newest_in_history(batch.last_items, batch.starts)
        is_read = (fresh.place[batch.last_items][..., None] == jnp.arange(len(fresh.items))).astype(jnp.float32)
        of_history = (in_history.astype(jnp.float32) @ is_read).reshape(logits.shape) > 0
        others = fresh.is_one & ~of_history & (fresh.items != targets[:, None])
        place = fresh.place[targets]
        target_logits = jnp.sum(states * vectors[place], axis=-1) / temperature
        of_others = jax.nn.logsumexp(jnp.where(others, logits, MASKED), axis=-1)
        return jnp.logaddexp(target_logits, of_others) - target_logits, place >= 0

    def state_moments(self, batch: TrainBatch) -> tuple[Float[Array, ""], Float[Array, " D"], Float[Array, " D"]]:
        """The number of the batch's states that are read, their sum and the sum of their squares."""
        states = self.user_states(batch.inputs, batch.segment_ids, batch.positions, None)
        states = batch.at_readouts(states).astype(jnp.float32)
        states = jnp.where(batch.valid[..., None], states, 0).reshape(-1, states.shape[-1])
        return jnp.sum(batch.valid), jnp.sum(states, axis=0), jnp.sum(jnp.square(states), axis=0)

    def read_catalog(self) -> None:
        """Reads all items' texts."""
        self.readings.read_all()

    def _draw_negatives(self, key: Array) -> Negatives:
        count = self.options.sampled_negatives
        if self.options.sampled_from == "uniform":
            return sampled_loss.uniform_negatives(key, self.num_items, count)
        return sampled_loss.popularity_negatives(key, self.cumulative_weights[...], count)

    def _full_catalog_losses(
        self,
        batch: TrainBatch,
        states: Float[Array, "B*R E"],
        target_vectors: Float[Array, "B*R E"],
        vectors_of: Callable[[Int[Array, " M"]], Float[Array, "M E"]],
        item_vectors: Float[Array, "N D"] | None,
        chunk: int,
    ) -> Float[Array, " B*R"]:
        """
        Args:
          states: the users', in the similarity's space.
          target_vectors: `vectors_of` the targets.
          vectors_of: items' vectors there.
          item_vectors: `encode_items()`; None computes the loss without them, in chunks.
        """
        temperature, smoothing, targets = self.temperature, self.options.label_smoothing, batch.targets.reshape(-1)
        prior = self.options.popularity_prior * self.log_q[...] if self.options.popularity_prior else None
        if prior is not None:
            # One more column of the items' vectors. The temperature will divide it away.
            states = jnp.pad(states, ((0, 0), (0, 1))).at[:, -1].set(temperature)

        def with_prior(vectors, prior):
            return vectors if prior is None else jnp.column_stack([vectors, prior])

        def prior_of(items):
            return None if prior is None else prior[items]

        target_vectors = with_prior(target_vectors, prior_of(targets))
        if item_vectors is not None:
            vectors = with_prior(self._compared(item_vectors, self._readings_of()), prior)
            losses = full_catalog_cross_entropy(states, vectors, targets, temperature, smoothing)
        else:
            encoder, texts, table = self._whole_encoder()
            graphdef, parameters = nnx.split((encoder, texts))

            def encode(learned, items):
                (parameters, tables), (contents, prior) = learned, items
                encoder, texts = nnx.merge(graphdef, parameters)
                columns = [to_similarity_space(encoder.combine(tables, contents), self.options.similarity)]
                if texts is not None:
                    columns.append(texts.of_items(contents[1]))
                return with_prior(jnp.concatenate(columns, axis=-1), prior)

            losses = streamed_cross_entropy(
                encode,
                (parameters, encoder.tables(table)),
                (self._contents(), prior),
                self.num_items,
                states,
                target_vectors,
                temperature,
                smoothing,
                chunk,
            )
        if self.repeat_bias is None:
            return losses
        read = batch.last_items.reshape(-1)
        read_vectors = with_prior(vectors_of(read), prior_of(read))
        return self.repeat_bias.in_cross_entropy(losses, batch, states, target_vectors, read_vectors, temperature)

    def _catalog_chunk(self, num_queries: int) -> int:
        """How many of a device's items the full-catalog loss scores at once; 0 is all."""
        if self.options.catalog_chunk != AUTO_CHUNK:
            return self.options.catalog_chunk
        return choose_chunk(
            len(self.tokens) // sharding.shards("items"),
            num_queries // sharding.shards("queries"),
            self.embedding.shape[1] + (0 if self.readings is None else self.readings.width),
            sharding.device_memory(),
        )

    @property
    def has_collisions(self) -> bool:
        """Whether some items have the same tokens and reading, and so the same score."""
        return len(self.twins) > 0

    def first_twin(self) -> Int[np.ndarray, " N"]:
        """For each item, the first item with the same tokens and reading; int32."""
        group = np.asarray(self.twin_group)
        return np.where(group >= 0, np.asarray(self.twins)[group], np.arange(len(group), dtype=np.int32))

    def catalog(self) -> Float[Array, "N D"]:
        """Item vectors before the similarity's normalization; padded at the end if the catalog is split."""
        return sharding.constrain(self.encode_items(), "items", None)

    def log_probabilities(self, batch: RankBatch, catalog: Float[Array, "N D"]) -> Float[Array, "B N"]:
        scores = self.user_vectors(batch, catalog) @ self.item_vectors(catalog).T
        if len(self.twins):
            # The same as `_share_scores`, for a catalog that is not split.
            group = self.twin_group[: self.num_items]
            scores = jnp.where(group >= 0, scores[:, self.twins[...]][:, group], scores)
        if self.repeat_bias is not None:
            scores = self.repeat_bias.in_ranking(scores, batch.history)
        return jax.nn.log_softmax(scores / self.temperature)

    def item_vectors(self, catalog: Float[Array, "N D"]) -> Float[Array, "N E"]:
        return self._compared(catalog, self._readings_of())[: self.num_items]

    def _compared(self, vectors: Float[Array, "M D"], readings: Float[Array, "M X"] | None) -> Float[Array, "M E"]:
        """Item vectors in the similarity's space. With texts' similarity, what it compares is further columns."""
        vectors = to_similarity_space(vectors, self.options.similarity)
        if self.text_similarity is None:
            return vectors
        return jnp.concatenate([vectors, self.text_similarity.of_items(readings)], axis=-1)

    def rank(self, batch: RankBatch, catalog: Float[Array, "N D"], k: int, filter_history: bool) -> Ranking:
        users = self.user_vectors(batch, catalog)
        items = sharding.constrain(self._compared(catalog, self._readings_of()), "items", None)
        by_user, by_item = sharding.spec("queries"), sharding.spec("items")
        rank = sharding.per_device(
            partial(self._rank, k, filter_history),
            (by_user, by_item, sharding.spec(), by_item, by_user, by_user),
            by_user,
            check_vma=False,  # JAX can't tell that the result of all_gather is the same on every device.
        )
        return rank(users, items, self.twins[...], self.twin_group[...], batch.history, batch.targets)

    def user_vectors(self, batch: RankBatch, catalog: Float[Array, "N D"]) -> Float[Array, "B E"]:
        """The users' vectors after their whole histories, in the similarity's space."""
        item_vectors = None if sharding.item_axes() else catalog
        if isinstance(self.user_pooling, user_pooling.LastToken):
            states = self.backbone.at_end(self._embed(batch.inputs, item_vectors), batch.lengths)
        else:
            states = self.user_states(batch.inputs, batch.segment_ids, batch.positions, item_vectors)
            states = batch.at_end(states)
        if self.readout is not None:
            last_vectors = self._vectors_of(batch.last_items, item_vectors)
            states = self.readout(states, to_similarity_space(last_vectors, self.options.similarity))
        states = to_similarity_space(states, self.options.similarity)
        if self.text_similarity is None:
            return states
        return jnp.concatenate([states, self.text_similarity.at_end(self.readings.table[...], batch.history)], axis=-1)

    def _rank(
        self,
        k: int,
        filter_history: bool,
        users: Float[Array, "B E"],
        vectors: Float[Array, "N E"],
        twins: Int[Array, " G"],
        twin_group: Int[Array, " N"],
        history: Int[Array, "B M"],
        targets: Int[Array, " B"],
    ) -> Ranking:
        """Ranks on one device, which may hold only a part of the items."""
        scores = users @ vectors.T
        first = sharding.part_index("items") * len(vectors)
        if len(twins):
            scores = _share_scores(scores, twins - first, twin_group)
        if self.repeat_bias is not None:
            scores = self.repeat_bias.in_ranking(scores, history)
        if filter_history:
            scores = without_history(scores, history)
        return rank_catalog(scores, targets, k, self.num_items)


def _twins(
    tokens: Int[np.ndarray, "N L"], readings: Float[np.ndarray, "N X"] | None
) -> tuple[Int[np.ndarray, " G"], Int[np.ndarray, " N"]]:
    """The first item of each of the G groups of items with the same tokens and reading; and the group of each item, or
    -1."""
    first, group, is_shared = _groups(tokens)
    if readings is not None and is_shared.any():
        first, group, is_shared = _groups(np.column_stack([tokens, _groups(readings)[1]]))
    group_number = np.where(is_shared, np.cumsum(is_shared) - 1, -1)
    return first[is_shared], group_number[group]


def _groups(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first of each group of equal rows, the group of each row, and whether a group has more than one."""
    _, first, group, count = np.unique(rows, axis=0, return_index=True, return_inverse=True, return_counts=True)
    return first, group.reshape(-1), count > 1


def _share_scores(
    scores: Float[Array, "B N"], twins: Int[Array, " G"], twin_group: Int[Array, " N"]
) -> Float[Array, "B N"]:
    """Gives all items of a group the score of its first item, column `twins[group]`, here or on another device.

    They have equal vectors, but a matrix product may round equal columns differently.
    """
    here = scores.shape[1]
    is_here = (twins >= 0) & (twins < here)
    shared = sharding.psum(jnp.where(is_here, scores[:, jnp.clip(twins, 0, here - 1)], 0), "items")
    return jnp.where(twin_group >= 0, shared[:, twin_group], scores)
