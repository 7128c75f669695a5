"""What models are made from."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from simgr_jax.data.dataset import Sequences
from simgr_jax.errors import UserError
from simgr_jax.models.transformer import Transformer
from simgr_jax.semantic_ids.tokenizer import SemanticIds


def check_label_smoothing(epsilon: float) -> None:
    """
    Raises:
      UserError: `config.loss.label_smoothing` can't be that.
    """
    if not 0 <= epsilon < 1:
        raise UserError(f"config.loss.label_smoothing: {epsilon} is not in [0, 1); give a fraction like 0.1")


class Catalog(nnx.Variable):
    """What a model knows of the catalog and does not learn: made anew from the data, in no checkpoint."""


class Backbone(NamedTuple):
    """A decoder, and what else a recommender takes over from an LLM.

    Attributes:
      decoder: with the LLM's weights, or random ones.
      embedding: float32 [V, D], where the semantic-ID tokens begin; None begins at random.
      text_embedding: [W, D], of the LLM's own tokens those that prompts have, or None where they have none. What models
        get is a variable, learned or not.
    """

    decoder: Transformer
    embedding: Float[np.ndarray, "V D"] | None = None
    text_embedding: Float[Array, "W D"] | nnx.Variable | None = None


class ModelInputs(NamedTuple):
    """
    Attributes:
      semantic_ids: of the catalog.
      train: the training sequences.
      backbone: makes the decoder of `config.backbone`, for models that have one.
      rngs: of the random parameters.
    """

    semantic_ids: SemanticIds
    train: Sequences
    backbone: Callable[[], Backbone]
    rngs: nnx.Rngs

    @property
    def item_counts(self) -> np.ndarray:
        """int64 [N], how often each item occurs in training."""
        return np.bincount(self.train.values, minlength=self.semantic_ids.num_items)
