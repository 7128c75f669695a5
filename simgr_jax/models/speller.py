"""The base of models that spell the next item token by token."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from simgr_jax.devices import sharding
from simgr_jax.inputs.batch import RankBatch
from simgr_jax.models.embed_tokens import new_embedding
from simgr_jax.models.model_inputs import Catalog
from simgr_jax.models.options import ModelOptions
from simgr_jax.ops import trie
from simgr_jax.ops.beam_search import beam_search
from simgr_jax.ops.similarity_loss import full_catalog_cross_entropy, mean_of_valid
from simgr_jax.ops.top_k import Ranking, rank_in_list
from simgr_jax.semantic_ids.codes import SemanticIds

# Floats in the largest array while all items are scored; small enough for a CPU's cache.
_SCORING_FLOATS = 2**22


class Speller(nnx.Module):
    """A `recommender.Recommender`, except for `loss` and for how it reads (`_read`, `_read_on`).

    An item's tokens are predicted one after the other, each by a softmax over the V semantic-ID tokens of all levels.
    The output embedding is the input embedding.

    Args:
      options: the model's, with `beam_width` and `label_smoothing`.
      width: D.
      embedding: [V, D], initial embeddings of the tokens; None draws them at random.

    Attributes:
      beam_width: W, used by `rank`.
      distinct_tokens: int32 [M, L], the M different token sequences of the catalog.
      spelling: int32 [N], the row of `distinct_tokens` that spells each item.
    """

    def __init__(
        self,
        options: ModelOptions,
        semantic_ids: SemanticIds,
        width: int,
        rngs: nnx.Rngs,
        embedding: Float[np.ndarray, "V D"] | None = None,
    ):
        self.num_items = semantic_ids.num_items
        self.beam_width, self.label_smoothing = options.beam_width, options.label_smoothing
        self.codebook_sizes = tuple(semantic_ids.codebook_sizes)
        self.offsets = tuple(semantic_ids.offsets.tolist())
        tokens, spelling = np.unique(semantic_ids.tokens, axis=0, return_inverse=True)
        self.distinct_tokens = Catalog(jnp.asarray(tokens, jnp.int32))
        self.spelling = Catalog(jnp.asarray(spelling.reshape(-1), jnp.int32))
        self.trie = Catalog(trie.build(semantic_ids.codes, self.codebook_sizes))
        self.embedding = new_embedding(semantic_ids.vocab_size, width, rngs, embedding)

    def _read(self, batch: RankBatch, catalog: Float[Array, "V D"]) -> tuple[Float[Array, "B D"], Any, Any]:
        """The states that predict an item's first token; what `_read_on` needs of the histories; and what the single
        branch of each history has read so far, a tree of arrays [layers, B, 1, ...], or None."""
        raise NotImplementedError

    def _read_on(
        self, embeddings: Float[Array, "B W S D"], history: Any, branches: Any
    ) -> tuple[Float[Array, "B W S D"], Any]:
        """The states after S more tokens on each of W branches per history, and what the branches have read by then.

        Args:
          history, branches: from `_read`, with W branches (or None).
        """
        raise NotImplementedError

    def _floats_a_token(self, length: int) -> int:
        """About how many floats the largest array of `_read_on` has per token, for histories of this length."""
        raise NotImplementedError

    def _tokens(self, items: Int[Array, "*B"]) -> Int[Array, "*B L"]:
        return self.distinct_tokens[...][self.spelling[items]]

    def _spelling_loss(
        self, states: Float[Array, "B R L D"], tokens: Int[Array, "B R L"], valid: Bool[Array, "B R"]
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """The mean of -log p(target | history), which sums the cross-entropies of a target's L tokens; `token_loss` is
        the mean per token.

        Args:
          states: the states that predict `tokens`.
        """
        states = states.reshape(-1, states.shape[-1]).astype(jnp.float32)
        losses = full_catalog_cross_entropy(states, self.catalog(), tokens.reshape(-1), 1.0, self.label_smoothing)
        loss = mean_of_valid(jnp.sum(losses.reshape(tokens.shape), axis=-1), valid)
        return loss, {"token_loss": loss / tokens.shape[-1]}

    def catalog(self) -> Float[Array, "V D"]:
        """The token embeddings, whole on every device."""
        return sharding.constrain(self.embedding[...], None, None)

    def rank(self, batch: RankBatch, catalog: Float[Array, "V D"], k: int, filter_history: bool) -> Ranking:
        """The best k of the items that beam search finds. A target that it does not find has rank inf.

        Args:
          k: at most the beam's width.
        """
        items, scores = self.beam(batch, catalog, self.beam_width, batch.history if filter_history else None)
        return Ranking(items[:, :k], scores[:, :k], rank_in_list(items, scores, batch.targets))

    def beam(
        self, batch: RankBatch, catalog: Float[Array, "V D"], width: int, history: Int[Array, "B M"] | None = None
    ) -> tuple[Int[Array, "B W"], Float[Array, "B W"]]:
        """The best W items that a beam of width W finds, and their log-likelihoods.

        Args:
          history: items that must not be listed; None excludes none.

        Returns:
          Best first; a shorter list ends with -1 and -inf.
        """
        state, read, branches = self._read(batch, catalog)

        def step(level: int, codes: Int[Array, "B W"], parents: Int[Array, "B W"], branches: Any):
            branches = jax.tree.map(lambda x: _take_branches(x, parents), branches)
            embeddings = catalog[codes + self.offsets[level - 1]]
            states, branches = self._read_on(embeddings[:, :, None], read, branches)
            return self._code_log_probabilities(states[:, :, 0], catalog, level), branches

        first = self._code_log_probabilities(state, catalog, level=0)
        return beam_search(self.trie.get_value(), first, step, branches, width, width, history)

    def log_probabilities(self, batch: RankBatch, catalog: Float[Array, "V D"]) -> Float[Array, "B N"]:
        return jax.nn.log_softmax(self.item_log_likelihoods(batch, catalog))

    def item_log_likelihoods(self, batch: RankBatch, catalog: Float[Array, "V D"]) -> Float[Array, "B N"]:
        """The log-probability that each item's tokens come next, float32.

        Token sequences of no item also have some probability, so the items' probabilities sum to less than 1.
        """
        return self._log_likelihoods(batch, catalog)[:, self.spelling[...]]

    def log_item_mass(self, batch: RankBatch, catalog: Float[Array, "V D"]) -> Float[Array, " B"]:
        """The log-probability that the next tokens are some item's; items with equal tokens count once."""
        return jax.nn.logsumexp(self._log_likelihoods(batch, catalog), axis=-1)

    def _log_likelihoods(self, batch: RankBatch, catalog: Float[Array, "V D"]) -> Float[Array, "B M"]:
        """The log-likelihoods of the distinct items, computed in chunks: each item is a branch of the history that has
        read all but its last token."""
        state, read, branches = self._read(batch, catalog)
        first, tokens = jax.nn.log_softmax(self._logits(state, catalog)), self.distinct_tokens[...]
        (batch_size, length), levels = batch.inputs.shape, tokens.shape[1]
        if levels == 1:
            return first[:, tokens[:, 0]]
        floats = batch_size * levels * max(len(catalog), self._floats_a_token(length))
        chunk = min(len(tokens), max(1, _SCORING_FLOATS // floats))
        one_each = jnp.zeros((batch_size, chunk), jnp.int32)
        branches = jax.tree.map(lambda x: _take_branches(x, one_each), branches)

        def score(tokens: Int[Array, "W L"]) -> Float[Array, "B W"]:
            embeddings = catalog[tokens[:, :-1]]
            states, _ = self._read_on(jnp.broadcast_to(embeddings, (batch_size, *embeddings.shape)), read, branches)
            logits = self._logits(states, catalog)
            chosen = jnp.take_along_axis(logits, tokens[None, :, 1:, None], axis=-1)[..., 0]
            return first[:, tokens[:, 0]] + jnp.sum(chosen - jax.nn.logsumexp(logits, axis=-1), axis=-1)

        padded = jnp.pad(tokens, ((0, -len(tokens) % chunk), (0, 0)))
        scores = jax.lax.map(score, padded.reshape(-1, chunk, levels))
        return jnp.swapaxes(scores, 0, 1).reshape(batch_size, -1)[:, : len(tokens)]

    def _logits(self, states: Float[Array, "*B D"], catalog: Float[Array, "V D"]) -> Float[Array, "*B V"]:
        return states.astype(jnp.float32) @ catalog.T

    def _code_log_probabilities(
        self, states: Float[Array, "*B D"], catalog: Float[Array, "V D"], level: int
    ) -> Float[Array, "*B K"]:
        """The log-probabilities of one level's codes, among all tokens."""
        logits, begin = self._logits(states, catalog), self.offsets[level]
        own = logits[..., begin : begin + self.codebook_sizes[level]]
        return own - jax.nn.logsumexp(logits, axis=-1, keepdims=True)


def _take_branches(x: Array, parents: Int[Array, "B W"]) -> Array:
    """Picks the branches `parents` of x [layers, B, W', ...]."""
    parents = parents.reshape(1, *parents.shape, *(1,) * (x.ndim - 3))
    return jnp.take_along_axis(x, parents, axis=2)
