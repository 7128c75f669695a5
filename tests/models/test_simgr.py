from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from simgr_jax.errors import UserError
from simgr_jax.inputs.batch import RankBatch, TrainBatch
from simgr_jax.models.item_encoders import ITEM_ENCODERS
from simgr_jax.models.simgr import HISTORIES, SAMPLED_FROM, Options
from simgr_jax.models.user_pooling import POOLINGS

LENGTHS = (4, 2, 5, 1)
USERS = [np.random.default_rng(10 + length).integers(0, 37, length + 1) for length in LENGTHS]


def pieces(model, items):
    """[len(items), P] what the model reads of each item."""
    return np.asarray(model.tokens[...])[items] if model.options.history == "tokens" else np.array(items)[:, None]


def train_batch(model, rows, num_items=8):
    """Each row is a list of users (item sequences), whose histories are packed one after the other."""
    size = pieces(model, [0]).shape[1]
    inputs, segment_ids, positions = np.zeros((3, len(rows), num_items * size), np.int32)
    readouts, last_items, targets, valid = np.zeros((4, len(rows), num_items), np.int32)
    for row, users in enumerate(rows):
        begin = 0
        for segment, user in enumerate(users, start=1):
            end = begin + len(user) - 1
            place = slice(begin * size, end * size)
            inputs[row, place] = pieces(model, user[:-1]).reshape(-1)
            segment_ids[row, place], positions[row, place] = segment, np.arange((end - begin) * size)
            readouts[row, begin:end] = size * np.arange(begin + 1, end + 1) - 1
            last_items[row, begin:end], targets[row, begin:end], valid[row, begin:end] = user[:-1], user[1:], 1
            begin = end
    return TrainBatch(inputs, segment_ids, positions, readouts, last_items, targets, valid.astype(bool))


ROWS = [[USERS[0], USERS[1]], [USERS[2], USERS[3]]]


def packed(model):
    return train_batch(model, ROWS)


def one_per_row(model):
    return train_batch(model, [[user] for user in USERS])


@jax.jit
def _loss(model, batch):
    return model.loss(batch, nnx.Rngs(dropout=0, negatives=0))


_catalog = jax.jit(lambda model: model.catalog())


@jax.jit
def _user_states(model, batch, item_vectors):
    return model.user_states(batch.inputs, batch.segment_ids, batch.positions, item_vectors)


def states_of(model, batch, item_vectors=None):
    """[M, D], the states at all readouts."""
    rows = np.nonzero(batch.valid)[0]
    return np.asarray(_user_states(model, batch, item_vectors))[rows, batch.readouts[batch.valid]]


def loss_of(model, batch):
    return float(_loss(model, batch)[0])


@pytest.mark.parametrize("history", HISTORIES)
def test_a_packed_batch_has_the_loss_of_its_users_one_by_one(make_simgr, history):
    model = make_simgr(history=history, user_pooling="mean")
    alone = [loss_of(model, train_batch(model, [[user]], 5)) for user in USERS]
    np.testing.assert_allclose(loss_of(model, packed(model)), np.average(alone, weights=LENGTHS), rtol=1e-5)


@pytest.mark.parametrize("history", HISTORIES)
def test_packing_does_not_change_the_losses(make_simgr, history):
    model = make_simgr(history=history, full_catalog_weight=0.5, in_batch_weight=0.5)
    dense, padded = (_loss(model, batch)[1] for batch in (packed(model), one_per_row(model)))
    for name in ("full_catalog_loss", "in_batch_loss"):
        np.testing.assert_allclose(dense[name], padded[name], rtol=1e-5)


def test_padding_is_never_a_target_a_history_or_a_negative(make_simgr):
    model = make_simgr(in_batch_weight=1.0)
    batch = packed(model)
    padding, no_readout = batch.segment_ids == 0, ~batch.valid
    assert padding.any()
    other = batch._replace(
        inputs=np.where(padding, 9, batch.inputs),
        targets=np.where(no_readout, 11, batch.targets),
        readouts=np.where(no_readout, 2, batch.readouts),
    )
    assert loss_of(model, other) == loss_of(model, batch)


def test_a_batch_without_a_target_has_a_loss_of_zero(make_simgr):
    model = make_simgr(in_batch_weight=1.0)
    assert loss_of(model, jax.tree.map(np.zeros_like, packed(model))) == 0


def test_the_loss_is_the_weighted_sum_of_its_parts(make_simgr):
    weights = (
        {},
        {"full_catalog_weight": 0.0, "in_batch_weight": 1.0},
        {"full_catalog_weight": 0.0, "sampled_weight": 1.0},
        {"full_catalog_weight": 0.7, "in_batch_weight": 0.3, "sampled_weight": 0.2},
    )
    models = (make_simgr(**changes) for changes in weights)
    full, in_batch, sampled, all_of_them = (loss_of(model, packed(model)) for model in models)
    np.testing.assert_allclose(all_of_them, 0.7 * full + 0.3 * in_batch + 0.2 * sampled, rtol=1e-5)
    assert min(abs(full - in_batch), abs(full - sampled), abs(sampled - in_batch)) > 0.02


@pytest.mark.parametrize("sampled_from", SAMPLED_FROM)
def test_with_many_negatives_the_sampled_loss_is_the_full_catalog_loss(make_simgr, sampled_from):
    options = {"similarity": "dot", "label_smoothing": 0.1, "sampled_negatives": 100_000, "sampled_from": sampled_from}
    model = make_simgr(**options, full_catalog_weight=0.0, sampled_weight=1.0)
    np.testing.assert_allclose(loss_of(model, packed(model)), loss_of(make_simgr(**options), packed(model)), rtol=2e-3)


def test_loss_options_reach_the_loss(make_simgr):
    in_batch = {"full_catalog_weight": 0.0, "in_batch_weight": 1.0}
    batch = packed(make_simgr())
    corrected, plain = (loss_of(make_simgr(log_q=log_q, **in_batch), batch) for log_q in (True, False))
    assert abs(corrected - plain) > 1e-3
    # By hand from the model's own states and vectors:
    smooth = make_simgr(label_smoothing=0.3, similarity="dot", temperature=0.5)
    log_p = jax.nn.log_softmax(states_of(smooth, batch) @ _catalog(smooth).T / 0.5)
    at_target = log_p[np.arange(len(log_p)), batch.targets[batch.valid]]
    losses = -(0.7 * at_target + 0.3 * log_p.mean(axis=-1))
    np.testing.assert_allclose(loss_of(smooth, batch), losses.mean(), rtol=1e-5)


def float_arrays_of_the_whole_catalog(model):
    """The shapes with an axis of all N items, among the intermediate results of the loss and its gradient."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    batch = packed(model)

    def loss(params):
        return nnx.merge(graphdef, params, rest).loss(batch, nnx.Rngs(dropout=0, negatives=0))[0]

    jaxpr = jax.make_jaxpr(jax.grad(loss))(params)
    arrays = {variable.aval for variable in _outputs(jaxpr.jaxpr) if jnp.issubdtype(variable.aval.dtype, jnp.floating)}
    return {array.shape for array in arrays if array.ndim > 1 and model.num_items in array.shape}


def _outputs(jaxpr):
    for equation in jaxpr.eqns:
        yield from equation.outvars
        for inner in jax.core.jaxprs_in_params(equation.params):
            yield from _outputs(inner)


@pytest.mark.parametrize("history", HISTORIES)
def test_the_in_batch_and_sampled_losses_never_encode_the_whole_catalog(make_simgr, history):
    changes = {"history": history, "item_encoder": "mean_mlp", "sampled_from": "popularity"}
    weights = {"full_catalog_weight": 0.0, "in_batch_weight": 1.0, "sampled_weight": 1.0}
    assert not float_arrays_of_the_whole_catalog(make_simgr(**changes, **weights))
    assert float_arrays_of_the_whole_catalog(make_simgr(**changes))


def test_items_encoded_alone_or_with_the_catalog_give_the_same_states(make_simgr):
    model = make_simgr(item_encoder="mlp")
    batch = packed(model)
    np.testing.assert_allclose(states_of(model, batch), states_of(model, batch, _catalog(model)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_history_of_tokens_has_one_position_per_level(make_simgr, pooling):
    """The state after an item is the one after the last of its L tokens."""
    model = make_simgr(history="tokens", user_pooling=pooling)
    by_item = packed(make_simgr(history="item"))
    embeddings = model.embedding[...][model.tokens[...][by_item.inputs].reshape(2, 8 * 3)]
    segment_ids = np.repeat(by_item.segment_ids, 3, axis=1)
    positions = (by_item.positions[:, :, None] * 3 + np.arange(3)).reshape(2, 8 * 3)
    hidden = model.backbone(embeddings, segment_ids, positions)
    states = np.asarray(model.user_pooling(hidden, segment_ids))[:, 2::3]
    np.testing.assert_allclose(states_of(model, packed(model)), states[by_item.segment_ids > 0], rtol=1e-5, atol=1e-6)


def test_text_is_read_from_the_llms_table(make_simgr):
    """It reads as if both tables were one, with the semantic-ID tokens first. Both tables learn."""
    table = np.random.default_rng(4).normal(size=(11, 8)).astype(np.float32)
    model = make_simgr(history="tokens", text_embedding=nnx.Param(jnp.asarray(table)))
    bare = packed(model)
    inputs = np.where(np.arange(24) % 3 == 1, 12 + (bare.inputs - 4) * 5 % 11, bare.inputs)
    batch = bare._replace(inputs=inputs)
    one_table = make_simgr(history="tokens")
    one_table.embedding = nnx.Param(jnp.concatenate([model.embedding[...], table]))
    np.testing.assert_array_equal(states_of(model, batch), states_of(one_table, batch))

    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    gradients = jax.grad(lambda params: nnx.merge(graphdef, params, rest).loss(batch, nnx.Rngs(dropout=0))[0])(params)
    read = np.isin(np.arange(11), inputs[(bare.segment_ids > 0) & (inputs >= 12)] - 12)
    learns = np.abs(gradients["text_embedding"][...]).max(axis=1) > 0
    np.testing.assert_array_equal(learns, read)
    assert np.abs(gradients["embedding"][...]).max() > 0


@partial(jax.jit, static_argnums=3)
def _rank(model, batch, catalog, filter_history):
    return model.rank(batch, catalog, 37, filter_history)


def batch_of(model, histories, targets):
    """A batch of 12 rows, whatever the number of histories, so that only one shape is compiled."""
    fill = 12 - len(histories)
    size = pieces(model, [0]).shape[1]
    lengths = np.array([len(history) * size for history in histories] + [1] * fill)
    inputs, seen = np.zeros((12, 6 * size), np.int32), np.full((12, 6), -1)
    for row, history in enumerate(histories):
        inputs[row, : lengths[row]] = pieces(model, history).reshape(-1)
        seen[row, : len(history)] = history
    return RankBatch(inputs, lengths, seen, np.array(targets + [0] * fill))


def ranking_of(model, histories, targets, filter_history=False, catalog=None):
    batch = batch_of(model, histories, targets)
    ranking = _rank(model, batch, _catalog(model) if catalog is None else catalog, filter_history)
    return jax.tree.map(lambda x: np.asarray(x)[: len(histories)], ranking)


@pytest.mark.parametrize(("history", "pooling"), product(HISTORIES, POOLINGS))
def test_a_history_is_ranked_by_the_state_that_was_trained(make_simgr, history, pooling):
    """The state after an item of a packed row equals the state of the history up to that item."""
    model = make_simgr(history=history, user_pooling=pooling)
    unit = lambda x: np.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True))  # noqa: E731
    trained = unit(states_of(model, packed(model))) @ unit(_catalog(model)).T
    prefixes = [user[:end] for users in ROWS for user in users for end in range(1, len(user))]
    ranking = ranking_of(model, prefixes, [0] * len(prefixes))
    by_item = np.take_along_axis(ranking.scores, np.argsort(ranking.items, axis=1), axis=1)
    np.testing.assert_allclose(by_item, trained, rtol=1e-4, atol=1e-5)


def test_items_with_the_same_codes_tie_and_share_their_mean_rank(make_simgr, codes):
    codes = codes.copy()
    codes[[17, 36]] = codes[3]
    model = make_simgr(codes=codes)
    assert model.has_collisions
    ranking = ranking_of(model, [[5, 1]] * 4, [3, 17, 36, 8])
    place = {int(item): place for place, item in enumerate(ranking.items[0], start=1)}
    assert [place[item] - place[3] for item in (17, 36)] == [1, 2]
    assert len({float(ranking.scores[0, place[item] - 1]) for item in (3, 17, 36)}) == 1
    np.testing.assert_array_equal(ranking.target_rank, [place[17]] * 3 + [place[8]])


def test_items_with_the_same_codes_tie_even_if_their_scores_round_differently(make_simgr, codes):
    """A matrix product may sum its columns in different orders. Noise stands in for the rounding here."""
    codes = codes.copy()
    codes[[17, 36]] = codes[3]
    model = make_simgr(codes=codes)
    catalog = _catalog(model) * (1 + 1e-6 * np.arange(37)[:, None] * np.arange(8))
    ranking = ranking_of(model, [[5, 1]], [17], catalog=catalog)
    scores = ranking.scores[0][np.argsort(ranking.items[0])]
    assert scores[3] == scores[17] == scores[36]
    assert ranking.target_rank[0] == 2 + (scores > scores[3]).sum()
    exact = jax.jit(lambda model, *rest: model.log_probabilities(*rest))(
        model, batch_of(model, [[5, 1]], [17]), catalog
    )
    assert exact[0, 3] == exact[0, 17] == exact[0, 36]
    np.testing.assert_allclose(np.exp(exact[0]).sum(), 1, rtol=1e-5)


def test_filtered_history_is_not_recommended(make_simgr):
    model = make_simgr()
    histories = [[5, 1, 5], [7]]
    free = ranking_of(model, histories, [2, 2])
    filtered = ranking_of(model, histories, [2, 2], filter_history=True)
    for row, history in enumerate(histories):
        kept = [item for item in free.items[row] if item not in history]
        np.testing.assert_array_equal(filtered.items[row, : len(kept)], kept)
        assert filtered.target_rank[row] == kept.index(2) + 1
    # The inputs are padded with item 0, which is in neither history.
    assert all(0 in row[:35] for row in filtered.items)


def gradients_of(model):
    # Both kinds of history have as many positions, so that the backbone is compiled once.
    batch = train_batch(model, ROWS, 8 if model.options.history == "tokens" else 24)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    return jax.grad(lambda params: nnx.merge(graphdef, params, rest).loss(batch, nnx.Rngs(dropout=0))[0])(params)


def test_a_learned_temperature_gets_the_gradient_of_the_loss(make_simgr):
    model = make_simgr(learn_temperature=True, temperature=0.2)
    step = 1e-2
    model.log_temperature[...] = jnp.log(0.2) + step
    above = loss_of(model, packed(model))
    model.log_temperature[...] = jnp.log(0.2) - step
    below = loss_of(model, packed(model))
    model.log_temperature[...] = jnp.log(jnp.float32(0.2))
    gradient = float(gradients_of(model)["log_temperature"][...])
    np.testing.assert_allclose(gradient, (above - below) / (2 * step), rtol=1e-2)
    assert abs(gradient) > 1e-3


@pytest.mark.parametrize(("value", "bound"), [(1e-3, 0.05), (7.0, 1.0)])
def test_a_learned_temperature_keeps_its_bounds_and_can_return_from_beyond_them(make_simgr, value, bound):
    model = make_simgr(learn_temperature=True, temperature=0.2)
    model.log_temperature[...] = jnp.log(value)
    np.testing.assert_allclose(model.temperature, bound, rtol=1e-6)

    def gradient(sign):
        """The gradient of the loss, or of its negative."""
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        loss = lambda params: sign * _loss(nnx.merge(graphdef, params, rest), packed(model))[0]  # noqa: E731
        return float(jax.grad(loss)(params)["log_temperature"][...])

    # Gradient descent moves against the gradient. Whichever of the two losses would lead back does so; the other stops.
    back, outward = sorted((gradient(1), gradient(-1)), key=abs, reverse=True)
    assert outward == 0
    assert np.sign(-back) == np.sign(bound - value)


def test_a_fixed_temperature_is_not_a_parameter(make_simgr):
    model = make_simgr(learn_temperature=False, temperature=0.2)
    assert "log_temperature" not in nnx.state(model, nnx.Param)
    np.testing.assert_allclose(model.temperature, 0.2, rtol=1e-6)


@pytest.mark.parametrize(
    ("history", "pooling", "encoder"),
    [
        # Every choice is in a quick test; all combinations are in quick or slow ones.
        pytest.param(*choice, marks=() if choice[1] == "last" or choice[2] == "mean" else pytest.mark.slow)
        for choice in product(HISTORIES, POOLINGS, ITEM_ENCODERS)
    ],
)
def test_every_parameter_learns(make_simgr, history, pooling, encoder):
    """Without jit, because the 36 models share nearly all operations, and JAX compiles each operation only once."""
    model = make_simgr(history=history, user_pooling=pooling, item_encoder=encoder, learn_temperature=True)
    if encoder == "mean_mlp":
        # It begins as the mean, with an output of zeros that lets no gradient through.
        kernel = model.item_encoder.mlp.output.kernel
        kernel[...] = jnp.full_like(kernel[...], 0.1)
    for path, gradient in nnx.to_flat_state(gradients_of(model)):
        assert np.isfinite(gradient[...]).all(), path
        assert np.abs(gradient[...]).max() > 0, path


def test_the_catalog_and_the_backbone_read_the_same_table(make_simgr):
    for history in HISTORIES:
        model = make_simgr(history=history)
        tables = [path for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)) if leaf.shape[0] == 12]
        assert ("embedding",) in tables
        assert all(path[0] in ("embedding", "backbone") for path in tables)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"history": "text"}, "history"),
        ({"similarity": "euclid"}, "similarity"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": 2.0, "learn_temperature": True}, "temperature"),
        ({"temperature_min": 0.0, "learn_temperature": True}, "temperature_min"),
        ({"full_catalog_weight": 0.0}, "full_catalog_weight"),
        ({"full_catalog_weight": -1.0, "in_batch_weight": 1.0}, "full_catalog_weight"),
        ({"in_batch_weight": -1.0}, "in_batch_weight"),
        ({"sampled_weight": -1.0}, "sampled_weight"),
        ({"sampled_negatives": 0}, "sampled_negatives"),
        ({"sampled_from": "batch"}, "sampled_from"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"label_smoothing": 0.1, "repeat_bias": True}, "label_smoothing"),
        ({"item_text_dropout": 1.0}, "item_text_dropout"),
        ({"catalog_chunk": -2}, "catalog_chunk"),
        ({"item_encoder": "rnn"}, "item_encoder"),
        ({"item_encoder_width": 0}, "item_encoder_width"),
        ({"user_pooling": "max"}, "user_pooling"),
    ],
)
def test_an_impossible_option_is_named_by_its_key(make_simgr, change, key):
    with pytest.raises(UserError, match=rf"^config\.simgr\.{key}: can't be .*; "):
        make_simgr(**change)


def test_options_that_have_no_effect_name_the_setting_that_gives_them_one():
    options = Options(item_encoder="mean", full_catalog_weight=0.0, sampled_weight=1.0)
    assert options.unread() == {
        "item_encoder_width": "item_encoder=mean_mlp",
        "item_text_dtype": "item_text=read",
        "item_text_dropout": "item_text=read",
        "item_text_tokens": "item_text=trained",
        "temperature_min": "learn_temperature=True",
        "temperature_max": "learn_temperature=True",
        "log_q": "in_batch_weight above 0",
        "catalog_chunk": "full_catalog_weight above 0",
        "popularity_prior": "full_catalog_weight above 0",
        "repeat_bias": "full_catalog_weight above 0",
    }
