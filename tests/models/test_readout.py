"""The readout of deep and pretrained backbones: the last item's vector plus a map of the standardized state."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from simgr_jax.inputs.train_batches import train_batches
from simgr_jax.models import readout
from simgr_jax.models.readout import LastItem
from simgr_jax.training.checkpoints import Checkpoints
from simgr_jax.training.standardize import BATCHES, standardize
from tests.models.test_simgr import packed
from tests.training import tiny_run


@pytest.mark.parametrize(
    ("name", "has_checkpoint", "layers", "chosen"),
    [
        ("auto", False, 2, "state"),
        ("auto", False, 4, "state"),
        ("auto", False, 5, "last_item"),
        ("auto", True, 2, "last_item"),
        ("state", True, 30, "state"),
        ("last_item", False, 1, "last_item"),
    ],
)
def test_deep_and_pretrained_backbones_have_it_by_default(name, has_checkpoint, layers, chosen):
    assert readout.choose(name, has_checkpoint, layers) == chosen


def test_the_users_vector_is_the_last_items_plus_a_map_of_the_standardized_state():
    generator = np.random.default_rng(0)
    states, vectors, mean, deviation, kernel = (
        generator.normal(3, 2, shape) for shape in ((5, 7), (5, 7), 7, 7, (7, 7))
    )
    deviation = np.abs(deviation)
    layer = LastItem(7)
    layer.standardize_by(mean, deviation)
    layer.map[...] = jnp.asarray(kernel, jnp.float32)
    expected = vectors + (states - mean) / deviation @ kernel / np.sqrt(7)
    np.testing.assert_allclose(layer(states, vectors), expected, rtol=1e-4, atol=1e-4)
    kernel, bias = layer.folded()
    np.testing.assert_allclose(vectors + states @ kernel + bias, expected, rtol=1e-4, atol=1e-4)


def test_a_dimension_that_never_changes_is_no_division_by_zero():
    layer = LastItem(2)
    layer.standardize_by(np.array([1.0, 5.0]), np.array([2.0, 0.0]))
    np.testing.assert_array_equal(layer.deviation[...], [2, 1])


@pytest.mark.parametrize("history", ["item", "tokens"])
def test_an_untrained_model_ranks_the_item_that_was_read_last_first(history):
    config = tiny_run.config()
    config.simgr.update({"readout": "last_item", "history": history, "item_encoder": "mean"})
    model, cases = tiny_run.make_model(config), tiny_run.split().validation
    ranking = tiny_run.make_ranker(config, model).rank(model, cases, 10)
    np.testing.assert_array_equal(ranking.items[:, 0], [one[-1] for one in cases.histories])


def test_training_and_ranking_read_the_same_users_vector(make_simgr):
    """The loss of a batch is that of its readouts, each ranked as a history of its own."""
    model = make_simgr(readout="last_item")
    generator = np.random.default_rng(0)
    model.readout.standardize_by(generator.normal(size=8), np.full(8, 0.7))
    model.readout.map[...] = jnp.asarray(generator.normal(size=(8, 8)), jnp.float32)
    batch = packed(model)
    loss, _ = jax.jit(lambda model: model.loss(batch, nnx.Rngs(dropout=0)))(model)

    vectors = np.asarray(model.encode_items(), np.float64)[:37]
    states = np.asarray(model.user_states(batch.inputs, batch.segment_ids, batch.positions, None), np.float64)
    states = np.take_along_axis(states, batch.readouts[..., None], axis=1)[batch.valid]
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    kernel, bias = model.readout.folded()
    users = unit[batch.last_items[batch.valid]] + states @ kernel + bias
    logits = users / np.linalg.norm(users, axis=1, keepdims=True) @ unit.T / 0.2
    expected = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(users)), batch.targets[batch.valid]]
    np.testing.assert_allclose(loss, expected.mean(), rtol=1e-4)


def test_the_states_of_some_batches_give_mean_and_deviation():
    config = tiny_run.config()
    config.simgr.readout = "last_item"
    model, windows = tiny_run.make_model(config), tiny_run.make_windows(config)
    make_batches = lambda: train_batches(windows, 4, config.seed)  # noqa: E731
    standardize(model, make_batches)

    states = []
    for batch in itertools.islice(iter(batches := make_batches()), BATCHES):
        found = np.asarray(model.user_states(batch.inputs, batch.segment_ids, batch.positions, None), np.float64)
        states.append(np.take_along_axis(found, batch.readouts[..., None], axis=1)[batch.valid])
    batches.close()
    states = np.concatenate(states)
    np.testing.assert_allclose(model.readout.mean[...], states.mean(axis=0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model.readout.deviation[...], states.std(axis=0), rtol=1e-4)


def test_the_map_is_trained_and_the_statistics_are_not(tmp_path):
    config = tiny_run.config(epochs=2)
    config.simgr.readout = "last_item"
    fresh = tiny_run.make_model(config)
    standardize(fresh, lambda: train_batches(tiny_run.make_windows(config), 4, config.seed))
    params = nnx.state(fresh, nnx.Param)
    expected = jax.device_get(params["readout"])
    tiny_run.train(config, tmp_path)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        found = checkpoints.restore_best(params)["readout"]
    for name in ("mean", "deviation"):
        np.testing.assert_array_equal(found[name][...], expected[name][...])
    assert np.abs(found["map"][...]).max() > 0
