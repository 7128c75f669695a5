"""From a config to a model."""

from __future__ import annotations

import dataclasses
import importlib

import ml_collections
from flax import nnx
from jaxtyping import Array, Float

from simgr_jax import sharding
from simgr_jax.data.dataset import Sequences
from simgr_jax.errors import UserError
from simgr_jax.models import lora
from simgr_jax.models.inputs import Backbone, ModelInputs
from simgr_jax.models.recommender import Recommender
from simgr_jax.models.transformer import Transformer, TransformerConfig, from_scratch_config
from simgr_jax.semantic_ids.tokenizer import SemanticIds

# Each is a module here, with a function `create(config, inputs) -> Recommender`.
MODELS = (
    "simgr",
    "popularity",
    "autoregressive",
    "encoder_decoder",
    "parallel",
    "item_knn",
    "gru4rec",
    "sasrec",
    "bert4rec",
    "hstu",
)

# Those that know an item by its index alone, whatever its semantic ID.
BY_INDEX = ("popularity", "item_knn", "gru4rec", "sasrec", "bert4rec", "hstu")

# What of `config.backbone` a checkpoint decides.
SHAPE_KEYS = ("width", "layers", "heads", "kv_heads", "head_width", "mlp_width", "rope_theta", "norm_epsilon")
# What of it is the user's choice for any decoder.
COMPUTATION_KEYS = ("dropout", "dtype", "remat", "attention")


def scratch_backbone_config(config: ml_collections.ConfigDict) -> TransformerConfig:
    """The shape of a backbone without a checkpoint.

    Raises:
      UserError: a value that no decoder can have.
    """
    return from_scratch_config(**{key: config.backbone[key] for key in SHAPE_KEYS + COMPUTATION_KEYS})


def create(
    config: ml_collections.ConfigDict, semantic_ids: SemanticIds, train: Sequences, backbone: Backbone | None = None
) -> Recommender:
    """The model of `config.model`, spread over the mesh: from an LLM, or with random parameters.

    Args:
      backbone: a checkpoint's; None makes one of random parameters.

    Raises:
      UserError: a value that no model can have.
    """
    rngs = nnx.Rngs(config.seed)

    def scratch() -> Backbone:
        backbone_config = scratch_backbone_config(config)
        return Backbone(sharding.create(lambda rngs: Transformer(backbone_config, rngs), rngs))

    make_backbone = scratch if backbone is None else lambda: backbone
    model = assemble(config, ModelInputs(semantic_ids, train, make_backbone, rngs))
    sharding.place(model)
    return model


def assemble(config: ml_collections.ConfigDict, inputs: ModelInputs) -> Recommender:
    """As `create`, wherever its arrays lie; can be traced."""
    name = config.model.name
    if name not in MODELS:
        raise UserError(f'config.model.name: "{name}" is unknown; choose one of {", ".join(MODELS)}')

    def with_adapters() -> Backbone:
        backbone = inputs.backbone()
        if config.lora.rank:
            fields = {field.name: config.lora[field.name] for field in dataclasses.fields(lora.LoRAConfig)}
            lora.add(backbone.decoder, lora.LoRAConfig(**fields), inputs.rngs)
        return backbone._replace(text_embedding=_text_embedding(config, backbone.text_embedding))

    module = importlib.import_module(f"simgr_jax.models.{name}")
    return module.create(config, inputs._replace(backbone=with_adapters))


def _text_embedding(config: ml_collections.ConfigDict, values: Float[Array, "W D"] | None) -> nnx.Variable | None:
    if values is None:
        return None
    return (lora.Frozen if config.lora.rank else nnx.Param)(values)
