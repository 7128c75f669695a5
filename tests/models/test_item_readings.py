"""Readings of an LLM that is trained with the model, against reading the whole catalog at each step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from simgr_jax.models import lora
from simgr_jax.models.item_readings import TrainedReadings
from simgr_jax.models.model_inputs import Memory
from simgr_jax.models.text_reader import TextReader
from simgr_jax.models.transformer import Transformer
from simgr_jax.models.transformer_config import from_scratch_config
from tests.models.conftest import NUM_ITEMS
from tests.models.test_simgr import packed

WIDTH, LONGEST, WORDS = 8, 9, 20
SHAPE = from_scratch_config(width=WIDTH, layers=2, heads=2, kv_heads=1, head_width=4, mlp_width=12)
LENGTHS = np.random.default_rng(0).integers(1, LONGEST + 1, NUM_ITEMS)
LENGTHS[[5, 30]] = 0  # Without text.
TOKENS = np.random.default_rng(1).integers(0, WORDS, (NUM_ITEMS, LONGEST))
EMBEDDING = np.random.default_rng(2).normal(size=(WORDS, WIDTH)).astype(np.float32)
CENTER = np.random.default_rng(3).normal(size=WIDTH).astype(np.float32)
DIRECTIONS = np.random.default_rng(4).normal(size=(WIDTH, WIDTH)).astype(np.float32)


def make_reader(room):
    rngs = nnx.Rngs(7)
    decoder = Transformer(SHAPE, rngs)
    lora.add(decoder, lora.LoRAConfig(2, 4.0, ("q_proj", "down_proj"), 0.0), rngs)
    for number, (_, node) in enumerate(nnx.iter_graph(decoder)):
        if isinstance(node, lora.LoRA):  # Adapters that have learned something.
            node.b[...] = 0.3 * jax.random.normal(jax.random.key(number), node.b.shape)
    return TextReader(decoder, jnp.asarray(EMBEDDING), TOKENS, LENGTHS, CENTER, DIRECTIONS, room)


def read_alone(reader, item):
    """The reading of one text, in a row of its own; float64."""
    length = LENGTHS[item]
    if not length:
        return np.zeros(WIDTH)
    ones, positions = np.ones((1, length), np.int32), np.arange(length, dtype=np.int32)[None]
    states = reader.decoder(jnp.asarray(EMBEDDING[TOKENS[item, :length]])[None], ones, positions)[0]
    states = np.asarray(states, np.float64)
    mean = (states[1:] if length > 1 else states).mean(axis=0)
    whitened = (mean - CENTER) @ DIRECTIONS
    return whitened / np.linalg.norm(whitened)


@pytest.fixture(scope="module")
def expected():
    reader = make_reader(64)
    return np.stack([read_alone(reader, item) for item in range(NUM_ITEMS)])


def test_packed_texts_are_read_as_if_they_were_alone(expected):
    reader = make_reader(64)  # One row of 128 tokens.
    items = np.array([9, 5, 0, 36, -1, 9, 17])
    readings, was_read = nnx.jit(lambda reader, items: reader(items))(reader, items)
    assert was_read.tolist() == [True, False, True, True, False, True, True]
    np.testing.assert_allclose(readings[was_read], expected[items[was_read]], atol=1e-5)


def test_texts_for_which_there_is_no_room_are_not_read(expected):
    reader = make_reader(1)
    items = np.resize(np.flatnonzero(LENGTHS > 3), 60)
    readings, was_read = nnx.jit(lambda reader, items: reader(items))(reader, items)
    assert 10 < was_read.sum() < 60 and LENGTHS[items[was_read]].sum() <= 128
    np.testing.assert_allclose(readings[was_read], expected[items[was_read]], atol=1e-5)


@pytest.mark.parametrize("room", [1, 1000])
def test_the_whole_catalog_is_read_in_parts(expected, room):
    readings = TrainedReadings(np.ones((NUM_ITEMS, WIDTH), np.float32), "float32", make_reader(room))
    parts = np.asarray(readings.reader.parts)
    assert sorted(parts[parts >= 0]) == np.flatnonzero(LENGTHS).tolist()
    nnx.jit(lambda readings: readings.read_all())(readings)
    np.testing.assert_allclose(readings.table[...], expected, atol=1e-5)


def test_a_step_reads_the_batchs_items_and_some_others_and_remembers_them(expected):
    remembered = np.random.default_rng(9).normal(size=(NUM_ITEMS, WIDTH)).astype(np.float32)
    readings = TrainedReadings(remembered, "float32", make_reader(1))
    asked = np.array([9, 4, 9, 9, 36, 5, 4])

    @nnx.jit
    def step(readings, key):
        readings.read_some(asked, NUM_ITEMS, key)
        fresh, readings.fresh = readings.fresh, nnx.data(None)
        return fresh, readings.table[...]

    fresh, table = step(readings, jax.random.key(0))
    read = np.asarray(fresh.items)[np.asarray(fresh.is_one)]
    assert {9, 4, 36} < set(read) and len(set(read)) == len(read) and 5 not in read
    np.testing.assert_allclose(table[read], expected[read], atol=1e-5)
    others = np.setdiff1d(np.arange(NUM_ITEMS), read)
    np.testing.assert_array_equal(np.asarray(table)[others], remembered[others])
    np.testing.assert_array_equal(np.flatnonzero(np.asarray(fresh.place) >= 0), np.sort(read))
    again = step(readings, jax.random.key(1))[0]
    assert set(np.asarray(again.items)[np.asarray(again.is_one)]) != set(read)


@pytest.fixture(scope="module")
def make(make_simgr):
    """A function (room, **changes of the options) -> SimGR, which remembers what its reader reads."""

    def make(room, **changes):
        changes = {"item_text": "trained", "item_text_dropout": 0.0, **changes}
        model = make_simgr(readings=np.ones((NUM_ITEMS, WIDTH), np.float32), reader=make_reader(room), **changes)
        nnx.jit(lambda model: model.read_catalog())(model)
        return model

    return make


def train(model, batch):
    """The loss's scalars, and the gradients."""
    graphdef, params, memory, rest = nnx.split(model, nnx.Param, Memory, ...)

    @jax.jit
    def of(params, memory):
        def loss(params):
            model = nnx.merge(graphdef, params, jax.tree.map(lambda x: x, memory), rest)
            return model.loss(batch, nnx.Rngs(dropout=0, negatives=3))

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, scalars), gradients = of(params, memory)
    return scalars | {"loss": loss}, gradients


def test_the_llm_learns_from_an_estimate_of_the_cross_entropy_over_the_catalog(make):
    """By hand, from the model's vectors: the chance of each item to be read divides its share of the normalizer."""
    model = make(1)
    batch, counts = packed(model), np.arange(NUM_ITEMS) + 1
    scalars, gradients = train(model, batch)
    assert all(leaf.any() for leaf in jax.tree.leaves(nnx.to_pure_dict(gradients)["readings"]))

    items = jnp.concatenate([jnp.where(batch.valid, of, -1) for of in (batch.targets, batch.last_items)])
    read = lambda readings: readings.read_some(items.reshape(-1), NUM_ITEMS, nnx.Rngs(negatives=3).negatives())  # noqa: E731
    fresh = nnx.jit(lambda readings: jax.tree.map(lambda x: x, read(readings)))(model.readings)
    model.readings.fresh = nnx.data(None)
    among = np.asarray(fresh.items)[np.asarray(fresh.is_one)]
    in_batch = np.unique(np.concatenate([batch.targets[batch.valid], batch.last_items[batch.valid]]))
    assert 0 < len(np.intersect1d(among, in_batch)) < len(among)

    vectors = np.asarray(model.item_vectors(model.catalog()), np.float64)
    users = np.asarray(model.user_states(batch.inputs, batch.segment_ids, batch.positions, None), np.float64)
    users = np.take_along_axis(users, batch.readouts[..., None], axis=1)
    users /= np.linalg.norm(users, axis=-1, keepdims=True)
    table, losses = np.asarray(model.readings.table, np.float64), []
    chance = 1 - np.exp(-batch.valid.sum() * counts / counts.sum())
    chance = 1 - (1 - float(fresh.share_of_batch) * chance) * (1 - float(fresh.share_of_others))
    for row, place in zip(*np.nonzero(batch.valid), strict=True):
        begin = max(np.flatnonzero(batch.starts[row, : place + 1]))
        history, target = batch.last_items[row, begin : place + 1], batch.targets[row, place]
        text = sum(0.5**age * table[item] for age, item in enumerate(history[::-1]))
        user = np.concatenate([users[row, place], text / max(np.linalg.norm(text), 1e-12)])
        if target in among:
            others = np.setdiff1d(among, [*history, target])
            logits = vectors @ user / 0.2
            normalizer = np.exp(logits[target]) + np.sum(np.exp(logits[others]) / chance[others])
            losses.append(np.log(normalizer) - logits[target])
    assert len(losses) > 3
    np.testing.assert_allclose(scalars["item_text_loss"], np.mean(losses), rtol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"popularity_prior": 0.5, "repeat_bias": True, "catalog_chunk": 5}, marks=pytest.mark.slow),
        pytest.param({"in_batch_weight": 0.5, "sampled_weight": 0.5, "history": "tokens"}, marks=pytest.mark.slow),
    ],
)
def test_all_else_is_learned_as_with_fixed_readings(make, make_simgr, changes):
    """If the model remembers what it would read, its other losses are those of a model with these readings."""
    model = make(1, **changes)
    found, _ = train(model, packed(model))
    fixed = make_simgr(readings=np.asarray(model.readings.table), item_text="read", item_text_dropout=0.0, **changes)
    wanted, _ = train(fixed, packed(fixed))
    for name in set(wanted) - {"loss", "sampled_loss"}:  # The sampled loss has other negatives.
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(found["loss"] - found["item_text_loss"], wanted["loss"], rtol=0.1)


def test_the_catalog_has_the_steps_readings_whether_it_is_encoded_whole_or_in_chunks(make):
    """The model remembers something else than it would read."""
    stale, losses = np.random.default_rng(0).normal(size=(NUM_ITEMS, WIDTH)), []
    for chunk in (0, 5):
        model = make(1, catalog_chunk=chunk)
        model.readings.table[...] = jnp.asarray(stale, jnp.float32)
        losses.append(train(model, packed(model))[0]["full_catalog_loss"])
    np.testing.assert_allclose(*losses, rtol=1e-5)
