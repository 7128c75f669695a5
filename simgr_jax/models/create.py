"""From a config to a model."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import ml_collections
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from simgr_jax import sharding
from simgr_jax.errors import UserError
from simgr_jax.models import lora
from simgr_jax.models.recommender import Recommender
from simgr_jax.models.simgr import SimGR, SimGRConfig
from simgr_jax.models.transformer import Transformer, TransformerConfig, from_scratch_config
from simgr_jax.semantic_ids.tokenizer import SemanticIds

# What of `config.backbone` a checkpoint decides.
SHAPE_KEYS = ("width", "layers", "heads", "kv_heads", "head_width", "mlp_width", "rope_theta", "norm_epsilon")
# What of it is the user's choice for any decoder.
COMPUTATION_KEYS = ("dropout", "dtype", "remat", "attention")


class Pretrained(NamedTuple):
    """What a recommender takes over from an LLM.

    Attributes:
      backbone: with the LLM's weights.
      embedding: float32 [V, D], where the semantic-ID tokens begin.
      text_embedding: [W, D], of the LLM's own tokens those that prompts have, or None where they have none.
    """

    backbone: Transformer
    embedding: Float[np.ndarray, "V D"]
    text_embedding: Float[Array, "W D"] | None


def scratch_backbone_config(config: ml_collections.ConfigDict) -> TransformerConfig:
    """The shape of a backbone without a checkpoint.

    Raises:
      UserError: a value that no decoder can have.
    """
    return from_scratch_config(**{key: config.backbone[key] for key in SHAPE_KEYS + COMPUTATION_KEYS})


def create(
    config: ml_collections.ConfigDict,
    semantic_ids: SemanticIds,
    item_counts: np.ndarray,
    pretrained: Pretrained | None = None,
) -> Recommender:
    """The model of `config.model`, spread over the mesh: from an LLM, or with random parameters.

    Args:
      item_counts: int [N], how often each item occurs in training.

    Raises:
      UserError: a value that no model can have.
    """
    rngs = nnx.Rngs(config.seed)
    if pretrained is None:
        backbone_config = scratch_backbone_config(config)
        pretrained = Pretrained(sharding.create(lambda rngs: Transformer(backbone_config, rngs), rngs), None, None)
    model = assemble(config, semantic_ids, item_counts, pretrained, rngs)
    sharding.place(model)
    return model


def assemble(
    config: ml_collections.ConfigDict,
    semantic_ids: SemanticIds,
    item_counts: np.ndarray,
    pretrained: Pretrained,
    rngs: nnx.Rngs,
) -> Recommender:
    """As `create`, wherever its arrays lie; can be traced."""
    head = config.model.to_dict()
    if (name := head.pop("name")) != "simgr":
        raise UserError(f'config.model.name: "{name}" is unknown; choose "simgr"')
    if config.lora.rank:
        fields = {field.name: config.lora[field.name] for field in dataclasses.fields(lora.LoRAConfig)}
        lora.add(pretrained.backbone, lora.LoRAConfig(**fields), rngs)
    text_embedding = None
    if pretrained.text_embedding is not None:
        text_embedding = (lora.Frozen if config.lora.rank else nnx.Param)(pretrained.text_embedding)
    return SimGR(
        SimGRConfig(**head, **config.loss),
        pretrained.backbone,
        semantic_ids.tokens,
        semantic_ids.codebook_sizes,
        item_counts,
        rngs,
        embedding=pretrained.embedding,
        text_embedding=text_embedding,
    )
