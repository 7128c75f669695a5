import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from simgr_jax.devices import sharding
from simgr_jax.errors import UserError
from simgr_jax.models import lora
from simgr_jax.models.lora import Frozen, LoRAConfig
from simgr_jax.models.transformer import Transformer
from simgr_jax.models.transformer_config import from_scratch_config

CONFIG = from_scratch_config(width=8, layers=3, heads=2, kv_heads=1, head_width=4, mlp_width=12)
LORA = LoRAConfig(rank=2, alpha=6.0, targets=("q_proj", "down_proj"), dropout=0.0)
INPUTS = (np.random.default_rng(0).normal(size=(2, 5, 8)), np.ones((2, 5), int), np.tile(np.arange(5), (2, 1)))


def adapted(config=LORA, dtype="float32"):
    model = Transformer(dataclasses.replace(CONFIG, dtype=dtype), nnx.Rngs(0))
    lora.add(model, config, nnx.Rngs(1))
    return model


def trained(model):
    """The model with random adapters."""
    generator = np.random.default_rng(3)
    random = lambda x: jnp.asarray(generator.normal(size=x.shape), jnp.float32)  # noqa: E731
    nnx.update(model, jax.tree.map(random, nnx.state(model, nnx.Param)))
    return model


def test_an_adapted_backbone_begins_as_the_one_it_adapts():
    np.testing.assert_array_equal(adapted()(*INPUTS), Transformer(CONFIG, nnx.Rngs(0))(*INPUTS))


def test_only_the_adapters_are_parameters():
    model = adapted()
    names = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    places = ("layers.0.self_attn.q_proj.lora", "layers.0.mlp.down_proj.lora")
    assert names == {f"{place}.{matrix}" for place in places for matrix in "ab"}
    frozen = jax.tree.leaves(nnx.state(model, Frozen))
    assert sum(x.size for x in frozen) == sum(
        x.size for x in jax.tree.leaves(nnx.state(Transformer(CONFIG, nnx.Rngs(0))))
    )


@pytest.mark.parametrize("shape", [(3, 40, 4), (7, 5), (2, 3, 64, 8)])
def test_an_adapters_first_matrix_is_drawn_as_flax_draws_it(shape):
    he_uniform = nnx.initializers.he_uniform(batch_axis=tuple(range(len(shape) - 2)))
    key = jax.random.key(3)
    np.testing.assert_array_equal(lora._he_uniform(key, shape), he_uniform(key, shape, jnp.float32))


def test_adapters_add_alpha_over_rank_times_their_product():
    model = trained(adapted())
    plain = Transformer(CONFIG, nnx.Rngs(0))
    for adapted_linear, linear in (
        (model.layers[0].self_attn.q_proj, plain.layers[0].self_attn.q_proj),
        (model.layers[0].mlp.down_proj, plain.layers[0].mlp.down_proj),
    ):
        a, b = (np.asarray(x[...], np.float64) for x in (adapted_linear.lora.a, adapted_linear.lora.b))
        linear.kernel[...] += jnp.asarray(3.0 * np.einsum("lir,lro->lio", a, b), jnp.float32)
    np.testing.assert_allclose(model(*INPUTS), plain(*INPUTS), rtol=1e-4, atol=1e-4)


def test_merging_changes_no_output_and_leaves_no_adapter():
    model = trained(adapted())
    before = model(*INPUTS)
    lora.merge(model)
    np.testing.assert_allclose(model(*INPUTS), before, rtol=1e-4, atol=1e-4)
    assert not jax.tree.leaves(nnx.state(model, nnx.Param))
    assert jax.tree.structure(nnx.to_pure_dict(nnx.state(model))) == jax.tree.structure(
        nnx.to_pure_dict(nnx.state(Transformer(CONFIG, nnx.Rngs(0))))
    )


def test_frozen_parameters_are_split_over_devices_as_before():
    """Freezing keeps the axes, and adapters have some."""
    axes = {
        ".".join(map(str, path)): sharding.axes_of(variable)
        for path, variable in nnx.to_flat_state(nnx.state(adapted()))
    }
    assert axes["layers.0.self_attn.q_proj.kernel"] == ("embed", "heads")
    assert axes["layers.0.mlp.up_proj.kernel"] == ("embed", "mlp")
    assert axes["layers.0.self_attn.q_proj.lora.a"] == ("embed", None)
    assert axes["layers.0.self_attn.q_proj.lora.b"] == (None, "embed")


def test_dropout_affects_only_the_adapters():
    dropping = dataclasses.replace(LORA, dropout=0.5)
    fresh, plain = adapted(dropping), Transformer(CONFIG, nnx.Rngs(0))
    np.testing.assert_array_equal(fresh(*INPUTS, nnx.Rngs(dropout=0)), plain(*INPUTS))
    model = trained(fresh)
    assert not np.allclose(model(*INPUTS, nnx.Rngs(dropout=0)), model(*INPUTS, nnx.Rngs(dropout=1)))


def test_an_unknown_target_is_named():
    with pytest.raises(UserError, match=r"^config\.lora\.targets: .* no projection c_attn; choose .*q_proj"):
        adapted(dataclasses.replace(LORA, targets=("q_proj", "c_attn")))


@pytest.mark.parametrize("change", [{"targets": ()}, {"dropout": 1.0}])
def test_an_impossible_config_names_its_key(change):
    with pytest.raises(UserError, match=rf"^config\.lora\.{next(iter(change))}: "):
        dataclasses.replace(LORA, **change)
