"""LC-Rec: a decoder that spells the next item token by token (arXiv 2311.09049).

It reads a history as semantic-ID tokens and continues with the next item's (see `speller.Speller`). The text tokens of
a prompt's prefix are never targets, so the softmax leaves them out. LC-Rec's alignment tasks, which tie the tokens to
language, are not implemented.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import ml_collections
from flax import nnx
from jaxtyping import Array, Float, Int

from simgr_jax.errors import UserError
from simgr_jax.inputs.batch import RankBatch, TrainBatch
from simgr_jax.inputs.item_texts import CODES
from simgr_jax.models.embed_tokens import embed_tokens
from simgr_jax.models.model_inputs import ModelInputs
from simgr_jax.models.options import COMPUTATION_KEYS, SHAPE_KEYS, ModelOptions
from simgr_jax.models.speller import Speller
from simgr_jax.models.transformer import BranchCache, HistoryCache


@dataclasses.dataclass(frozen=True)
class Options(ModelOptions):
    """
    Attributes:
      beam_width: number of item prefixes that beam search keeps; at least the length of the lists.
      label_smoothing: ε of each token's cross-entropy.
    """

    name = "lcrec"
    history = "tokens"
    windows = "with_target"
    reads_semantic_ids = True
    backbone_keys = SHAPE_KEYS + COMPUTATION_KEYS
    takes_checkpoint = True
    # Not "item": the model would have to predict the text between two items.
    prompt_keys = ("prefix",)

    beam_width: int = 20
    label_smoothing: float = 0.0

    def __post_init__(self):
        self.require(self.beam_width >= 1, "beam_width", "give a number from 1")
        self.require_label_smoothing()


def create(config: ml_collections.ConfigDict, options: Options, inputs: ModelInputs) -> LCRec:
    """
    Raises:
      UserError: there is text between items.
    """
    if config.prompt.item != CODES:
        raise UserError(
            f'config.prompt.item: has more than "{CODES}", and lcrec would have to predict the text between two items; '
            "leave the text out"
        )
    return LCRec(options, inputs)


class LCRec(Speller):
    """Implements `recommender.Recommender`."""

    def __init__(self, options: Options, inputs: ModelInputs):
        backbone = inputs.backbone()
        super().__init__(options, inputs.semantic_ids, backbone.decoder.config.width, inputs.rngs, backbone.embedding)
        self.text_embedding = backbone.text_embedding
        self.backbone = backbone.decoder

    def loss(self, batch: TrainBatch, rngs: nnx.Rngs) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        states = self.backbone(self._embed(batch.inputs), batch.segment_ids, batch.positions, rngs)
        tokens = self._tokens(batch.targets)
        # The state that predicts a target's first token, then the states after its first, second, ... token.
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
