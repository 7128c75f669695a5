from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import log_softmax

from simgr_jax.errors import UserError
from simgr_jax.inputs.batch import RankBatch, TrainBatch
from simgr_jax.models.model_inputs import Backbone
from simgr_jax.models.rpg import RPG, Options
from simgr_jax.models.transformer import Transformer
from simgr_jax.models.transformer_config import from_scratch_config
from simgr_jax.semantic_ids.codes import SemanticIds
from tests.training import tiny_run

N, SIZES, WIDTH = 37, (4, 5, 3), 8
OFFSETS = np.array([0, 4, 9])
BACKBONE = from_scratch_config(width=WIDTH, layers=1, heads=2, kv_heads=1, head_width=4, mlp_width=12)
OPTIONS = {"temperature": 0.2, "graph_neighbors": 5, "beam_width": 4}
LENGTHS = (4, 2, 5, 1)
USERS = [np.random.default_rng(10 + length).integers(0, N, length + 1) for length in LENGTHS]


def untrained(codes, seed=0, **changes):
    """A model of 37 items, whose heads are the identity. changes: of the options."""
    rngs = nnx.Rngs(0)
    backbone = Backbone(Transformer(BACKBONE, rngs))
    return RPG(Options(**OPTIONS | changes), backbone, SemanticIds(codes, SIZES), rngs, seed)


@pytest.fixture(scope="module")
def make(codes):
    """A function (codes=..., **changes) -> `untrained` with random heads."""

    def make(codes=codes, **changes):
        model, generator = untrained(codes, **changes), np.random.default_rng(1)
        for parameter in (model.head_kernel, model.head_bias):
            parameter[...] = jnp.asarray(generator.normal(size=parameter.shape), jnp.float32)
        return model

    return make


def train_batch(rows, width=8):
    """Each row is a list of users (item sequences), packed one after the other."""
    inputs, segment_ids, positions = np.zeros((3, len(rows), width), np.int32)
    readouts, targets, valid = np.zeros((3, len(rows), width), np.int32)
    for row, users in enumerate(rows):
        begin = 0
        for segment, user in enumerate(users, start=1):
            place = slice(begin, begin + len(user) - 1)
            inputs[row, place], targets[row, place], valid[row, place] = user[:-1], user[1:], 1
            segment_ids[row, place], positions[row, place] = segment, np.arange(len(user) - 1)
            begin = place.stop
        readouts[row] = np.arange(width)
    return TrainBatch(inputs, segment_ids, positions, readouts, inputs, targets, valid.astype(bool))


PACKED = train_batch([[USERS[0], USERS[1]], [USERS[2], USERS[3]]])


def rank_batch(histories, targets):
    inputs, history = np.zeros((len(histories), 6), np.int32), np.full((len(histories), 6), -1, np.int32)
    for row, items in enumerate(histories):
        inputs[row, : len(items)] = history[row, : len(items)] = items
    return RankBatch(inputs, np.array([len(items) for items in histories]), history, np.array(targets))


HISTORIES = [[5, 1, 5], [7], [30, 2, 11, 4], [36, 36]]
BATCH = rank_batch(HISTORIES, [3, 17, 36, 8])


@jax.jit
def _loss(model, batch):
    return model.loss(batch, nnx.Rngs(dropout=0))[0]


_catalog = jax.jit(lambda model: model.catalog())
_log_probabilities = jax.jit(lambda model, batch, catalog: model.log_probabilities(batch, catalog))
_log_item_mass = jax.jit(lambda model, batch, catalog: model.log_item_mass(batch, catalog))


@partial(jax.jit, static_argnums=(3, 4))
def _rank(model, batch, catalog, k, filter_history):
    return model.rank(batch, catalog, k, filter_history)


def ranking_of(model, batch=BATCH, k=N, filter_history=False):
    return jax.tree.map(np.asarray, _rank(model, batch, _catalog(model), k, filter_history))


def code_log_probabilities(model, states):
    """In numpy, from states [M, D]: log p(code | state) of each level, [M, K_l]."""
    kernels, biases = np.asarray(model.head_kernel), np.asarray(model.head_bias)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    levels = []
    for level, embeddings in enumerate(np.split(np.asarray(model.embedding), OFFSETS[1:])):
        inner = states @ kernels[level] + biases[level]
        head = states + inner / (1 + np.exp(-inner))
        levels.append(log_softmax(unit(head) @ unit(embeddings).T / model.options.temperature, axis=-1))
    return levels


def states_of(model, inputs, segment_ids, positions):
    """[B, T, D], the states after reading the items' mean embeddings."""
    items = np.asarray(model.embedding)[np.asarray(model.codes) + OFFSETS].mean(axis=1)
    return np.asarray(model.backbone(jnp.asarray(items[inputs]), segment_ids, positions))


def levels_of_histories(model, histories=HISTORIES):
    """`code_log_probabilities` after each history, read alone."""
    states = [
        states_of(model, np.array([items]), np.ones((1, len(items)), int), np.arange(len(items))[None])[0, -1]
        for items in histories
    ]
    return code_log_probabilities(model, np.stack(states))


def sums(levels, codes):
    """Σ_l log p_l(code_l), [M, len(codes)]."""
    return np.sum([level[:, codes[:, index]] for index, level in enumerate(levels)], axis=0)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_loss_is_the_mean_cross_entropy_of_the_targets_codes(make, codes, smoothing):
    model = make(label_smoothing=smoothing)
    states = states_of(model, PACKED.inputs, PACKED.segment_ids, PACKED.positions)[PACKED.valid]
    rows, targets = np.arange(len(states)), codes[PACKED.targets[PACKED.valid]]
    losses = [
        -(1 - smoothing) * log_p[rows, targets[:, level]] - smoothing * log_p.mean(axis=1)
        for level, log_p in enumerate(code_log_probabilities(model, states))
    ]
    np.testing.assert_allclose(_loss(model, PACKED), np.mean(losses), rtol=1e-5)


def test_a_packed_batch_has_the_loss_of_its_users_one_by_one(make):
    model = make()
    alone = [float(_loss(model, train_batch([[user]]))) for user in USERS]
    np.testing.assert_allclose(_loss(model, PACKED), np.average(alone, weights=LENGTHS), rtol=1e-5)


def test_padding_is_never_a_history_or_a_target(make):
    model = make()
    padding = PACKED.segment_ids == 0
    assert padding.any()
    other = PACKED._replace(
        inputs=np.where(padding, 9, PACKED.inputs), targets=np.where(PACKED.valid, PACKED.targets, 11)
    )
    assert _loss(model, other) == _loss(model, PACKED)
    assert _loss(model, jax.tree.map(np.zeros_like, PACKED)) == 0


def test_every_parameter_learns_from_its_initial_value(codes):
    graphdef, params, rest = nnx.split(untrained(codes), nnx.Param, ...)
    gradients = jax.jit(jax.grad(lambda params: _loss(nnx.merge(graphdef, params, rest), PACKED)))(params)
    for path, gradient in nnx.to_flat_state(gradients):
        assert np.isfinite(gradient[...]).all(), path
        assert np.abs(gradient[...]).max() > 0, path


def test_an_items_score_is_the_sum_over_its_codes(make, codes):
    model = make()
    expected = sums(levels_of_histories(model), codes)
    ranking = ranking_of(model)
    by_item = np.take_along_axis(ranking.scores, np.argsort(ranking.items, axis=1), axis=1)
    np.testing.assert_allclose(by_item, expected, rtol=1e-4)
    places = np.argsort(-expected, axis=1, kind="stable")
    np.testing.assert_array_equal(ranking.items, places)
    np.testing.assert_array_equal(ranking.target_rank, 1 + np.argmax(places == BATCH.targets[:, None], axis=1))
    log_p = _log_probabilities(model, BATCH, _catalog(model))
    np.testing.assert_allclose(log_p, log_softmax(expected, axis=1), rtol=1e-4)


def test_item_mass_is_the_probability_of_the_combinations_that_items_have(make, codes):
    codes = codes.copy()
    codes[[17, 36]] = codes[3]  # One combination, however many items have it.
    model = make(codes=codes)
    every = np.array(list(product(*map(range, SIZES))))
    mass = np.exp(sums(levels_of_histories(model), every))
    np.testing.assert_allclose(mass.sum(axis=1), 1, rtol=1e-5)
    is_item = (every[:, None] == codes).all(axis=2).any(axis=1)
    got = np.exp(_log_item_mass(model, BATCH, _catalog(model)))
    np.testing.assert_allclose(got, mass[:, is_item].sum(axis=1), rtol=1e-4)
    assert (got < 0.99).all()


def test_items_with_the_same_codes_tie_and_share_their_mean_rank(make, codes):
    codes = codes.copy()
    codes[[17, 36]] = codes[3]
    ranking = ranking_of(make(codes=codes), rank_batch([[5, 1]] * 4, [3, 17, 36, 8]))
    place = {int(item): place for place, item in enumerate(ranking.items[0], start=1)}
    assert [place[item] - place[3] for item in (17, 36)] == [1, 2]
    np.testing.assert_array_equal(ranking.target_rank, [place[17]] * 3 + [place[8]])


def test_filtered_history_is_not_recommended(make):
    for model in (make(), make(decoding="graph", graph_neighbors=N)):
        free, filtered = ranking_of(model), ranking_of(model, filter_history=True)
        for row, history in enumerate(HISTORIES):
            kept = [item for item in free.items[row] if item not in history]
            np.testing.assert_array_equal(filtered.items[row], kept + [-1] * (N - len(kept)))


def test_a_complete_graph_finds_the_exhaustive_top_k(make):
    exhaustive = ranking_of(make(), k=10)
    graph = ranking_of(make(decoding="graph", graph_neighbors=1000, steps=2), k=10)
    np.testing.assert_array_equal(graph.items, exhaustive.items)
    np.testing.assert_allclose(graph.scores, exhaustive.scores, rtol=1e-5)
    listed = exhaustive.target_rank <= 10
    assert set(listed) == {True, False}
    np.testing.assert_array_equal(graph.target_rank, np.where(listed, exhaustive.target_rank, np.inf))


def test_neighbors_have_the_most_similar_codes(make, codes):
    model = make(decoding="graph")
    unit = np.asarray(model.embedding) / np.linalg.norm(model.embedding, axis=1, keepdims=True)
    items = unit[codes + OFFSETS].reshape(N, -1)
    expected = np.argsort(-(items @ items.T), axis=1)[:, :5]
    np.testing.assert_array_equal(_catalog(model).neighbors, expected)
    np.testing.assert_array_equal(expected[:, 0], np.arange(N))


def test_graph_decoding_follows_the_plain_algorithm(make, codes):
    """It starts from the model's own random items, one user at a time."""
    model = make(decoding="graph")
    scores, neighbors = sums(levels_of_histories(model), codes), np.asarray(_catalog(model).neighbors)
    ranking = ranking_of(model, k=8)
    for user, beam in enumerate(np.asarray(model._start(BATCH))):
        for width in (4, 4, 8):
            found = {other for item in beam for other in neighbors[item]}
            beam = sorted(found, key=lambda item: -scores[user, item])[:width]
        listed = [item for item in ranking.items[user] if item >= 0]
        assert listed == beam
        assert ranking.target_rank[user] == (beam.index(t) + 1 if (t := BATCH.targets[user]) in beam else np.inf)


def test_a_list_depends_on_the_seed_but_not_on_the_users_row(make):
    """One step from two items misses most of the catalog, so that lists differ."""
    options = {"decoding": "graph", "steps": 1, "beam_width": 2}
    model = make(**options)
    ranking, again = ranking_of(model, k=8), ranking_of(model, jax.tree.map(lambda x: x[::-1], BATCH), k=8)
    np.testing.assert_array_equal(ranking.items, again.items[::-1])
    assert len(np.unique(model._start(BATCH), axis=0)) == len(HISTORIES)
    assert (ranking_of(make(**options, seed=1), k=8).items != ranking.items).any(axis=1).all()


def test_learns_more_than_popularity(tmp_path):
    config = tiny_run.config("rpg")
    config.rpg.decoding = "graph"
    tiny_run.train(config, tmp_path / "workdir")
    learned = max(line.get("validation/NDCG@10", 0) for line in tiny_run.log(tmp_path / "workdir"))
    assert learned > 1.5 * tiny_run.popularity_ndcg()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", 0.0),
        ("decoding", "beam"),
        ("graph_neighbors", 0),
        ("beam_width", 0),
        ("steps", 0),
        ("label_smoothing", 1.0),
    ],
)
def test_an_impossible_option_is_named_by_its_key(key, value):
    with pytest.raises(UserError, match=rf"^config\.rpg\.{key}: can't be {value!r}; "):
        Options(**{key: value})


def test_exhaustive_decoding_does_not_read_the_options_of_the_graph():
    assert set(Options(decoding="exhaustive").unread()) == {"graph_neighbors", "beam_width", "steps"}
    assert not Options(decoding="graph").unread()
