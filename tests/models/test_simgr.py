from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from simgr_jax.batch import RankBatch, TrainBatch
from simgr_jax.errors import UserError
from simgr_jax.models.item_encoders import ITEM_ENCODERS
from simgr_jax.models.user_pooling import POOLINGS

HISTORIES = ("item", "tokens")
LENGTHS = (4, 2, 5, 1)
USERS = [np.random.default_rng(10 + length).integers(0, 37, length + 1) for length in LENGTHS]


def train_batch(rows, length):
    """Each row a list of users (item sequences), packed one after the other."""
    arrays = np.zeros((4, len(rows), length), np.int32)
    for row, users in enumerate(rows):
        begin = 0
        for segment, user in enumerate(users, start=1):
            place = slice(begin, begin := begin + len(user) - 1)
            arrays[:, row, place] = user[:-1], user[1:], np.full(len(user) - 1, segment), np.arange(len(user) - 1)
    return TrainBatch(*arrays)


ROWS = [[USERS[0], USERS[1]], [USERS[2], USERS[3]]]
PACKED = train_batch(ROWS, 8)
ONE_A_ROW = train_batch([[user] for user in USERS], 8)


@jax.jit
def _loss(model, batch):
    return model.loss(batch, nnx.Rngs(dropout=0))


_catalog = jax.jit(lambda model: model.catalog())
_states = jax.jit(lambda model: model.user_states(PACKED.items, PACKED.segment_ids, PACKED.positions, None))


def loss_of(model, batch):
    return float(_loss(model, batch)[0])


@pytest.mark.parametrize("history", HISTORIES)
def test_a_packed_batch_has_the_loss_of_its_users_one_by_one(make_simgr, history):
    model = make_simgr(history=history, user_pooling="mean")
    alone = [loss_of(model, train_batch([[user]], 5)) for user in USERS]
    np.testing.assert_allclose(loss_of(model, PACKED), np.average(alone, weights=LENGTHS), rtol=1e-5)


@pytest.mark.parametrize("history", HISTORIES)
def test_packing_changes_neither_loss(make_simgr, history):
    model = make_simgr(history=history, full_catalog_weight=0.5, in_batch_weight=0.5)
    packed, padded = (_loss(model, batch)[1] for batch in (PACKED, ONE_A_ROW))
    for name in ("full_catalog_loss", "in_batch_loss"):
        np.testing.assert_allclose(packed[name], padded[name], rtol=1e-5)


def test_padding_is_nobodys_target_history_or_negative(make_simgr):
    model = make_simgr(in_batch_weight=1.0)
    padding = PACKED.segment_ids == 0
    assert padding.any()
    other = PACKED._replace(items=np.where(padding, 9, PACKED.items), targets=np.where(padding, 11, PACKED.targets))
    assert loss_of(model, other) == loss_of(model, PACKED)


def test_a_batch_of_padding_alone_has_no_loss(make_simgr):
    model = make_simgr(in_batch_weight=1.0)
    assert loss_of(model, jax.tree.map(np.zeros_like, PACKED)) == 0


def test_the_loss_is_the_weighted_sum_of_its_parts(make_simgr):
    full = loss_of(make_simgr(), PACKED)
    in_batch = loss_of(make_simgr(full_catalog_weight=0.0, in_batch_weight=1.0), PACKED)
    both = loss_of(make_simgr(full_catalog_weight=0.7, in_batch_weight=0.3), PACKED)
    np.testing.assert_allclose(both, 0.7 * full + 0.3 * in_batch, rtol=1e-5)
    assert abs(full - in_batch) > 0.1


def test_loss_options_reach_the_loss(make_simgr):
    in_batch = {"full_catalog_weight": 0.0, "in_batch_weight": 1.0}
    corrected, plain = (loss_of(make_simgr(log_q=log_q, **in_batch), PACKED) for log_q in (True, False))
    assert abs(corrected - plain) > 1e-3
    # By hand from the model's own states and vectors:
    smooth = make_simgr(label_smoothing=0.3, similarity="dot", temperature=0.5)
    log_p = jax.nn.log_softmax(_states(smooth) @ _catalog(smooth).T / 0.5)
    at_target = jnp.take_along_axis(log_p, PACKED.targets[..., None], axis=-1)[..., 0]
    losses = -(0.7 * at_target + 0.3 * log_p.mean(axis=-1))
    np.testing.assert_allclose(loss_of(smooth, PACKED), losses[PACKED.segment_ids > 0].mean(), rtol=1e-5)


def float_arrays_of_the_whole_catalog(model):
    """The shapes [..., N, ...] among all intermediate results of the loss and its gradient."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params):
        return nnx.merge(graphdef, params, rest).loss(PACKED, nnx.Rngs(dropout=0))[0]

    jaxpr = jax.make_jaxpr(jax.grad(loss))(params)
    arrays = {variable.aval for variable in _outputs(jaxpr.jaxpr) if jnp.issubdtype(variable.aval.dtype, jnp.floating)}
    return {array.shape for array in arrays if array.ndim > 1 and model.num_items in array.shape}


def _outputs(jaxpr):
    for equation in jaxpr.eqns:
        yield from equation.outvars
        for inner in jax.core.jaxprs_in_params(equation.params):
            yield from _outputs(inner)


@pytest.mark.parametrize("history", HISTORIES)
def test_the_in_batch_loss_never_encodes_the_whole_catalog(make_simgr, history):
    changes = {"history": history, "item_encoder": "mean_mlp"}
    assert not float_arrays_of_the_whole_catalog(make_simgr(**changes, full_catalog_weight=0.0, in_batch_weight=1.0))
    assert float_arrays_of_the_whole_catalog(make_simgr(**changes))


def test_items_encoded_alone_or_with_the_catalog_give_the_same_states(make_simgr):
    model = make_simgr(item_encoder="mlp")
    with_catalog = model.user_states(PACKED.items, PACKED.segment_ids, PACKED.positions, _catalog(model))
    np.testing.assert_allclose(_states(model), with_catalog, rtol=1e-5, atol=1e-6)


@partial(jax.jit, static_argnums=3)
def _rank(model, batch, catalog, filter_history):
    return model.rank(batch, catalog, 37, filter_history)


def ranking_of(model, histories, targets, filter_history=False, catalog=None):
    """The ranking of at most 12 histories: one shape, compiled once."""
    fill = 12 - len(histories)
    lengths = np.array([len(history) for history in histories] + [1] * fill)
    items = np.zeros((12, 6), np.int32)
    for row, history in zip(items, histories, strict=False):
        row[: len(history)] = history
    batch = RankBatch(items, lengths, np.array(targets + [0] * fill))
    ranking = _rank(model, batch, _catalog(model) if catalog is None else catalog, filter_history)
    return jax.tree.map(lambda x: np.asarray(x)[: len(histories)], ranking)


@pytest.mark.parametrize(("history", "pooling"), product(HISTORIES, POOLINGS))
def test_a_history_is_ranked_by_the_state_it_trained(make_simgr, history, pooling):
    """Train/serve consistency: the state after position t of a packed row is the state of the history 0..t."""
    model = make_simgr(history=history, user_pooling=pooling)
    unit = lambda x: np.asarray(x / jnp.linalg.norm(x, axis=-1, keepdims=True))  # noqa: E731
    expected = unit(_states(model)) @ unit(_catalog(model)).T
    prefixes, trained = [], []
    for row, t in zip(*np.nonzero(PACKED.segment_ids), strict=True):
        first = t - PACKED.positions[row, t]
        prefixes.append(PACKED.items[row, first : t + 1])
        trained.append(expected[row, t])
    ranking = ranking_of(model, prefixes, [0] * len(prefixes))
    by_item = np.take_along_axis(ranking.scores, np.argsort(ranking.items, axis=1), axis=1)
    np.testing.assert_allclose(by_item, trained, rtol=1e-4, atol=1e-5)


def test_items_with_one_code_tie_and_share_their_mean_rank(make_simgr, codes):
    codes = codes.copy()
    codes[[17, 36]] = codes[3]
    model = make_simgr(codes=codes)
    assert model.has_collisions
    ranking = ranking_of(model, [[5, 1]] * 4, [3, 17, 36, 8])
    place = {int(item): place for place, item in enumerate(ranking.items[0], start=1)}
    assert [place[item] - place[3] for item in (17, 36)] == [1, 2]
    assert len({float(ranking.scores[0, place[item] - 1]) for item in (3, 17, 36)}) == 1
    np.testing.assert_array_equal(ranking.target_rank, [place[17]] * 3 + [place[8]])


def test_equal_vectors_tie_also_where_their_products_round_differently(make_simgr, codes):
    """Columns of a matrix product may be summed in different orders; noise stands for the rounding here."""
    codes = codes.copy()
    codes[[17, 36]] = codes[3]
    model = make_simgr(codes=codes)
    catalog = _catalog(model) * (1 + 1e-6 * np.arange(37)[:, None] * np.arange(8))
    ranking = ranking_of(model, [[5, 1]], [17], catalog=catalog)
    scores = ranking.scores[0][np.argsort(ranking.items[0])]
    assert scores[3] == scores[17] == scores[36]
    assert ranking.target_rank[0] == 2 + (scores > scores[3]).sum()


def test_filtered_history_is_not_recommended(make_simgr):
    model = make_simgr()
    histories = [[5, 1, 5], [7]]
    free = ranking_of(model, histories, [2, 2])
    filtered = ranking_of(model, histories, [2, 2], filter_history=True)
    for row, history in enumerate(histories):
        kept = [item for item in free.items[row] if item not in history]
        np.testing.assert_array_equal(filtered.items[row, : len(kept)], kept)
        assert filtered.target_rank[row] == kept.index(2) + 1
    # Item 0 fills the rows up, yet is no part of these histories.
    assert all(0 in row[:35] for row in filtered.items)


def gradients_of(model):
    # As many positions for the backbone with either history, so that it is compiled once.
    batch = train_batch(ROWS, 8 if model.config.history == "tokens" else 24)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    return jax.grad(lambda params: nnx.merge(graphdef, params, rest).loss(batch, nnx.Rngs(dropout=0))[0])(params)


def test_a_learned_temperature_gets_a_gradient_and_keeps_its_bounds(make_simgr):
    model = make_simgr(learn_temperature=True, temperature=0.2)
    step = 1e-2
    model.log_temperature[...] = jnp.log(0.2) + step
    above = loss_of(model, PACKED)
    model.log_temperature[...] = jnp.log(0.2) - step
    below = loss_of(model, PACKED)
    model.log_temperature[...] = jnp.log(jnp.float32(0.2))
    gradient = float(gradients_of(model)["log_temperature"][...])
    np.testing.assert_allclose(gradient, (above - below) / (2 * step), rtol=1e-2)
    assert abs(gradient) > 1e-3

    for value, bound in [(1e-3, 0.05), (7.0, 1.0)]:
        model.log_temperature[...] = jnp.log(value)
        np.testing.assert_allclose(model.temperature, bound, rtol=1e-6)
        # A temperature past its bound can still be pulled back.
        assert float(gradients_of(model)["log_temperature"][...]) != 0


def test_a_fixed_temperature_is_no_parameter(make_simgr):
    model = make_simgr(learn_temperature=False, temperature=0.2)
    assert "log_temperature" not in nnx.state(model, nnx.Param)
    np.testing.assert_allclose(model.temperature, 0.2, rtol=1e-6)


@pytest.mark.parametrize(("history", "pooling", "encoder"), product(HISTORIES, POOLINGS, ITEM_ENCODERS))
def test_every_parameter_learns(make_simgr, history, pooling, encoder):
    """Not jitted: the 36 models share nearly all of their operations, which are compiled one by one and kept."""
    model = make_simgr(history=history, user_pooling=pooling, item_encoder=encoder, learn_temperature=True)
    if encoder == "mean_mlp":
        # It begins as the mean, with an output of zeros that lets no gradient through.
        kernel = model.item_encoder.mlp.output.kernel
        kernel[...] = jnp.full_like(kernel[...], 0.1)
    for path, gradient in nnx.to_flat_state(gradients_of(model)):
        assert np.isfinite(gradient[...]).all(), path
        assert np.abs(gradient[...]).max() > 0, path


def test_both_losses_and_histories_use_one_table(make_simgr):
    """The catalog and the backbone's input read the same embeddings."""
    for history in HISTORIES:
        model = make_simgr(history=history)
        tables = [path for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)) if leaf.shape[0] == 12]
        assert ("embedding",) in tables
        assert all(path[0] in ("embedding", "backbone") for path in tables)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"history": "text"}, "model.history"),
        ({"similarity": "euclid"}, "model.similarity"),
        ({"temperature": 2.0}, "model.temperature"),
        ({"temperature_min": 0.0}, "model.temperature"),
        ({"full_catalog_weight": 0.0}, "loss.full_catalog_weight"),
        ({"in_batch_weight": -1.0}, "loss.full_catalog_weight"),
        ({"label_smoothing": 1.0}, "loss.label_smoothing"),
        ({"item_encoder": "rnn"}, "model.item_encoder"),
        ({"user_pooling": "max"}, "model.user_pooling"),
    ],
)
def test_an_impossible_head_names_its_key(make_simgr, change, key):
    with pytest.raises(UserError, match=rf"^config\.{key}"):
        make_simgr(**change)
