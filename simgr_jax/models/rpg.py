"""RPG: predicts all of an item's codes at once, each with its own head, as if they were independent given the user
(arXiv 2506.05781)."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from simgr_jax.devices import sharding
from simgr_jax.inputs.batch import RankBatch, TrainBatch
from simgr_jax.models.embed_tokens import new_embedding
from simgr_jax.models.item_encoders import sum_of_rows
from simgr_jax.models.model_inputs import Backbone, Catalog, ModelInputs
from simgr_jax.models.options import COMPUTATION_KEYS, SHAPE_KEYS, ModelOptions
from simgr_jax.ops.graph_search import graph_search, nearest_items
from simgr_jax.ops.similarity_loss import MASKED, mean_of_valid, to_similarity_space
from simgr_jax.ops.top_k import Ranking, rank_catalog, rank_in_list, without_history
from simgr_jax.semantic_ids.codes import SemanticIds

DECODINGS = ("exhaustive", "graph")


_GRAPH_KEYS = ("graph_neighbors", "beam_width", "steps")


@dataclasses.dataclass(frozen=True)
class Options(ModelOptions):
    """
    Attributes:
      temperature: τ of each level's softmax over cosines. 0.07 is RPG's default; its results on Amazon use 0.03.
      decoding: "exhaustive" scores every item; "graph" walks from random items to ever better ones, along a graph of
        similar items (`ops.graph_search`). The defaults below are those of RPG's repository for Beauty.
      graph_neighbors: E, how many similar items each item leads to.
      beam_width: W, how many items the search keeps after each step.
      steps: number of steps of the search.
      label_smoothing: ε, spread evenly over a level's codes.
    """

    name = "rpg"
    reads_semantic_ids = True
    backbone_keys = SHAPE_KEYS + COMPUTATION_KEYS
    takes_checkpoint = True

    temperature: float = 0.07
    decoding: str = "exhaustive"
    graph_neighbors: int = 200
    beam_width: int = 20
    steps: int = 3
    label_smoothing: float = 0.0

    def __post_init__(self):
        self.require(self.temperature > 0, "temperature", "give a number above 0, like 0.07")
        self.require_choice("decoding", DECODINGS)
        for key in _GRAPH_KEYS:
            self.require(getattr(self, key) >= 1, key, "give a number from 1")
        self.require_label_smoothing()

    def unread(self) -> dict[str, str]:
        return {} if self.decoding == "graph" else dict.fromkeys(_GRAPH_KEYS, "decoding=graph")


def create(config: ml_collections.ConfigDict, options: Options, inputs: ModelInputs) -> RPG:
    return RPG(options, inputs.backbone(), inputs.semantic_ids, inputs.rngs, config.seed)


class RPGCatalog(NamedTuple):
    """What ranking needs of the catalog.

    Attributes:
      items: the vectors that the backbone reads.
      codes: unit vectors of each level's codes; K is the size of the largest level, and smaller ones are padded.
      neighbors: each item's nearest items, for decoding "graph"; else None.
    """

    items: Float[Array, "N D"]
    codes: Float[Array, "L K D"]
    neighbors: Int[Array, "N E"] | None


class RPG(nnx.Module):
    """Implements `recommender.Recommender`.

    An item is read as the mean of its codes' embeddings e. From the user's state h, level l computes
    p_l(code | u) = softmax over its codes of cos(h + silu(W_l h + b_l), e_code) / τ,
    with the same embeddings. An item's log-probability is the sum over its codes.

    Args:
      seed: for drawing the items where the graph search starts.
    """

    def __init__(
        self,
        options: Options,
        backbone: Backbone,
        semantic_ids: SemanticIds,
        rngs: nnx.Rngs,
        seed: int,
    ):
        self.options, self.seed = options, seed
        self.num_items = semantic_ids.num_items
        self.codebook_sizes = tuple(semantic_ids.codebook_sizes)
        self.offsets = tuple(semantic_ids.offsets.tolist())
        self.codes = Catalog(jnp.asarray(semantic_ids.codes, jnp.int32))
        _, first = np.unique(semantic_ids.codes, axis=0, return_index=True)
        self.is_first = Catalog(jnp.zeros(self.num_items, bool).at[first].set(True))

        width = backbone.decoder.config.width
        self.embedding = new_embedding(semantic_ids.vocab_size, width, rngs, backbone.embedding)
        self.backbone = backbone.decoder
        # The heads begin as the identity, as RPG's do.
        self.head_kernel = nnx.Param(jnp.zeros((semantic_ids.levels, width, width), jnp.float32), axes=("embed", None))
        self.head_bias = nnx.Param(jnp.zeros((semantic_ids.levels, width), jnp.float32))

    def loss(self, batch: TrainBatch, rngs: nnx.Rngs) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Cross-entropy of the targets' codes, the mean over levels (multi-token prediction)."""
        embeddings = self._encode(self.codes[batch.inputs])
        states = self.backbone(embeddings, batch.segment_ids, batch.positions, rngs)
        states = batch.at_readouts(states).reshape(-1, states.shape[-1])
        smoothing, levels = self.options.label_smoothing, len(self.codebook_sizes)

        # Recomputing a level's [B R, K] logits in the backward pass is cheaper than keeping those of all levels.
        @jax.checkpoint
        def add(total, level):
            (codes, size, *_), targets = level
            log_p = self._log_codes_of_level(states, *level[0])
            at_target = jnp.take_along_axis(log_p, targets[:, None], axis=1)[:, 0]
            mean = jnp.sum(log_p, axis=1, where=jnp.arange(len(codes)) < size) / size
            return total - (1 - smoothing) * at_target - smoothing * mean, None

        targets = self.codes[batch.targets.reshape(-1)].T
        total, _ = jax.lax.scan(add, jnp.zeros(len(states)), (self._levels(self._unit_codes()), targets))
        return mean_of_valid(total, batch.valid.reshape(-1)) / levels, {}

    def catalog(self) -> RPGCatalog:
        codes = self._unit_codes()
        neighbors = self._neighbors(codes) if self.options.decoding == "graph" else None
        return RPGCatalog(self._encode(self.codes[...]), codes, neighbors)

    def rank(self, batch: RankBatch, catalog: RPGCatalog, k: int, filter_history: bool) -> Ranking:
        log_codes = self._log_codes(batch, catalog)
        if self.options.decoding == "exhaustive":
            scores = sharding.constrain(self._score_all(log_codes), "batch", None)
            if filter_history:
                scores = without_history(scores, batch.history)
            return rank_catalog(scores, batch.targets, k)
        by_user, whole = sharding.spec("batch"), sharding.spec()
        search = sharding.per_device(
            partial(self._search, k), (sharding.spec(None, "batch"), by_user, by_user, whole, whole), by_user
        )
        history = batch.history if filter_history else None
        items, scores = search(log_codes, self._start(batch), history, catalog.neighbors, self.codes[...])
        return Ranking(items, scores, rank_in_list(items, scores, batch.targets))

    def log_probabilities(self, batch: RankBatch, catalog: RPGCatalog) -> Float[Array, "B N"]:
        return jax.nn.log_softmax(self._score_all(self._log_codes(batch, catalog)))

    def log_item_mass(self, batch: RankBatch, catalog: RPGCatalog) -> Float[Array, " B"]:
        """The log-probability that the codes are some item's: the heads are independent, so they spread probability
        over all K^L combinations of codes. Items with the same codes count once."""
        scores = self._score_all(self._log_codes(batch, catalog))
        return jax.nn.logsumexp(scores, axis=1, where=self.is_first[...])

    def _encode(self, codes: Int[Array, "*M L"]) -> Float[Array, "*M D"]:
        """The vectors that the backbone reads: the mean of each item's code embeddings."""
        levels = len(self.codebook_sizes)
        embedding = sharding.constrain(self.embedding[...], None, None)
        total = sum_of_rows(embedding, (codes + np.array(self.offsets)).reshape(-1, levels))
        return total.reshape(*codes.shape[:-1], -1) / levels

    def _unit_codes(self) -> Float[Array, "L K D"]:
        unit = to_similarity_space(sharding.constrain(self.embedding[...], None, None), "cosine")
        levels = jnp.split(unit, self.offsets[1:])
        most = max(self.codebook_sizes)
        return jnp.stack([jnp.pad(level, ((0, most - len(level)), (0, 0))) for level in levels])

    def _levels(self, unit_codes: Float[Array, "L K D"]) -> tuple[Array, ...]:
        """The arguments of `_log_codes_of_level`, stacked over levels for a scan."""
        return unit_codes, jnp.array(self.codebook_sizes), self.head_kernel[...], self.head_bias[...]

    def _log_codes_of_level(
        self,
        states: Float[Array, "B D"],
        unit_codes: Float[Array, "K D"],
        size: Int[Array, ""],
        kernel: Float[Array, "D D"],
        bias: Float[Array, " D"],
    ) -> Float[Array, "B K"]:
        """log p_l(code | u); codes from `size` on are padding and get about -inf."""
        head = states + jax.nn.silu(states @ kernel.astype(states.dtype) + bias.astype(states.dtype))
        logits = to_similarity_space(head, "cosine") @ unit_codes.T / self.options.temperature
        return jax.nn.log_softmax(jnp.where(jnp.arange(len(unit_codes)) < size, logits, MASKED))

    def _log_codes(self, batch: RankBatch, catalog: RPGCatalog) -> Float[Array, "L B K"]:
        """log p_l(code | u) after the users' whole histories."""
        states = self.backbone.at_end(catalog.items[batch.inputs], batch.lengths)
        return jax.lax.map(lambda level: self._log_codes_of_level(states, *level), self._levels(catalog.codes))

    def _score_all(self, log_codes: Float[Array, "L B K"]) -> Float[Array, "B N"]:
        """Σ_l log_codes[l, :, code of level l], for every item."""

        # Gathers whole rows of B. On a CPU, with 12,101 items of 32 levels, gathering single values takes over ten
        # times as long, and a matrix product with multi-hot codes several times.
        def add(total, level):
            by_code, codes = level
            return total + by_code[codes], None

        total = jnp.zeros((self.num_items, log_codes.shape[1]))
        total, _ = jax.lax.scan(add, total, (log_codes.transpose(0, 2, 1), self.codes[...].T))
        return total.T

    def _search(
        self,
        k: int,
        log_codes: Float[Array, "L B K"],
        start: Int[Array, "B W"],
        history: Int[Array, "B M"] | None,
        neighbors: Int[Array, "N E"],
        codes: Int[Array, "N L"],
    ) -> tuple[Int[Array, "B K"], Float[Array, "B K"]]:
        """`graph_search` for this device's users."""

        def score(items):
            def add(total, level):
                by_code, codes = level
                return total + jnp.take_along_axis(by_code, codes[items], axis=1), None

            first = jnp.take_along_axis(log_codes[0], codes[items, 0], axis=1)
            return jax.lax.scan(add, first, (log_codes[1:], codes[:, 1:].T))[0]

        return graph_search(score, neighbors, start, self.options.steps, k, history)

    def _start(self, batch: RankBatch) -> Int[Array, "B W"]:
        """Random items, drawn from the seed and the user's newest item, so that a list does not depend on the user's
        row in the batch."""
        key = jax.random.key(self.seed)

        def draw(item):
            return jax.random.randint(jax.random.fold_in(key, item), (self.options.beam_width,), 0, self.num_items)

        return jax.vmap(draw)(batch.at_end(batch.inputs))

    def _neighbors(self, unit_codes: Float[Array, "L K D"]) -> Int[Array, "N E"]:
        """Each item's nearest items by the cosines of their codes, summed over levels."""
        between_codes = jnp.einsum("lkd,ljd->lkj", unit_codes, unit_codes)
        codes = self.codes[...]

        def similarities(items):
            to_codes = jax.vmap(lambda of_level, codes: of_level[codes])(between_codes, codes[items].T)
            return self._score_all(to_codes)

        return nearest_items(similarities, self.num_items, min(self.options.graph_neighbors, self.num_items))
