"""The backbone of a run without a checkpoint: a randomly initialized decoder, shaped by `config.backbone`."""

from __future__ import annotations

import ml_collections
from flax import nnx

from simgr_jax.devices import sharding
from simgr_jax.models.model_inputs import Backbone
from simgr_jax.models.options import COMPUTATION_KEYS, SHAPE_KEYS
from simgr_jax.models.transformer import Transformer
from simgr_jax.models.transformer_config import TransformerConfig, from_scratch_config


def scratch_config(config: ml_collections.ConfigDict) -> TransformerConfig:
    """The decoder's shape.

    Raises:
      UserError: a config value is invalid.
    """
    return from_scratch_config(**{key: config.backbone[key] for key in SHAPE_KEYS + COMPUTATION_KEYS})


def scratch_backbone(config: ml_collections.ConfigDict, rngs: nnx.Rngs) -> Backbone:
    """The decoder, spread over the mesh."""
    shape = scratch_config(config)
    return Backbone(sharding.create(lambda rngs: Transformer(shape, rngs), rngs))
