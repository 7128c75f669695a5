"""The mesh and the table of shardings. Computations on meshes are tested in the `sharded_*.py` of each folder."""

import jax
import jax.numpy as jnp
import ml_collections
import pytest
from flax import nnx
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from simgr_jax.devices import sharding
from simgr_jax.errors import UserError
from simgr_jax.models.transformer import Transformer, from_scratch_config

MESH = AbstractMesh((2, 4, 2), sharding.AXES)


def mesh_config(data, fsdp, tensor):
    return ml_collections.ConfigDict({"data": data, "fsdp": fsdp, "tensor": tensor})


def test_an_axis_of_size_minus_one_takes_the_remaining_devices():
    mesh = sharding.make_mesh(mesh_config(1, -1, 1))
    assert mesh.shape == {"data": 1, "fsdp": jax.device_count(), "tensor": 1}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((2, 1, 1), "config.mesh: data 2, fsdp 1, tensor 1 does not make up 1 devices"),
        ((3, -1, 1), "config.mesh: data 3, fsdp -1, tensor 1 does not make up 1 devices"),
        ((-1, -1, 1), "give sizes from 1, and -1 to one axis at most"),
        ((1, 0, 1), "give sizes from 1, and -1 to one axis at most"),
        ((1, -2, 1), "give sizes from 1, and -1 to one axis at most"),
    ],
)
def test_a_mesh_that_is_not_the_devices_is_refused(sizes, message):
    with pytest.raises(UserError, match=message):
        sharding.make_mesh(mesh_config(*sizes))


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        ("backbone.layers.self_attn.q_proj.kernel", (36, 64, 128), P(None, ("fsdp",), ("tensor",))),
        ("backbone.layers.self_attn.o_proj.kernel", (36, 128, 64), P(None, ("tensor",), ("fsdp",))),
        ("backbone.layers.mlp.gate_proj.kernel", (36, 8, 64, 128), P(None, None, ("fsdp",), ("tensor",))),
        ("optimizer_state.1.0.mu.backbone.layers.mlp.down_proj.kernel", (36, 64, 8), P(None, ("tensor",), ("fsdp",))),
        ("backbone.layers.self_attn.q_proj.lora.a", (36, 64, 16), P(None, ("fsdp",), None)),
        ("embedding", (1024, 64), P(None, ("fsdp",))),
        ("text_embedding", (999, 64), P(None, ("fsdp",))),
        ("head_kernel", (32, 64, 64), P(None, ("fsdp",), None)),
        ("item_encoder.mlp.input", (4, 64, 32), P(None, ("fsdp",), None)),
        ("tokens", (80, 4), P(("fsdp", "tensor"), None)),
        ("backbone.layers.pre_mlp_norm.scale", (36, 64), P()),
        ("log_temperature", (), P()),
        ("optimizer_state.0.count", (), P()),
        # 63 can't be cut in 4, 127 not in 2.
        ("backbone.layers.self_attn.q_proj.kernel", (36, 63, 128), P(None, None, ("tensor",))),
        ("backbone.layers.self_attn.q_proj.kernel", (36, 64, 127), P(None, ("fsdp",), None)),
    ],
)
def test_parameters_are_cut_by_their_names(path, shape, expected):
    assert sharding.parameter_spec(path, shape, MESH) == expected


@pytest.mark.parametrize(
    "choices",
    [{}, {"experts": 4, "experts_per_token": 2}, {"gated_mlp": False, "mlp_bias": True, "max_positions": 16}],
)
def test_all_that_is_large_in_a_decoder_is_cut(choices):
    config = from_scratch_config(
        width=64, layers=2, heads=8, kv_heads=4, head_width=16, mlp_width=64, attention_bias=True, **choices
    )
    state = nnx.state(nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0))))
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
        spec = sharding.parameter_spec(name, leaf.shape, MESH)
        is_small = "norm" in name or "bias" in name or "router" in name
        assert ("fsdp" in str(spec)) != is_small, (name, spec)


def test_without_a_mesh_everything_stays_where_it_is():
    x = jnp.ones((4, 3))
    assert sharding.constrain(x, "batch", None) is x
    assert sharding.psum(x, "items") is x and sharding.all_gather(x, "items") is x
    assert sharding.shards("items") == 1 and sharding.item_axes() == ()
    assert sharding.platform() == jax.default_backend()
    double = lambda x: 2 * x  # noqa: E731
    assert sharding.per_device(double, (sharding.spec("batch"),), sharding.spec("batch")) is double
