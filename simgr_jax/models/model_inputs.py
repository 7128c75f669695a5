"""What models are built from."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from simgr_jax.data.dataset import Sequences
from simgr_jax.models.transformer import Transformer
from simgr_jax.semantic_ids.codes import SemanticIds

if TYPE_CHECKING:
    from simgr_jax.models.text_reader import TextReader


class Catalog(nnx.Variable):
    """What a model knows about the catalog but does not learn. It is recomputed from the data, not saved in
    checkpoints."""


class Memory(nnx.Variable):
    """What training steps hand on to later steps and do not learn by gradients. It is saved with the training state."""


class Backbone(NamedTuple):
    """A decoder, and the embeddings that a recommender takes over from an LLM.

    Attributes:
      decoder: with the LLM's weights, or random ones.
      embedding: float32 [V, D], initial embeddings of the semantic-ID tokens; None draws them at random.
      text_embedding: [W, decoder.config.input_width], embeddings of the LLM's own tokens that occur in prompts; None if
        there are none. Models get it as a variable, trained or frozen.
    """

    decoder: Transformer
    embedding: Float[np.ndarray, "V D"] | None = None
    text_embedding: Float[Array, "W E"] | nnx.Variable | None = None


class ModelInputs(NamedTuple):
    """The arguments of a model's `create`, besides the config and its options.

    Attributes:
      num_items: N, the size of the catalog.
      semantic_ids: the catalog's; None for a model that does not read them.
      train: the training sequences.
      backbone: makes the decoder of `config.backbone`, for models that have one.
      rngs: for the random parameters.
      item_readings: gives the LLM's readings of the items' texts, float32 [N, X] (see `huggingface.item_reader`), for
        models that have a use for them.
      text_reader: makes what reads the texts within a model, given the tokens that it reads at once, for models that
        train it.
    """

    num_items: int
    semantic_ids: SemanticIds | None
    train: Sequences
    backbone: Callable[[], Backbone]
    rngs: nnx.Rngs
    item_readings: Callable[[], np.ndarray] | None = None
    text_reader: Callable[[int], TextReader] | None = None

    @property
    def item_counts(self) -> np.ndarray:
        """int64 [N], how often each item occurs in training."""
        return np.bincount(self.train.values, minlength=self.num_items)
