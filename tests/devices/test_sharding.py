"""The mesh, and how arrays are split over it. The `sharded_*.py` of other folders test computations on meshes."""

import jax
import jax.numpy as jnp
import ml_collections
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from simgr_jax.devices import sharding
from simgr_jax.errors import UserError
from simgr_jax.models.transformer import Transformer
from simgr_jax.models.transformer_config import from_scratch_config
from simgr_jax.training.state import create_state

MESH = AbstractMesh((2, 4, 2), sharding.AXES)


def mesh_config(data, fsdp, tensor):
    return ml_collections.ConfigDict({"data": data, "fsdp": fsdp, "tensor": tensor})


def test_an_axis_of_size_minus_one_takes_the_remaining_devices():
    mesh = sharding.make_mesh(mesh_config(1, -1, 1))
    assert mesh.shape == {"data": 1, "fsdp": jax.device_count(), "tensor": 1}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((2, 1, 1), "config.mesh: data 2, fsdp 1, tensor 1 does not match 1 devices"),
        ((3, -1, 1), "config.mesh: data 3, fsdp -1, tensor 1 does not match 1 devices"),
        ((-1, -1, 1), "give sizes from 1, and -1 to at most one axis"),
        ((1, 0, 1), "give sizes from 1, and -1 to at most one axis"),
        ((1, -2, 1), "give sizes from 1, and -1 to at most one axis"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(sizes, message):
    with pytest.raises(UserError, match=message):
        sharding.make_mesh(mesh_config(*sizes))


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        (("embed", "heads"), (64, 128), P(("fsdp",), ("tensor",))),
        (("embed", None), (64, 16), P(("fsdp",), None)),
        ((None, "embed"), (1024, 64), P(None, ("fsdp",))),
        (("items", None), (80, 4), P(("fsdp", "tensor"), None)),
        (("items",), (80,), P(("fsdp", "tensor"))),
        # The axes are those of the last dimensions. Layers and experts come before them.
        (("embed", "heads"), (36, 64, 128), P(None, ("fsdp",), ("tensor",))),
        (("mlp", "embed"), (36, 8, 128, 64), P(None, None, ("tensor",), ("fsdp",))),
        # 63 is not divisible by 4, and 127 not by 2.
        (("embed", "heads"), (63, 128), P(None, ("tensor",))),
        (("embed", "heads"), (64, 127), P(("fsdp",), None)),
        # Norms and biases declare nothing.
        ((), (36, 64), P()),
        # An optimizer may keep a scalar in a parameter's place.
        (("embed", "heads"), (), P()),
    ],
)
def test_an_array_is_split_as_its_axes_say(axes, shape, expected):
    assert sharding.array_spec(axes, shape, MESH) == expected


class TwoMatrices(nnx.Module):
    def __init__(self):
        self.split = nnx.Param(jnp.ones((3, 8, 4)), axes=("embed", "mlp"))
        self.whole = nnx.Param(jnp.ones((8, 4)))


def test_the_average_and_moments_of_a_parameter_are_split_as_the_parameter_is():
    params = nnx.state(TwoMatrices())
    state = create_state(params, optax.adam(0.1), ema_decay=0.9)
    moments = state.optimizer_state[0]
    for tree in (state.params, state.averaged_params, moments.mu, moments.nu):
        assert sharding.axes_of(tree["split"]) == ("embed", "mlp")
        assert sharding.axes_of(tree["whole"]) == ()
        specs = sharding.shardings(tree)
        assert specs["split"].get_value().spec == sharding.variable_sharding(params["split"]).spec
        assert specs["split"].get_value().spec == P(None, ("fsdp",), ("tensor",))
        assert specs["whole"].get_value().spec == P()
    assert sharding.shardings(state).step.spec == P()


def test_kernels_are_gathered_along_embed_alone_and_cast():
    layer = nnx.state(TwoMatrices())
    gathered = sharding.gather_kernels(layer, "bfloat16")
    assert (gathered["split"].get_value().dtype, gathered["whole"].get_value().dtype) == (jnp.bfloat16, jnp.float32)
    specs = sharding.gathered_specs(layer)
    assert specs["split"].get_value() == P(None, None, ("tensor",))
    assert specs["whole"].get_value() == P(None, None)


@pytest.mark.parametrize(
    "choices",
    [{}, {"experts": 4, "experts_per_token": 2}, {"gated_mlp": False, "mlp_bias": True, "max_positions": 16}],
)
def test_every_large_parameter_of_a_decoder_is_split(choices):
    config = from_scratch_config(
        width=64, layers=2, heads=8, kv_heads=4, head_width=16, mlp_width=64, attention_bias=True, **choices
    )
    state = nnx.state(nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0))))
    for path, variable in nnx.to_flat_state(state):
        name = ".".join(map(str, path))
        spec = sharding.array_spec(sharding.axes_of(variable), variable.get_value().shape, MESH)
        is_small = "norm" in name or "bias" in name or "router" in name
        assert ("fsdp" in str(spec)) != is_small, (name, spec)


def test_without_a_mesh_arrays_stay_where_they_are():
    x = jnp.ones((4, 3))
    assert sharding.constrain(x, "batch", None) is x
    assert sharding.psum(x, "items") is x and sharding.all_gather(x, "items") is x
    assert sharding.shards("items") == 1 and sharding.item_axes() == ()
    assert sharding.platform() == jax.default_backend()
    double = lambda x: 2 * x  # noqa: E731
    assert sharding.per_device(double, (sharding.spec("batch"),), sharding.spec("batch")) is double
