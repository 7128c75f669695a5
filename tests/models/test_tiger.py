import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from simgr_jax.data.dataset import Sequences
from simgr_jax.errors import UserError
from simgr_jax.inputs.batch import RankBatch, TrainBatch
from simgr_jax.models import speller
from simgr_jax.models.tiger import ENCODERS, Options
from simgr_jax.semantic_ids.codes import SemanticIds
from tests.training import tiny_run

SIZES = (4, 3, 5)
LEVELS, NUM_ITEMS = 3, 23
SHAPE = {"width": 8, "layers": 1, "heads": 2, "kv_heads": 1, "head_width": 4, "mlp_width": 12, "dropout": 0.0}
USERS = [np.random.default_rng(length).integers(0, NUM_ITEMS, length) for length in (5, 3, 6, 2)]
MAX_ITEMS = 8


def semantic_ids():
    """23 items on 20 distinct IDs."""
    every = np.stack(np.unravel_index(np.arange(np.prod(SIZES)), SIZES), axis=1)
    codes = np.random.default_rng(0).permutation(every)[:NUM_ITEMS]
    codes[[9, 20]], codes[15] = codes[2], codes[14]
    return SemanticIds(codes.astype(np.int32), SIZES)


IDS = semantic_ids()


def run_config(encoder, **changes):
    """changes: of `config.backbone`."""
    config = tiny_run.config("tiger")
    config.tiger.update({"encoder": encoder, "decoder_layers": 2, "beam_width": NUM_ITEMS})
    config.backbone.update(SHAPE | changes)
    return config


@functools.cache
def make_model(encoder, **changes):
    """Shared by all tests. A test that changes the model clones it first."""
    model = tiny_run.make_model(run_config(encoder, **changes), IDS, Sequences.from_lists([]))
    # Kernels are larger than at the start of training, so that attention matters.
    state = nnx.state(model, nnx.Param)
    grown = jax.tree_util.tree_map_with_path(lambda path, x: x * 15 if "kernel" in str(path) else x, state)
    nnx.update(model, grown)
    return model


@pytest.fixture(scope="module", params=ENCODERS)
def model(request):
    return make_model(request.param)


@pytest.fixture(scope="module")
def causal():
    """For tests in which the kind of encoder makes no difference."""
    return make_model("causal")


def train_batch(model, rows):
    """Each row is a list of users. A user's last item is the target; for the causal encoder, all but the first are."""
    inputs, segment_ids, positions = np.zeros((3, len(rows), MAX_ITEMS * LEVELS), np.int32)
    readouts, last_items, targets, valid = np.zeros((4, len(rows), MAX_ITEMS), np.int32)
    for row, users in enumerate(rows):
        begin = filled = 0
        for segment, user in enumerate(users, start=1):
            size = (len(user) - 1) * LEVELS
            place = slice(begin, begin + size)
            inputs[row, place] = IDS.tokens[user[:-1]].reshape(-1)
            segment_ids[row, place], positions[row, place] = segment, np.arange(size)
            first = 1 if model.encoder.config.causal else len(user) - 1
            of_row = slice(filled, filled + len(user) - first)
            readouts[row, of_row] = begin + LEVELS * np.arange(first, len(user)) - 1
            last_items[row, of_row], targets[row, of_row] = user[first - 1 : -1], user[first:]
            valid[row, of_row] = 1
            begin, filled = begin + size, of_row.stop
    return TrainBatch(inputs, segment_ids, positions, readouts, last_items, targets, valid.astype(bool))


def rank_batch(histories, targets=None):
    inputs, seen = np.zeros((len(histories), MAX_ITEMS * LEVELS), np.int32), np.full((len(histories), MAX_ITEMS), -1)
    lengths = np.array([len(history) * LEVELS for history in histories])
    for row, history in enumerate(histories):
        inputs[row, : lengths[row]], seen[row, : len(history)] = IDS.tokens[history].reshape(-1), history
    return RankBatch(inputs, lengths, seen, np.zeros(len(histories), int) if targets is None else np.array(targets))


@jax.jit
def _loss(model, batch):
    return model.loss(batch, nnx.Rngs(dropout=0))


def loss_of(model, rows):
    return float(_loss(model, train_batch(model, rows))[0])


@jax.jit
def log_likelihoods(model, batch):
    return model.item_log_likelihoods(batch, model.catalog())


@partial(jax.jit, static_argnames=("k", "filter_history"))
def rank(model, batch, k, filter_history=False):
    return model.rank(batch, model.catalog(), k, filter_history)


@partial(jax.jit, static_argnames="width")
def beam(model, batch, width):
    return model.beam(batch, model.catalog(), width)


def plain_log_likelihood(model, history, item):
    """The decoder in numpy, from the encoder's states of a single history."""
    tokens = IDS.tokens[history].reshape(1, -1)
    length, table = tokens.shape[1], np.asarray(model.embedding[...], np.float64)
    arange = jnp.arange(length)[None]
    states = np.asarray(model.encoder(model.embedding[...][tokens], jnp.ones_like(tokens), arange), np.float64)[0]
    layers = jax.tree.map(partial(np.asarray, dtype=np.float64), nnx.to_pure_dict(nnx.state(model.decoder.layers)))

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6) * scale

    def turned(x, positions):
        """Pairs (x[i], x[i + 2]) as complex numbers; heads of width 4."""
        angles = np.asarray(positions)[:, None, None] * 10_000.0 ** -np.array([0, 0.5])
        pairs = (x[..., :2] + 1j * x[..., 2:]) * np.exp(1j * angles)
        return np.concatenate([pairs.real, pairs.imag], axis=-1)

    def attend(weights, x, positions, seen, seen_positions):
        query = turned((x @ weights["q_proj"]["kernel"]).reshape(-1, 2, 4), positions)
        key = turned((seen @ weights["k_proj"]["kernel"]).reshape(-1, 1, 4), seen_positions)[:, 0]
        value = seen @ weights["v_proj"]["kernel"]
        scores = np.exp(np.einsum("qhd,td->hqt", query, key) / np.sqrt(4))
        if x is seen:
            scores = np.tril(scores)
        mixed = np.einsum("hqt,td->qhd", scores / scores.sum(axis=-1, keepdims=True), value)
        return mixed.reshape(len(x), 8) @ weights["o_proj"]["kernel"]

    target = IDS.tokens[item]
    x = np.concatenate([[np.asarray(model.start[...])], table[target[:-1]]])
    positions = length + np.arange(LEVELS)
    for layer in range(2):
        weights = jax.tree.map(lambda leaf, layer=layer: leaf[layer], layers)
        normed = norm(x, weights["pre_self_norm"]["scale"])
        x = x + attend(weights["self_attn"], normed, positions, normed, positions)
        normed = norm(x, weights["pre_cross_norm"]["scale"])
        x = x + attend(weights["cross_attn"], normed, positions, states, np.arange(length))
        normed = norm(x, weights["pre_mlp_norm"]["scale"])
        gate = normed @ weights["mlp"]["gate_proj"]["kernel"]
        inner = gate / (1 + np.exp(-gate)) * (normed @ weights["mlp"]["up_proj"]["kernel"])
        x = x + inner @ weights["mlp"]["down_proj"]["kernel"]
    logits = norm(x, np.asarray(model.decoder.final_norm.scale[...])) @ table.T
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return log_p[np.arange(LEVELS), target].sum()


def test_an_items_likelihood_is_that_of_a_plain_decoder(model):
    histories = [user[:-1] for user in USERS]
    found = log_likelihoods(model, rank_batch(histories))
    for row, item in [(0, 4), (1, 9), (2, 17), (3, 0), (3, 22)]:
        np.testing.assert_allclose(found[row, item], plain_log_likelihood(model, histories[row], item), rtol=1e-4)


def test_the_loss_is_that_of_every_prefix_read_alone(model):
    """Each readout sees what the model sees when it reads the prefix alone."""
    batch = train_batch(model, [USERS[:2], USERS[2:]])
    first = (lambda user: 1) if model.encoder.config.causal else (lambda user: len(user) - 1)
    cases = [(user[:end], user[end]) for user in USERS for end in range(first(user), len(user))]
    assert batch.valid.sum() == len(cases)
    prefixes, targets = zip(*cases, strict=True)
    alone = log_likelihoods(model, rank_batch(prefixes))[np.arange(len(cases)), np.array(targets)]
    loss, scalars = _loss(model, batch)
    np.testing.assert_allclose(loss, -alone.mean(), rtol=1e-5)
    np.testing.assert_allclose(scalars["token_loss"] * LEVELS, loss, rtol=1e-5)
    assert alone.std() > 0.1  # Otherwise mixed-up readouts would go unnoticed.


def test_packing_does_not_change_the_loss(model):
    packed = loss_of(model, [USERS[:2], USERS[2:]])
    np.testing.assert_allclose(packed, loss_of(model, [[user] for user in USERS]), rtol=1e-5)
    np.testing.assert_allclose(packed, loss_of(model, [USERS[1::-1], USERS[:1:-1]]), rtol=1e-5)


def test_padding_is_never_a_history_or_a_target(model):
    batch = train_batch(model, [USERS[:1], USERS[1:2]])
    padding = batch.segment_ids == 0
    other = batch._replace(
        inputs=np.where(padding, 9, batch.inputs),
        targets=np.where(batch.valid, batch.targets, 11),
        readouts=np.where(batch.valid, batch.readouts, 2),
    )
    assert _loss(model, other)[0] == _loss(model, batch)[0]
    histories = rank_batch([USERS[0], USERS[1]])
    beyond = np.arange(histories.inputs.shape[1]) >= histories.lengths[:, None]
    filled = histories._replace(inputs=np.where(beyond, 9, histories.inputs))
    np.testing.assert_array_equal(log_likelihoods(model, filled), log_likelihoods(model, histories))


def test_only_the_bidirectional_encoder_sees_what_comes_later():
    """The first item's states depend on later items with one encoder, and do not with the other."""
    batch = rank_batch([[4, 7, 1]])
    later = batch._replace(inputs=rank_batch([[4, 8, 2]]).inputs)
    for encoder in ENCODERS:
        model = make_model(encoder)
        kept, other = (model._read(each, None)[1].kept.keys[:, 0, :LEVELS] for each in (batch, later))
        assert (np.abs(kept - other).max() > 1e-3) == (encoder == "bidirectional")


def test_a_beam_as_wide_as_the_catalog_ranks_it_by_the_exact_likelihoods(model):
    """So beams read on correctly from their earlier codes. Items with equal codes tie."""
    batch = rank_batch(USERS, targets=[9, 3, 15, 22])
    exact = np.asarray(log_likelihoods(model, batch))
    ranking = rank(model, batch, NUM_ITEMS)
    by_item = np.take_along_axis(np.asarray(ranking.scores), np.argsort(ranking.items, axis=1), axis=1)
    np.testing.assert_allclose(by_item, exact, rtol=1e-4)
    assert (np.diff(ranking.scores, axis=1) <= 0).all()
    for row, target in enumerate(batch.targets):
        is_equal = (IDS.codes == IDS.codes[target]).all(axis=1)
        ahead = (exact[row] > exact[row, target]) & ~is_equal
        assert ranking.target_rank[row] == ahead.sum() + (is_equal.sum() + 1) / 2


def test_a_narrow_beam_finds_likely_items_and_gives_other_targets_no_rank(causal):
    exact = np.asarray(log_likelihoods(causal, rank_batch(USERS)))
    items, scores = map(np.asarray, beam(causal, rank_batch(USERS), 4))
    np.testing.assert_allclose(scores, np.take_along_axis(exact, items, axis=1), rtol=1e-4)
    narrow = nnx.clone(causal)
    narrow.beam_width = 4
    ranking = rank(narrow, rank_batch(USERS, targets=items[:, 3]), 2)
    np.testing.assert_array_equal(ranking.items, items[:, :2])
    assert (np.asarray(ranking.target_rank) > 2).all() and np.isfinite(ranking.target_rank).all()
    unlisted = [next(item for item in range(NUM_ITEMS) if item not in row) for row in items]
    assert np.isinf(rank(narrow, rank_batch(USERS, targets=unlisted), 2).target_rank).all()


def test_filtered_history_is_not_listed(causal):
    free = np.asarray(rank(causal, rank_batch(USERS), NUM_ITEMS).items)
    filtered = np.asarray(rank(causal, rank_batch(USERS), NUM_ITEMS, filter_history=True).items)
    for row, history in enumerate(USERS):
        kept = [item for item in free[row] if item not in history]
        np.testing.assert_array_equal(filtered[row], kept + [-1] * (NUM_ITEMS - len(kept)))


def test_probabilities_are_likelihoods_normalized_over_items(causal, monkeypatch):
    batch, catalog = rank_batch(USERS), causal.catalog()
    likelihoods = np.asarray(log_likelihoods(causal, batch), np.float64)
    # Chunks of three distinct items; the last chunk is not full.
    monkeypatch.setattr(speller, "_SCORING_FLOATS", len(USERS) * LEVELS * 48 * 3)
    log_p, log_mass = jax.jit(
        lambda model: (model.log_probabilities(batch, catalog), model.log_item_mass(batch, catalog))
    )(causal)
    expected = np.exp(likelihoods) / np.exp(likelihoods).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.exp(log_p), expected, rtol=1e-4)
    distinct = np.unique(IDS.codes, axis=0, return_index=True)[1]
    mass = np.exp(likelihoods[:, distinct]).sum(axis=1)
    assert len(distinct) < NUM_ITEMS and (mass < 1).all()
    np.testing.assert_allclose(np.exp(log_mass), mass, rtol=1e-4)


@pytest.mark.slow
def test_every_parameter_learns_and_remat_does_not_change_its_gradient():
    batch, gradients = train_batch(make_model("causal"), [USERS[:2], USERS[2:]]), []
    for remat in ("none", "full"):
        graphdef, params, rest = nnx.split(make_model("causal", remat=remat, dropout=0.3), nnx.Param, ...)
        loss = lambda params: nnx.merge(graphdef, params, rest).loss(batch, nnx.Rngs(dropout=0))[0]  # noqa: E731, B023
        gradients.append(nnx.to_flat_state(jax.jit(jax.grad(loss))(params)))
    for (path, gradient), (_, other) in zip(*gradients, strict=True):
        assert np.abs(gradient[...]).max() > 0, path
        np.testing.assert_allclose(gradient[...], other[...], rtol=1e-3, atol=1e-5, err_msg=str(path))


def test_bfloat16_changes_the_loss_only_a_little(causal):
    rows = [USERS[:2], USERS[2:]]
    model = make_model("causal", dtype="bfloat16")
    loss, _ = _loss(model, train_batch(model, rows))
    assert loss.dtype == jnp.float32 and loss != loss_of(causal, rows)
    np.testing.assert_allclose(loss, loss_of(causal, rows), rtol=0.05)


def test_label_smoothing_reaches_the_loss(causal):
    rows = [USERS[:2], USERS[2:]]
    smooth = nnx.clone(causal)
    smooth.label_smoothing = 0.2
    assert abs(loss_of(smooth, rows) - loss_of(causal, rows)) > 0.01


@pytest.mark.parametrize(
    ("key", "value"), [("encoder", "both"), ("decoder_layers", 0), ("beam_width", 0), ("label_smoothing", 1.0)]
)
def test_an_impossible_option_is_named_by_its_key(key, value):
    with pytest.raises(UserError, match=rf"^config\.tiger\.{key}: can't be {value!r}; "):
        Options(**{key: value})


def test_an_impossible_shape_is_named_by_its_key():
    config = run_config("causal", heads=0)
    with pytest.raises(UserError, match=r"^config\.backbone\.heads: "):
        tiny_run.make_model(config, IDS, Sequences.from_lists([]))


def test_a_bidirectional_encoder_reads_a_history_anew_for_each_target():
    assert Options(encoder="bidirectional").windows == "one_target"
    assert Options(encoder="causal").windows == "history"


@pytest.mark.parametrize("encoder", [pytest.param("bidirectional", marks=pytest.mark.slow), "causal"])
def test_learns_more_than_popularity(encoder, tmp_path):
    config = tiny_run.config("tiger", epochs=10, row_length=24, evaluate_every_epochs=10)
    config.tiger.encoder, config.tiger.decoder_layers = encoder, 1
    tiny_run.train(config, tmp_path)
    assert tiny_run.log(tmp_path)[-1]["validation/NDCG@10"] > 1.3 * tiny_run.popularity_ndcg()
