"""The table of all models, and how a config becomes one of them."""

from __future__ import annotations

import dataclasses
import importlib
from types import ModuleType

import ml_collections
from flax import nnx
from jaxtyping import Array, Float

from simgr_jax.devices import sharding
from simgr_jax.errors import UserError
from simgr_jax.models import lora
from simgr_jax.models.model_inputs import Backbone, ModelInputs
from simgr_jax.models.options import ModelOptions
from simgr_jax.models.recommender import Recommender

# A model is a module with `Options` (see `options.ModelOptions`) and `create(config, options, inputs) -> Recommender`.
# To add one, write the module and name it here.
MODELS = {
    "simgr": "simgr_jax.models.simgr",
    "lcrec": "simgr_jax.models.lcrec",
    "tiger": "simgr_jax.models.tiger",
    "rpg": "simgr_jax.models.rpg",
    "sasrec": "simgr_jax.models.sasrec",
    "hstu": "simgr_jax.models.hstu",
    "bert4rec": "simgr_jax.models.bert4rec",
    "gru4rec": "simgr_jax.models.gru4rec",
    "item_knn": "simgr_jax.models.item_knn",
    "popularity": "simgr_jax.models.popularity",
}


def module_of(name: str) -> ModuleType:
    """
    Raises:
      UserError: there is no such model.
    """
    if name not in MODELS:
        raise UserError(f'config.model: "{name}" is unknown; choose one of {", ".join(MODELS)}')
    return importlib.import_module(MODELS[name])


def default_options() -> dict[str, dict[str, object]]:
    """The config groups of all models that have options, with their defaults."""
    groups = {name: dataclasses.asdict(module_of(name).Options()) for name in MODELS}
    return {name: group for name, group in groups.items() if group}


def options_of(config: ml_collections.ConfigDict) -> ModelOptions:
    """The options of the model that `config.model` names.

    Raises:
      UserError: there is no such model, or one of its options is invalid.
    """
    return module_of(config.model).Options(**config.get(config.model, {}))


def has_checkpoint(config: ml_collections.ConfigDict) -> bool:
    """Whether the model starts from the LLM of `config.backbone.checkpoint`. Models that take none ignore the key."""
    return options_of(config).takes_checkpoint and bool(config.backbone.checkpoint)


def trains_item_reader(config: ml_collections.ConfigDict) -> bool:
    """Whether the LLM that reads the items' texts is trained with the model."""
    return options_of(config).trains_item_reader


def item_reader_adapters(config: ml_collections.ConfigDict) -> lora.LoRAConfig:
    """The adapters of the LLM that reads the items' texts: on the same projections as a backbone's, with alpha 2r."""
    rank = config.item_reader.lora_rank
    return lora.LoRAConfig(rank, 2.0 * rank, tuple(config.lora.targets), 0.0)


def create(config: ml_collections.ConfigDict, inputs: ModelInputs) -> Recommender:
    """The model that `config.model` names, spread over the mesh.

    Raises:
      UserError: a config value is invalid.
    """
    model = assemble(config, inputs)
    sharding.place(model)
    return model


def assemble(config: ml_collections.ConfigDict, inputs: ModelInputs) -> Recommender:
    """Like `create`, but leaves arrays where they are, so it can be traced."""

    def with_adapters() -> Backbone:
        backbone = inputs.backbone()
        if config.lora.rank:
            fields = {field.name: config.lora[field.name] for field in dataclasses.fields(lora.LoRAConfig)}
            lora.add(backbone.decoder, lora.LoRAConfig(**fields), inputs.rngs)
        return backbone._replace(text_embedding=_text_embedding(config, backbone.text_embedding))

    return module_of(config.model).create(config, options_of(config), inputs._replace(backbone=with_adapters))


def _text_embedding(config: ml_collections.ConfigDict, values: Float[Array, "W E"] | None) -> nnx.Variable | None:
    if values is None:
        return None
    return (lora.Frozen if config.lora.rank else nnx.Param)(values, axes=(None, "embed"))
