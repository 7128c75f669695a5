"""Behaviour that all models over item indices share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from simgr_jax.errors import UserError
from simgr_jax.inputs.batch import RankBatch, TrainBatch
from simgr_jax.models import registry
from simgr_jax.models.bert4rec import BERT4Rec
from tests.training import tiny_run

NUM_ITEMS = tiny_run.NUM_ITEMS
CAUSAL = ("gru4rec", "sasrec", "hstu")
MODELS = (*CAUSAL, "bert4rec")
HISTORIES = ([3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5])
ROOM = 12


def make(name: str, **changes):
    """changes: of the config, by full key."""
    config = tiny_run.config(name)
    config.backbone.layers = 2
    config.update_from_flattened_dict(changes)
    return tiny_run.make_model(config)


@pytest.fixture(scope="module")
def models() -> dict:
    """Models without dropout, whose parameters are all random, so that each one counts."""

    def randomized(name: str):
        model, rng = make(name, **{"backbone.dropout": 0.0}), np.random.default_rng(0)
        state = nnx.state(model, nnx.Param)
        nnx.update(model, jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) / 3, jnp.float32), state))
        return model

    return {name: randomized(name) for name in MODELS}


def rows(*packed: list[list[int]]) -> tuple[np.ndarray, ...]:
    """Inputs, segment ids and positions, int32 [B, ROOM]; each argument is a list of sequences that share a row."""
    inputs, segment_ids, positions = np.zeros((3, len(packed), ROOM), np.int32)
    for row, sequences in enumerate(packed):
        lengths = [len(sequence) for sequence in sequences]
        inputs[row, : sum(lengths)] = np.concatenate(sequences)
        segment_ids[row, : sum(lengths)] = np.repeat(np.arange(len(sequences)) + 1, lengths)
        positions[row, : sum(lengths)] = np.concatenate([np.arange(length) for length in lengths])
    return inputs, segment_ids, positions


def states_of(model, inputs, segment_ids, positions) -> np.ndarray:
    """[B, ROOM, D]. From a model that reads in both directions items 1 and 5 are hidden."""
    if isinstance(model, BERT4Rec):
        hidden = (inputs == 1) | (inputs == 5)
        return np.asarray(jax.jit(model.states_with_hidden)(inputs, hidden, segment_ids, positions))
    return np.asarray(jax.jit(model.states)(inputs, segment_ids, positions))


def train_batch(*packed: list[list[int]]) -> TrainBatch:
    """The sequences without their last items. After each item the next one is the target."""
    inputs, segment_ids, positions = rows(*([items[:-1] for items in sequences] for sequences in packed))
    targets, _, _ = rows(*([items[1:] for items in sequences] for sequences in packed))
    valid = segment_ids > 0
    readouts = np.where(valid, np.arange(ROOM), 0).astype(np.int32)
    return TrainBatch(inputs, segment_ids, positions, readouts, inputs, targets, valid)


def rank_batch(histories: list[list[int]], padding: int = 0) -> RankBatch:
    """Histories of at most six items. padding: the item that fills the rows."""
    lengths = np.array([len(items) for items in histories], np.int32)
    inputs, segment_ids, _ = (array[:, :6] for array in rows(*([items] for items in histories)))
    history = np.where(segment_ids > 0, inputs, -1)
    return RankBatch(np.where(segment_ids > 0, inputs, padding), lengths, history, np.arange(len(histories)) + 3)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("name", MODELS)
def test_sequences_packed_in_a_row_are_read_as_if_apart(name, models):
    inputs, segment_ids, positions = rows(HISTORIES, *([items] for items in HISTORIES))
    states = states_of(models[name], inputs, segment_ids, positions)
    apart = [states[row, : len(items)] for row, items in enumerate(HISTORIES, start=1)]
    np.testing.assert_allclose(states[0, segment_ids[0] > 0], np.concatenate(apart), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_state_depends_on_its_own_sequence_up_to_its_position(name, models):
    inputs, segment_ids, positions = rows(HISTORIES)
    changed = np.where(np.eye(ROOM, dtype=bool), (inputs + 1) % NUM_ITEMS, inputs)  # Row t has another item t.
    rest = (np.broadcast_to(array, (ROOM, ROOM)) for array in (segment_ids, positions))
    moved = np.abs(states_of(models[name], changed, *rest) - states_of(models[name], inputs, segment_ids, positions))
    expected = np.tri(ROOM, dtype=bool).T & (segment_ids == segment_ids.T)
    real = segment_ids[0] > 0
    np.testing.assert_array_equal((moved.max(axis=-1) > 1e-6)[real][:, real], expected[real][:, real])


@pytest.mark.parametrize("name", CAUSAL)
def test_the_loss_is_the_mean_cross_entropy_of_the_next_items(name, models):
    model, batch, smoothing = models[name], train_batch([*HISTORIES], [[7, 8, 7]]), 0.2
    states = states_of(model, batch.inputs, batch.segment_ids, batch.positions).astype(np.float64)
    logits = states @ np.asarray(model.embedding).T + (0 if model.item_bias is None else np.asarray(model.item_bias))
    log_p = log_softmax(logits)
    of_target = np.take_along_axis(log_p, batch.targets[..., None], axis=-1)[..., 0]
    losses = -(1 - smoothing) * of_target - smoothing * log_p.mean(axis=-1)
    model = nnx.clone(model)
    model.label_smoothing = smoothing
    loss, _ = jax.jit(lambda batch: model.loss(batch, nnx.Rngs(0)))(batch)
    np.testing.assert_allclose(loss, losses[batch.valid].mean(), rtol=1e-5)
    assert loss.dtype == jnp.float32


def test_items_have_biases_only_where_the_paper_has_them(models):
    assert [name for name, model in models.items() if model.item_bias is not None] == ["gru4rec", "bert4rec"]


@pytest.mark.parametrize("name", MODELS)
def test_lists_hold_the_likeliest_items(name, models):
    model, histories = models[name], [[3, 1, 4], [9], [5, 6, 5, 7, 8, 2]]
    batch = rank_batch(histories)
    log_p = np.asarray(jax.jit(model.log_probabilities)(batch, model.catalog()))
    np.testing.assert_allclose(np.exp(log_p).sum(axis=1), np.ones(3), rtol=1e-5)
    if name in CAUSAL:  # The user is the state after the history's last item.
        states = states_of(model, *rows(*([items] for items in histories)))
        users = np.stack([states[row, len(items) - 1] for row, items in enumerate(histories)]).astype(np.float64)
        bias = 0 if model.item_bias is None else np.asarray(model.item_bias)
        np.testing.assert_allclose(log_p, log_softmax(users @ np.asarray(model.embedding).T + bias), rtol=1e-4)

    rank = jax.jit(model.rank, static_argnums=(2, 3))
    ranking = rank(batch, model.catalog(), 10, False)
    np.testing.assert_array_equal(ranking.items, np.argsort(-log_p, axis=1)[:, :10])
    ranks = (log_p > np.take_along_axis(log_p, batch.targets[:, None], axis=1)).sum(axis=1) + 1
    np.testing.assert_array_equal(ranking.target_rank, ranks)
    ranking = rank(batch, model.catalog(), 10, True)
    for row, items in enumerate(histories):
        assert not set(items) & set(ranking.items[row].tolist())


@pytest.mark.parametrize("name", MODELS)
def test_padding_after_a_history_does_not_matter(name, models):
    model, histories = models[name], [[3, 1, 4], [9], [5, 6, 5, 7, 8, 2]]
    users = [jax.jit(model.users)(rank_batch(histories, padding)) for padding in (0, 17)]
    np.testing.assert_array_equal(*users)


@pytest.mark.parametrize("name", MODELS)
def test_dropout_depends_on_the_key_alone(name):
    model = make(name, **{"backbone.dropout": 0.4, "bert4rec.last_fraction": 1.0})
    batch = train_batch([*HISTORIES])
    loss = jax.jit(lambda key: model.loss(batch, nnx.Rngs(dropout=key))[0])
    first, again, other = (loss(jax.random.key(seed)) for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize("name", MODELS)
def test_a_key_that_says_how_histories_are_read_does_not_exist(name):
    """They always read items."""
    config = tiny_run.config(name)
    assert registry.options_of(config).history == "item"
    assert "history" not in config[name]


@pytest.mark.parametrize("name", MODELS)
def test_label_smoothing_outside_its_range_is_refused(name):
    message = rf"config\.{name}\.label_smoothing: can't be 1\.0; give a fraction from 0 to below 1"
    with pytest.raises(UserError, match=message):
        make(name, **{f"{name}.label_smoothing": 1.0})


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) for name in ("gru4rec", "hstu", "sasrec binary")]
    + ["bert4rec", "item_knn", "sasrec"],
)
def test_learns_more_than_popularity(name, tmp_path):
    name, *loss = name.split()
    config = tiny_run.config(name, epochs=20 if name == "bert4rec" else 6, evaluate_every_epochs=2)
    if loss:
        config.sasrec.loss = loss[0]
    if name == "item_knn":  # It is not trained, so it has no log.
        model = tiny_run.make_model(config)
        score = tiny_run.evaluate(tiny_run.make_ranker(config, model), model)["NDCG@10"]
    else:
        tiny_run.train(config, tmp_path)
        score = max(line.get("validation/NDCG@10", 0) for line in tiny_run.log(tmp_path))
    assert score > 1.5 * tiny_run.popularity_ndcg()


@pytest.mark.slow
def test_models_learn_and_rank_on_a_mesh_as_on_one_device(on_eight_devices):
    on_eight_devices("tests.models.sharded_item_sequence")
