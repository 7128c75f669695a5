"""The encoder and the paper's loss against plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from simgr_jax.errors import UserError
from simgr_jax.models.sasrec import Options, SASRec, binary_cross_entropy
from tests.training import tiny_run


def make(**options) -> SASRec:
    config = tiny_run.config("sasrec")
    config.backbone.dropout = 0.0
    config.sasrec.update(options)
    return tiny_run.make_model(config)


def test_the_papers_loss_does_not_read_label_smoothing():
    assert Options(loss="binary").unread() == {"label_smoothing": "loss=full"}
    assert Options(loss="full").unread() == {}
    states, targets, losses = jnp.ones((3, 16)), jnp.arange(3), []
    for smoothing in (0.0, 0.1):
        losses.append(make(loss="binary", label_smoothing=smoothing).losses(states, targets, nnx.Rngs(negatives=0)))
    np.testing.assert_array_equal(*losses)


@pytest.fixture(scope="module")
def sasrec() -> SASRec:
    """A model whose parameters are all random, so that each one counts."""
    model, rng = make(), np.random.default_rng(0)
    state = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) / 2, jnp.float32), state))
    return model


def norm(x, parameters):
    x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6) * parameters["scale"] + parameters["bias"]


def numpy_states(model: SASRec, items: np.ndarray) -> np.ndarray:
    """[t, D], the states of one layer with two heads of width 8."""
    encoder = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model.encoder, nnx.Param)))
    layer = jax.tree.map(lambda x: x[0], encoder["layers"][0])
    linear = lambda x, parameters: x @ parameters["kernel"] + parameters["bias"]  # noqa: E731
    x = np.asarray(model.embedding)[items] + encoder["position_embedding"][: len(items)]
    normed = norm(x, layer["pre_attention_norm"])
    query, key, value = (
        linear(normed, layer["self_attn"][name]).reshape(len(items), 2, 8) for name in ("q_proj", "k_proj", "v_proj")
    )
    scores = np.einsum("thd,shd->hts", query, key) / np.sqrt(8)
    weights = np.exp(scores) * np.tri(len(items))
    mixed = np.einsum("hts,shd->thd", weights / weights.sum(axis=-1, keepdims=True), value)
    x = x + linear(mixed.reshape(len(items), 16), layer["self_attn"]["o_proj"])
    inner = np.maximum(linear(norm(x, layer["pre_mlp_norm"]), layer["mlp"]["up_proj"]), 0)
    return norm(x + linear(inner, layer["mlp"]["down_proj"]), encoder["final_norm"])


def test_the_state_is_the_papers_transformers(sasrec):
    items = np.array([4, 9, 4, 28, 0, 17])
    states = jax.jit(sasrec.states)(items[None], np.ones((1, 6), np.int32), np.arange(6)[None])
    np.testing.assert_allclose(states[0], numpy_states(sasrec, items), rtol=1e-4, atol=1e-4)


def test_the_binary_loss_is_the_papers():
    rng = np.random.default_rng(1)
    states, vectors = rng.normal(size=(5, 4)), rng.normal(size=(9, 4))
    targets, negatives = rng.integers(0, 9, (2, 5))
    score = lambda items: (states * vectors[items]).sum(axis=1)  # noqa: E731
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    expected = -np.log(sigmoid(score(targets))) - np.log(1 - sigmoid(score(negatives)))
    losses = binary_cross_entropy(jnp.asarray(states), jnp.asarray(vectors), targets, negatives)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_at_the_minimum_of_the_binary_loss_a_softmax_of_the_scores_is_the_truth():
    truth = np.array([0.5, 0.3, 0.15, 0.05], np.float32)
    every = np.arange(4)

    def expected_loss(scores):
        losses = jax.vmap(  # Each target with each negative.
            lambda target: binary_cross_entropy(jnp.tile(scores, (4, 1)), jnp.eye(4), jnp.full(4, target), every)
        )(every)
        return truth @ jnp.mean(losses, axis=1)

    gradient = jax.jit(jax.grad(expected_loss))(jnp.log(truth) + jnp.log(4.0))
    np.testing.assert_allclose(gradient, np.zeros(4), atol=1e-6)


def test_negatives_are_drawn_from_the_whole_catalog_anew_each_time():
    model = make(loss="binary")
    states = jax.random.normal(jax.random.key(0), (3000, 16)) * 3
    targets = jnp.zeros(3000, jnp.int32)
    losses, again, other = (model.losses(states, targets, nnx.Rngs(negatives=seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(losses, again)
    # Without the target's part, the loss tells the negative by its score.
    parts = np.asarray(losses - jax.nn.softplus(-states @ model.embedding[0]))
    of_items = np.asarray(jax.nn.softplus(states @ model.embedding[...].T))
    drawn = np.bincount(np.abs(of_items - parts[:, None]).argmin(axis=1), minlength=30)
    assert (np.abs(drawn - 100) < 50).all()
    assert (losses != other).mean() > 0.9


def test_an_unknown_loss_is_refused():
    with pytest.raises(UserError, match=r"config\.sasrec\.loss: can't be 'bpr'; choose one of full, binary"):
        make(loss="bpr")
