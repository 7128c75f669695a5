from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from simgr_jax.errors import UserError
from simgr_jax.inputs.batch import RankBatch, TrainBatch
from simgr_jax.models.bert4rec import BERT4Rec, Options, hide
from tests.training import tiny_run

SEGMENT_IDS = np.array([[1] * 7 + [2] * 2 + [3] * 3, [1] * 12, [1] * 2 + [2] * 2 + [3] * 5 + [0] * 3])


def make(max_items: int = 6, row_length: int = 12, **options) -> BERT4Rec:
    config = tiny_run.config("bert4rec", row_length=row_length)
    config.data.max_items, config.backbone.dropout = max_items, 0.0
    config.bert4rec.update(options)
    return tiny_run.make_model(config)


@pytest.fixture(scope="module")
def model() -> BERT4Rec:
    """A model whose parameters are all random, so that each one counts."""
    model, rng = make(max_items=11, mask_fraction=0.4), np.random.default_rng(0)
    state = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) / 3, jnp.float32), state))
    return model


def positions_of(segment_ids: np.ndarray) -> np.ndarray:
    first = np.diff(segment_ids, axis=1, prepend=0) != 0
    index = np.broadcast_to(np.arange(segment_ids.shape[1]), segment_ids.shape)
    return np.where(segment_ids > 0, index - np.maximum.accumulate(np.where(first, index, 0), axis=1), 0)


def draws(fraction: float, last_fraction: float, count: int = 400) -> np.ndarray:
    """bool [count, 3, 12]"""
    keys = jax.random.split(jax.random.key(0), count)
    return np.asarray(jax.vmap(lambda key: hide(key, SEGMENT_IDS, fraction, last_fraction))(keys))


def test_a_share_of_each_sequence_is_hidden_and_all_its_items_are_equally_likely():
    hidden = draws(0.3, 0.0, count=2000)
    assert not hidden[:, SEGMENT_IDS == 0].any()
    for row, segment, length in ((0, 1, 7), (0, 2, 2), (0, 3, 3), (1, 1, 12), (2, 3, 5)):
        of_sequence = hidden[:, row, SEGMENT_IDS[row] == segment]
        count = max(1, int(length * 0.3))
        assert (of_sequence.sum(axis=1) == count).all()
        np.testing.assert_allclose(of_sequence.mean(axis=0), count / length, atol=0.05)


def test_in_some_sequences_only_the_last_item_is_hidden():
    hidden = draws(0.6, 1.0)
    last = (SEGMENT_IDS > 0) & (np.diff(SEGMENT_IDS, axis=1, append=0) != 0)
    assert (hidden == last).all()
    hidden = draws(0.6, 0.25, count=2000)[:, 0, :7]  # In the other sequences four of these seven are hidden.
    counts = hidden.sum(axis=1)
    assert set(counts) == {1, 4}
    assert hidden[counts == 1, 6].all()
    np.testing.assert_allclose((counts == 1).mean(), 0.25, atol=0.04)
    # Sequences that share a row are drawn independently.
    first, second = (draws(0.6, 0.5)[:, 2, part].sum(axis=1) for part in (slice(4, 9), slice(0, 12)))
    assert len(set(zip(first.tolist(), second.tolist(), strict=True))) > 1


def test_a_state_depends_on_all_items_of_its_sequence_but_the_hidden_ones(model):
    rng = np.random.default_rng(1)
    inputs = rng.integers(0, 30, SEGMENT_IDS.shape)
    hidden = np.zeros(SEGMENT_IDS.shape, bool)
    hidden[:, 3] = True
    states = jax.jit(partial(model.states_with_hidden, segment_ids=SEGMENT_IDS, positions=positions_of(SEGMENT_IDS)))
    before = states(inputs, hidden)
    for place in range(12):
        changed = inputs.copy()
        changed[:, place] = (changed[:, place] + 1) % 30
        moved = np.abs(states(changed, hidden) - before).max(axis=-1) > 1e-6
        same_sequence = SEGMENT_IDS[:, [place]] == SEGMENT_IDS
        np.testing.assert_array_equal(moved, same_sequence & ~hidden[:, [place]])


def test_the_loss_counts_the_hidden_items_alone(model):
    rng = np.random.default_rng(2)
    inputs = rng.integers(0, 30, SEGMENT_IDS.shape)
    positions, nothing = positions_of(SEGMENT_IDS), np.zeros((3, 12), np.int32)
    # This model does not read the batch's readouts and targets.
    batch = TrainBatch(inputs, SEGMENT_IDS, positions, nothing, nothing, nothing, nothing > 0)
    hidden = np.asarray(hide(nnx.Rngs(dropout=5).dropout(), SEGMENT_IDS, 0.4, model.last_fraction))
    states = np.asarray(jax.jit(model.states_with_hidden)(inputs, hidden, SEGMENT_IDS, positions), np.float64)
    logits = states @ np.asarray(model.embedding).T + np.asarray(model.item_bias)
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    expected = -np.take_along_axis(log_probabilities, inputs[..., None], axis=-1)[..., 0][hidden].mean()

    graphdef, state = nnx.split(model)
    # There is no dropout, so the hidden items are all that the stream draws.
    loss, scalars = jax.jit(lambda state: nnx.merge(graphdef, state).loss(batch, nnx.Rngs(dropout=5)))(state)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert scalars["targets"] == hidden.sum()


@pytest.mark.parametrize("fraction", [0.01, 0.29, 0.5, 0.6, 0.95])
def test_no_hidden_item_is_left_out_of_the_loss(fraction, monkeypatch):
    """However its row is packed."""
    rows = np.array([[1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6], [1] * 12, [1] * 3 + [2] * 3 + [3] * 6, [1] * 10 + [2, 2]])
    model = make(mask_fraction=fraction, last_fraction=0.2)
    monkeypatch.setattr(model, "states_with_hidden", lambda inputs, *rest: jnp.zeros((*inputs.shape, 16)))
    monkeypatch.setattr(model, "mean_loss", lambda states, targets, valid, rngs: valid.sum())
    batch = TrainBatch(*[rows] * 6, rows > 0)
    for seed in range(5):
        hidden = hide(nnx.Rngs(dropout=seed).dropout(), rows, fraction, 0.2)
        assert model.loss(batch, nnx.Rngs(dropout=seed))[0] == hidden.sum()


@pytest.mark.parametrize(("row_length", "seen"), [(12, 6), (7, 6), (6, 5)])
def test_it_recommends_what_it_would_fill_in_after_the_history(row_length, seen):
    """Where a history fills its row, the oldest item makes room for the mask."""
    model = make(max_items=6, row_length=row_length)
    rng = np.random.default_rng(3)
    inputs, lengths = rng.integers(0, 30, (6, 6)), np.arange(6) + 1
    batch = RankBatch(inputs, lengths, np.full((6, 6), -1), np.zeros(6, np.int32))
    # Each history in a row of its own: its newest items and the mask.
    filled, hidden, segment_ids = np.zeros((3, 6, seen + 1), np.int32)
    for row, length in enumerate(lengths):
        history = inputs[row, :length][-seen:]
        filled[row, : len(history)], hidden[row, len(history)] = history, 1
        segment_ids[row, : len(history) + 1] = 1
    positions = np.broadcast_to(np.arange(seen + 1), filled.shape)
    states = jax.jit(model.states_with_hidden)(filled, hidden > 0, segment_ids, positions)
    np.testing.assert_allclose(jax.jit(model.users)(batch), states[hidden > 0], rtol=1e-4, atol=1e-5)


def test_there_are_as_many_positions_as_training_windows_have():
    """One more would rank without having been trained."""
    for max_items, row_length, longest in ((6, 12, 7), (6, 7, 7), (6, 6, 6)):
        model = make(max_items, row_length)
        assert model.encoder.position_embedding.shape[0] == longest
    assert Options().windows == "with_target"


@pytest.mark.parametrize(
    ("key", "value"), [("mask_fraction", 0.0), ("mask_fraction", 1.0), ("last_fraction", -0.1), ("last_fraction", 1.1)]
)
def test_a_fraction_outside_its_range_is_refused(key, value):
    with pytest.raises(UserError, match=rf"config\.bert4rec\.{key}: "):
        make(**{key: value})
