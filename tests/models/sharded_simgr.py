"""Compares SimGR on a mesh of eight devices with the same model on one device.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.models.sharded_simgr CASE 2 2 2

A separate program that `test_sharded_simgr.py` runs; it fails if a loss, gradient, update or ranking differs, or if a
device holds more than its part.
"""

import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from simgr_jax.devices import sharding
from simgr_jax.inputs.batch import RankBatch, TrainBatch
from simgr_jax.models import lora
from simgr_jax.models.model_inputs import Backbone, Memory
from simgr_jax.models.simgr import Options, SimGR
from simgr_jax.models.text_reader import TextReader
from simgr_jax.models.transformer import Transformer
from simgr_jax.models.transformer_config import DeltaNetShape, from_scratch_config
from simgr_jax.semantic_ids.codes import SemanticIds
from simgr_jax.training import optimizer as optimizers
from simgr_jax.training.reread import make_reread
from simgr_jax.training.state import create_state, make_train_step

SIZES = (4, 5, 3)
NUM_ITEMS = 43
SHAPE = {"width": 16, "layers": 2, "heads": 4, "kv_heads": 2, "head_width": 8, "mlp_width": 24}
OPTIONS = {
    "item_encoder_width": 8,
    "temperature": 0.2,
    "learn_temperature": True,
    "temperature_min": 0.05,
    "full_catalog_weight": 0.7,
    "sampled_negatives": 7,
    "sampled_from": "popularity",
    "label_smoothing": 0.1,
}
# (changes of the backbone, changes of the options): together they cover all code that depends on the mesh.
CASES = {
    "items": ({}, {"history": "item", "item_encoder": "mean", "catalog_chunk": 0, "similarity": "cosine"}),
    "tokens": (
        {"experts": 4, "experts_per_token": 2, "remat": "dots", "dropout": 0.3},
        {
            "history": "tokens",
            "item_encoder": "mean_mlp",
            "user_pooling": "attention",
            "catalog_chunk": 3,
            "similarity": "dot",
            "in_batch_weight": 0.3,
            "sampled_weight": 0.4,
            "item_text": "read",
            "repeat_bias": True,
            "label_smoothing": 0.0,
        },
    ),
    "texts": ({}, {"history": "item", "item_text": "trained", "repeat_bias": True, "label_smoothing": 0.0}),
    "mixers": (
        {
            "convolution_width": 3,
            "delta_net": DeltaNetShape(key_heads=2, value_heads=4, key_width=4, value_width=6),
            "layer_fields": (
                (("mixer", "gated_delta_net"),),
                (("mixer", "short_convolution"),),
                (("attention_gate", True),),
                (("kv_group", "only"), ("qk_norm", "all_heads")),
                (("kv_group", "only"), ("takes_kv", True)),
            ),
            "layer_scale": True,
            "per_layer_width": 4,
            "per_layer_count": 5,
        },
        {"history": "item", "item_encoder": "mean", "catalog_chunk": 0, "similarity": "cosine"},
    ),
}


def semantic_ids(num_items: int = NUM_ITEMS) -> SemanticIds:
    """The IDs of 43 items, of which some far apart have the same codes; repeated for more items."""
    every = np.stack(np.unravel_index(np.arange(np.prod(SIZES)), SIZES), axis=1)
    chosen = np.random.default_rng(0).permutation(every)[:NUM_ITEMS]
    chosen[[7, 40]], chosen[22] = chosen[1], chosen[21]
    return SemanticIds(np.resize(chosen, (num_items, 3)).astype(np.int32), SIZES)


def make_model(backbone: dict, options: dict, num_items: int = NUM_ITEMS) -> SimGR:
    layers = len(backbone.get("layer_fields", ())) or SHAPE["layers"]
    config, rngs = from_scratch_config(**SHAPE | {"layers": layers} | backbone), nnx.Rngs(0)
    decoder = sharding.create(lambda rngs: Transformer(config, rngs), rngs)
    options = Options(**OPTIONS | options)
    readings = np.random.default_rng(3).normal(size=(num_items, 16)) if options.reads_item_texts else None
    reader = make_reader() if options.trains_item_reader else None
    model = SimGR(options, Backbone(decoder), semantic_ids(num_items), np.arange(num_items), rngs, readings, reader)
    sharding.place(model)
    return model


def make_reader() -> TextReader:
    """Reads some 17 of the 43 texts at once, in eight rows."""
    rng, rngs = np.random.default_rng(5), nnx.Rngs(5)
    decoder = sharding.create(lambda rngs: Transformer(from_scratch_config(**SHAPE), rngs), rngs)
    lora.add(decoder, lora.LoRAConfig(2, 4.0, ("q_proj", "down_proj"), 0.0), rngs)
    lengths, tokens = rng.integers(20, 101, NUM_ITEMS), rng.integers(0, 50, (NUM_ITEMS, 100))
    embedding, center, directions = (rng.normal(size=size).astype(np.float32) for size in ((50, 16), 16, (16, 16)))
    return TextReader(decoder, jnp.asarray(embedding), tokens, lengths, center, directions, room=8 * 128)


def train_batch(history: str) -> TrainBatch:
    """Eight rows with two users each, whose items are random, and some padding."""
    rng, size = np.random.default_rng(1), 3 if history == "tokens" else 1
    items = rng.integers(0, NUM_ITEMS, (8, 6))
    inputs = semantic_ids().tokens[items[:, :5]].reshape(8, -1) if size == 3 else items[:, :5]
    segment_ids = np.repeat([[1, 1, 1, 2, 2]] * 7 + [[1, 1, 1, 0, 0]], size, axis=1)
    positions = np.concatenate([np.arange(3 * size), np.arange(2 * size)])
    readouts = np.arange(1, 6) * size - 1
    valid = segment_ids[:, readouts] > 0
    as_int = lambda x: np.broadcast_to(x, (8, np.shape(x)[-1])).astype(np.int32)  # noqa: E731
    return TrainBatch(*map(as_int, (inputs, segment_ids, positions, readouts, items[:, :5], items[:, 1:])), valid)


def rank_batch(history: str) -> RankBatch:
    """Sixteen histories. The targets are all over the catalog; some have the same codes."""
    rng = np.random.default_rng(2)
    items = rng.integers(0, NUM_ITEMS, (16, 4)).astype(np.int32)
    inputs = semantic_ids().tokens[items].reshape(16, -1) if history == "tokens" else items
    lengths = np.full(16, inputs.shape[1], np.int32)
    targets = np.array([1, 7, 40, 21, 22, 42, 0, *range(5, 14)], np.int32)
    return RankBatch(inputs, lengths, items, targets)


def train(backbone: dict, options: dict) -> tuple[dict, dict, list]:
    """The scalars and gradients of a step, and rankings after it, with history items and without."""
    model = make_model(backbone, options)
    graphdef, params, memory, rest = nnx.split(model, nnx.Param, Memory, ...)
    groups = ("new", "backbone", "item_reader")  # As with a checkpoint.
    optimizer = optax.partition(dict.fromkeys(groups, optax.adam(0.01)), optimizers.groups)
    state = create_state(params, optimizer, 0.5, memory)
    step = make_train_step(graphdef, optimizer, 0.5, 0, state)
    batch = sharding.split_batch(train_batch(options["history"]))
    assert_is_cut(state)
    state, scalars = step(state, rest, batch)
    assert_is_cut(state)

    cases = sharding.split_batch(rank_batch(options["history"]))
    rank = jax.jit(
        lambda params, memory, filters: (lambda model: model.rank(cases, model.catalog(), 10, filters))(
            nnx.merge(graphdef, params, memory, rest)
        ),
        static_argnums=2,
    )
    # The first ranks with what the step remembers, the second with the whole catalog read anew.
    memories = state.memory, make_reread(graphdef)(state.params, state.memory, rest)
    rankings = [jax.device_get(rank(state.params, memory, read)) for read, memory in enumerate(memories)]
    # After one step Adam's first moment is (1 - b1) times the gradient.
    gradients = [state.optimizer_state.inner_states[group].inner_state[0].mu for group in groups]
    return jax.device_get(scalars), jax.device_get(gradients), rankings


def assert_is_cut(state) -> None:
    """Each device has only its part of every kernel, its average and its moments."""
    mesh = sharding.current_mesh()
    parts = mesh.shape["fsdp"] * mesh.shape["tensor"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path)
        if "_proj" in name and "kernel" in name:
            # A layer's own inputs are narrow: their projections are cut by fsdp alone.
            cut = mesh.shape["fsdp"] if "per_layer" in name else parts
            assert leaf.addressable_shards[0].data.size * cut == leaf.size, (name, leaf.sharding)


def assert_same(found, wanted) -> None:
    """Within 1e-5 of each array's largest entry; what is as small as the rounding of the others counts as zero."""
    for (path, expected), actual in zip(
        jax.tree_util.tree_leaves_with_path(wanted), jax.tree.leaves(found), strict=True
    ):
        largest = max(np.abs(expected).max(), 2e-4)
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5 * largest, err_msg=str(path))


def assert_same_ranking(found, wanted) -> None:
    np.testing.assert_array_equal(found.target_rank, wanted.target_rank)
    np.testing.assert_array_equal(found.items, wanted.items)
    np.testing.assert_allclose(found.scores, wanted.scores, rtol=1e-4)


def assert_whole_catalog_is_nowhere() -> None:
    """With a large catalog no device has a float array of all items, and in training none of its own part either."""
    num_items = 4096
    model = make_model({}, {"history": "item", "item_encoder": "mean", "catalog_chunk": 64, "similarity": "dot"}, 4096)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    batch = sharding.split_batch(train_batch("item"))
    optimizer = optax.adam(0.01)
    state = create_state(params, optimizer, 0.0)
    text = make_train_step(graphdef, optimizer, 0.0, 0, state).lower(state, rest, batch).compile().as_text()
    dimensions = {int(size) for shape in re.findall(r"f32\[([\d,]+)\]", text) for size in shape.split(",")}
    longest = max(dimensions)
    assert longest < num_items // 8, longest

    rank = jax.jit(
        lambda params, rest, batch: (lambda model: model.rank(batch, model.catalog(), 10, True))(
            nnx.merge(graphdef, params, rest)
        )
    )
    text = rank.lower(params, rest, sharding.split_batch(rank_batch("item"))).compile().as_text()
    # Each device has an eighth of the catalog's arrays.
    assert not re.search(rf"f32\[([\d,]+,)?{num_items}[,\]]", text)


def main(case: str, *mesh: str) -> None:
    """mesh: the sizes of its axes."""
    assert jax.device_count() == 8
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, map(int, mesh), strict=True)))
    *wanted, wanted_rankings = train(*CASES[case])  # Without a mesh: on one device.
    with jax.set_mesh(mesh):
        *found, rankings = train(*CASES[case])
    assert_same(found, wanted)
    for ranking, wanted_ranking in zip(rankings, wanted_rankings, strict=True):
        assert_same_ranking(ranking, wanted_ranking)
    with jax.set_mesh(sharding.make_mesh({"data": 1, "fsdp": 8, "tensor": 1})):
        assert_whole_catalog_is_nowhere()


if __name__ == "__main__":
    main(*sys.argv[1:])
