"""The autoregressive rival: a decoder that spells the next item token by token, as LC-Rec does (arXiv 2311.09049).

It reads a history as semantic-ID tokens and goes on with the next item's (see `speller.Speller`). The text tokens of a
prompt's prefix are no part of the softmax, for they are never a target. What LC-Rec adds to tie the tokens to language
(its alignment tasks) is not here.
"""

from __future__ import annotations

import jax.numpy as jnp
import ml_collections
from flax import nnx
from jaxtyping import Array, Float, Int

from simgr_jax.batch import RankBatch, TrainBatch
from simgr_jax.data.prompts import CODES
from simgr_jax.errors import UserError
from simgr_jax.models import speller
from simgr_jax.models.inputs import ModelInputs
from simgr_jax.models.speller import Speller
from simgr_jax.models.token_embeddings import embed_tokens
from simgr_jax.models.transformer import BranchCache, HistoryCache


def create(config: ml_collections.ConfigDict, inputs: ModelInputs) -> Autoregressive:
    """
    Raises:
      UserError: see `speller.check`; or there is text between items.
    """
    speller.check(config)
    if config.prompt.item != CODES:
        raise UserError(
            f'config.prompt.item: has more than "{CODES}", and the autoregressive model would have to predict the text '
            "between two items; leave the text out"
        )
    return Autoregressive(config, inputs)


class Autoregressive(Speller):
    """Implements `recommender.Recommender`."""

    windows = "with_target"

    def __init__(self, config: ml_collections.ConfigDict, inputs: ModelInputs):
        backbone = inputs.backbone()
        super().__init__(config, inputs.semantic_ids, backbone.decoder.config.width, inputs.rngs, backbone.embedding)
        self.text_embedding = backbone.text_embedding
        self.backbone = backbone.decoder

    def loss(self, batch: TrainBatch, rngs: nnx.Rngs) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        states = self.backbone(self._embed(batch.inputs), batch.segment_ids, batch.positions, rngs)
        tokens = self._tokens(batch.targets)
        # The state that predicts a target's first token is followed by those that have read its first, second, ...
        places = batch.readouts[..., None] + jnp.arange(tokens.shape[-1])
        states = jnp.take_along_axis(states, places.reshape(len(places), -1, 1), axis=1)
        return self._spelling_loss(states.reshape(*tokens.shape, -1), tokens, batch.valid)

    def _read(
        self, batch: RankBatch, catalog: Float[Array, "V D"]
    ) -> tuple[Float[Array, "B D"], HistoryCache, BranchCache | None]:
        state, cache = self.backbone.prefill(self._embed(batch.inputs), batch.lengths)
        return state, cache, None

    def _read_on(
        self, embeddings: Float[Array, "B W S D"], history: HistoryCache, branches: BranchCache | None
    ) -> tuple[Float[Array, "B W S D"], BranchCache]:
        return self.backbone.extend(embeddings, history, branches)

    def _floats_a_token(self, length: int) -> int:
        config = self.backbone.config
        return max(config.mlp_width, config.heads * length)

    def _embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return embed_tokens(self.embedding, self.text_embedding, tokens)
