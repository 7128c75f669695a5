"""Compares the streamed loss with the dense one: values, gradients and memory."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from simgr_jax.inputs.batch import TrainBatch
from simgr_jax.models import item_encoders
from simgr_jax.models.item_encoders import ITEM_ENCODERS
from simgr_jax.models.model_inputs import Backbone
from simgr_jax.models.simgr import Options, SimGR
from simgr_jax.models.transformer import Transformer
from simgr_jax.models.transformer_config import from_scratch_config
from simgr_jax.ops.similarity_loss import full_catalog_cross_entropy, to_similarity_space
from simgr_jax.ops.streamed_loss import choose_chunk, streamed_cross_entropy
from simgr_jax.semantic_ids.codes import SemanticIds

B, N, D = 8, 23, 8
CODEBOOK_SIZES = (4, 5, 3)
SMOOTHINGS = (0.0, 0.1)
TARGETS = np.array([3, 8, 3, 0, 22, 21, 3, 14])
HEAD = {
    "user_pooling": "last",
    "item_encoder_width": 10,
    "temperature": 0.2,
    "learn_temperature": True,
    "temperature_min": 0.05,
    "temperature_max": 1.0,
    "sampled_weight": 0.0,
    "sampled_negatives": 1,
    "sampled_from": "uniform",
    "log_q": True,
    "label_smoothing": 0.1,
}


def make_ids(num_items):
    """Random codes; many items share some codes and some share all."""
    codes = np.random.default_rng(0).integers(0, CODEBOOK_SIZES, (num_items, len(CODEBOOK_SIZES)))
    return SemanticIds(codes.astype(np.int32), CODEBOOK_SIZES)


def make_tokens(num_items):
    """int32 [num_items, 3]"""
    return make_ids(num_items).tokens


def assert_trees_close(actual, expected, case=""):
    """Within 1e-5 of each array's largest entry, which must not be 0: everything learns."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, wanted), found in zip(
        jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(actual), strict=True
    ):
        largest = np.abs(wanted).max()
        assert largest > 0, (case, path)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * largest, err_msg=f"{case} {path}")


@cache
def problem(encoder_name):
    """(encode, similarity -> learned values): a random encoder, table, users and temperature.

    The similarity is one of these values, so that one program computes both: an item's vector v becomes |v|^-p v, with
    p = 1 for cosine and 0 for dot.
    """
    encoder = item_encoders.create(encoder_name, D, 2, 10, CODEBOOK_SIZES, nnx.Rngs(0))
    graphdef, state = nnx.split(encoder)
    rng = np.random.default_rng(1)
    random = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    # Some encoders initialise weights to 0, which would block the gradients of earlier layers.
    state = jax.tree.map(lambda weights: weights + 0.3 * random(*weights.shape), state)
    table, users = random(sum(CODEBOOK_SIZES), D), random(B, D)

    def encode(parameters, tokens):
        encoder, table, power = parameters
        vectors = nnx.merge(graphdef, encoder)(table, tokens)
        return vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True) ** power

    def learned(similarity):
        power = jnp.float32({"cosine": 1, "dot": 0}[similarity])
        return (state, table, power), to_similarity_space(users, similarity), jnp.float32(0.3)

    return encode, learned


def dense(encode, targets, learned, tokens, smoothing):
    parameters, users, temperature = learned
    return full_catalog_cross_entropy(users, encode(parameters, tokens), targets, temperature, smoothing)


def streamed(encode, chunk, targets, learned, tokens, smoothing):
    """The streamed loss over the first N items."""
    parameters, users, temperature = learned
    vectors = encode(parameters, tokens[targets])
    return streamed_cross_entropy(encode, parameters, tokens, N, users, vectors, temperature, smoothing, chunk)


def with_gradients(losses):
    """(losses [B], gradients of their sum, each row weighted differently), compiled."""
    weights = jnp.linspace(0, 1, B)  # The first row has weight 0, like a padded row.

    def weighted(learned, tokens, smoothing):
        found = losses(learned, tokens, smoothing)
        return found @ weights, found

    return jax.jit(jax.grad(weighted, has_aux=True))


@pytest.mark.parametrize(
    "encoders", ["mean,cross_attention", pytest.param(",".join(ITEM_ENCODERS), marks=pytest.mark.slow)]
)
def test_every_encoders_loss_and_gradients_equal_the_dense_ones_on_any_mesh(on_eight_devices, encoders, mesh):
    """For each similarity, on one device and on a mesh of eight."""
    on_eight_devices("tests.ops.sharded_loss", encoders, *mesh)


@pytest.mark.parametrize("chunk", [1, N - 1, N, 64])
def test_the_chunk_size_does_not_change_the_result(chunk):
    encode, learned = problem("mean")
    learned, tokens = learned("dot"), make_tokens(N)
    wanted_gradients, wanted = with_gradients(partial(dense, encode, TARGETS))(learned, tokens, 0.1)
    gradients, losses = with_gradients(partial(streamed, encode, chunk, TARGETS))(learned, tokens, 0.1)
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)
    assert_trees_close(gradients, wanted_gradients)


@pytest.mark.parametrize("order", [1, -1])
def test_logits_too_large_to_exponentiate_are_folded_in_any_order(order):
    """Each item is one token, and its logit is 50 above or below the previous item's."""
    table = jnp.arange(N, dtype=jnp.float32)[::order, None] * 50
    tokens = jnp.arange(N)[:, None]
    encode = lambda table, tokens: table[tokens[:, 0]]  # noqa: E731

    def loss(table):
        target = encode(table, tokens[11:12])
        return streamed_cross_entropy(encode, table, tokens, N, jnp.ones((1, 1)), target, 1.0, 0.0, 4)[0]

    value, gradient = jax.value_and_grad(loss)(table)
    assert value == 50 * 11
    np.testing.assert_allclose(gradient[:, 0], np.eye(N)[::order][N - 1] - np.eye(N)[11], atol=1e-20)


def make_simgr(num_items, catalog_chunk, **changes):
    backbone = Transformer(
        from_scratch_config(width=8, layers=1, heads=2, kv_heads=1, head_width=4, mlp_width=12), nnx.Rngs(0)
    )
    options = Options(**HEAD | changes, catalog_chunk=catalog_chunk)
    readings = np.random.default_rng(3).normal(size=(num_items, 6)) if options.item_text == "read" else None
    return SimGR(options, Backbone(backbone), make_ids(num_items), np.arange(num_items), nnx.Rngs(1), readings)


BATCH = TrainBatch(
    inputs=np.array([[3, 1, 4, 1, 5, 0], [9, 2, 6, 0, 0, 0]], np.int32),
    segment_ids=np.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 0, 0, 0]], np.int32),
    positions=np.array([[0, 1, 2, 0, 1, 0], [0, 1, 2, 0, 0, 0]], np.int32),
    readouts=np.array([[0, 1, 2, 3, 4, 0], [0, 1, 2, 0, 0, 0]], np.int32),
    last_items=np.array([[3, 1, 4, 1, 5, 0], [9, 2, 6, 0, 0, 0]], np.int32),
    targets=np.array([[1, 4, 1, 5, 9, 0], [2, 6, 22, 0, 0, 0]], np.int32),
    valid=np.array([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]], bool),
)


def lowered_loss(model):
    """A compiled function that returns (gradients, (loss, scalars)), and its arguments."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, rest):
        value, scalars = nnx.merge(graphdef, params, rest).loss(BATCH, nnx.Rngs(dropout=0))
        return value, (value, scalars)

    return jax.jit(jax.grad(loss, has_aux=True)).lower(params, rest).compile(), (params, rest)


@pytest.mark.parametrize(
    ("history", "encoder_name", "item_text", "similarity", "in_batch_weight"),
    [("item", "mean_mlp", "read", "cosine", 0.0), ("tokens", "cross_attention", "none", "dot", 0.5)],
)
def test_simgr_learns_the_same_with_chunks(history, encoder_name, item_text, similarity, in_batch_weight):
    results = []
    for chunk in (0, 5):
        changes = {"history": history, "item_encoder": encoder_name, "similarity": similarity, "item_text": item_text}
        weights = {"full_catalog_weight": 0.7, "in_batch_weight": in_batch_weight}
        compiled, arguments = lowered_loss(make_simgr(N, chunk, **changes, **weights))
        results.append(compiled(*arguments))
    (wanted_gradients, wanted), (gradients, found) = results
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), found, wanted)
    # MeanMLP's output layer starts at 0, so earlier layers have no gradient yet.
    learns = lambda tree: {  # noqa: E731
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if np.abs(leaf).max() > 0
    }
    assert_trees_close(learns(gradients), learns(wanted_gradients))


def test_memory_does_not_grow_with_the_catalog():
    changes = {"history": "item", "item_encoder": "mean_mlp", "similarity": "cosine"}
    weights = {"full_catalog_weight": 1.0, "in_batch_weight": 0.0}

    def temporaries(num_items, chunk):
        compiled, _ = lowered_loss(make_simgr(num_items, chunk, **changes, **weights))
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = temporaries(1000, 64), temporaries(50_000, 64)
    # Less than one byte per item: no logits, no vectors and no copy of the tokens.
    assert large - small < 49_000
    assert temporaries(50_000, 0) > 10 * large


def test_the_chosen_chunk_is_the_whole_catalog_if_it_fits_and_else_grows_with_memory():
    gib = 2**30
    assert choose_chunk(12_000, 512, 128, 16 * gib) == 0
    assert choose_chunk(10_000_000, 512, 256, 16 * gib) == 4096
    # One of 256 chips of 16 GiB that train a wide model: the chunk's logits take a small part of its memory.
    chunk = choose_chunk(10_000_000 // 256, 100_000, 4096, 16 * gib)
    assert 0 < chunk * 100_000 * 4 < gib / 4
    assert choose_chunk(10_000_000 // 256, 100_000, 4096, 32 * gib) == 2 * chunk
    assert choose_chunk(10**9, 10**9, 10**4, gib) == 1
