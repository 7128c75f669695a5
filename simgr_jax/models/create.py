"""From a config to a model."""

from __future__ import annotations

import ml_collections
import numpy as np
from flax import nnx

from simgr_jax.errors import UserError
from simgr_jax.models.recommender import Recommender
from simgr_jax.models.simgr import SimGR, SimGRConfig
from simgr_jax.models.transformer import from_scratch_config
from simgr_jax.semantic_ids.tokenizer import SemanticIds


def create(
    config: ml_collections.ConfigDict, semantic_ids: SemanticIds, item_counts: np.ndarray, seed: int
) -> Recommender:
    """The model of `config.model`, with random parameters.

    Args:
      item_counts: int [N], how often each item occurs in training.

    Raises:
      UserError: a value that no model can have.
    """
    head = config.model.to_dict()
    if (name := head.pop("name")) != "simgr":
        raise UserError(f'config.model.name: "{name}" is unknown; choose "simgr"')
    return SimGR(
        SimGRConfig(**head, **config.loss),
        from_scratch_config(**config.backbone),
        semantic_ids.tokens,
        semantic_ids.codebook_sizes,
        item_counts,
        nnx.Rngs(seed),
    )
