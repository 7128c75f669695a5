"""What every model in the registry declares."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh

from simgr_jax.data.dataset import Sequences
from simgr_jax.devices import sharding
from simgr_jax.models import registry
from simgr_jax.models.item_encoders import ITEM_ENCODERS
from simgr_jax.models.lora import Frozen
from simgr_jax.models.model_inputs import Backbone, Catalog, ModelInputs
from simgr_jax.models.scratch import scratch_config
from simgr_jax.models.transformer import Transformer
from simgr_jax.models.user_pooling import POOLINGS
from simgr_jax.semantic_ids.codes import SemanticIds
from tests.training import tiny_run

MESH = AbstractMesh((2, 4, 2), sharding.AXES)
CODEBOOK_SIZES = (16, 16, 16)
NUM_ITEMS = 40
SHAPE = {"width": 64, "layers": 1, "heads": 4, "kv_heads": 4, "head_width": 16, "mlp_width": 64}
# Matrices have more values than this, norms and biases fewer.
LARGE = 1024
# (model, changes of its config)
CASES = [
    *((name, {}) for name in registry.MODELS),
    *(("simgr", {"simgr.item_encoder": name}) for name in ITEM_ENCODERS),
    *(("simgr", {"simgr.user_pooling": name}) for name in POOLINGS),
    ("simgr", {"simgr.history": "tokens", "simgr.learn_temperature": True}),
    ("simgr", {"lora.rank": 16}),
    ("tiger", {"tiger.encoder": "causal"}),
]


def variables(name: str, changes: dict, kinds: type | tuple[type, ...]) -> dict[str, nnx.Variable]:
    """The variables of a model by path. They hold shapes in place of arrays."""
    config = tiny_run.config(name)
    config.update_from_flattened_dict({f"backbone.{key}": value for key, value in SHAPE.items()} | changes)
    config.data.max_items, config.training.row_length, config.simgr.item_encoder_width = 20, 0, 64
    codes = np.random.default_rng(0).integers(0, CODEBOOK_SIZES, (NUM_ITEMS, 3)).astype(np.int32)
    train = Sequences.from_lists([[1, 2, 3]])

    def make(rngs: nnx.Rngs) -> nnx.Module:
        backbone = lambda: Backbone(Transformer(scratch_config(config), rngs))  # noqa: E731
        inputs = ModelInputs(NUM_ITEMS, SemanticIds(codes, CODEBOOK_SIZES), train, backbone, rngs)
        return registry.assemble(config, inputs)

    state = nnx.state(nnx.eval_shape(make, nnx.Rngs(0)), kinds)
    return {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}


def is_split(variable: nnx.Variable) -> bool:
    """Whether the devices of the "fsdp" axis share it."""
    leaves, axes = jax.tree.leaves(variable), sharding.axes_of(variable)
    return any("fsdp" in str(sharding.array_spec(axes, leaf.shape, MESH)) for leaf in leaves)


@pytest.mark.parametrize(("name", "changes"), CASES)
def test_every_large_parameter_is_split_over_devices_and_small_ones_stay_whole(name, changes):
    parameters = variables(name, changes, (nnx.Param, Frozen))
    assert bool(parameters) == registry.module_of(name).Options.is_trained
    large = {path for path, variable in parameters.items() if variable.get_value().size >= LARGE}
    assert {path for path, variable in parameters.items() if is_split(variable)} == large


def test_simgr_splits_the_catalog_by_item():
    catalog = variables("simgr", {}, Catalog)
    split = {path for path, variable in catalog.items() if is_split(variable)}
    assert split == {"tokens", "log_q", "twin_group"}


@pytest.mark.parametrize("name", ["lcrec", "tiger"])
def test_spellers_keep_the_tokens_of_all_items_whole(name):
    """Each device looks up any item's tokens."""
    catalog = variables(name, {}, Catalog)
    assert "distinct_tokens" in catalog
    assert not any(map(is_split, catalog.values()))


@pytest.mark.parametrize("name", registry.MODELS)
def test_a_models_module_options_and_config_group_have_its_name(name):
    module = registry.module_of(name)
    assert module.__name__ == f"simgr_jax.models.{name}"
    assert module.Options.name == name
    has_options = bool(dataclasses.fields(module.Options))
    assert (name in registry.default_options()) == has_options
