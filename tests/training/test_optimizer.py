import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
import tiny_run
from flax import nnx

from simgr_jax import default_config
from simgr_jax.training import optimizer as optimizers


def config(**changes) -> ml_collections.ConfigDict:
    options = default_config.get_config().optimizer
    options.update(changes)
    return options


def test_the_schedule_warms_up_linearly_and_ends_on_a_cosine():
    rate = optimizers.learning_rate_schedule(
        config(learning_rate=0.4, warmup_fraction=0.1, final_fraction=0.25), num_steps=200
    )
    np.testing.assert_allclose([rate(step) for step in (0, 5, 10, 20)], [0, 0.1, 0.2, 0.4], rtol=1e-6)
    halfway = 0.1 + 0.3 / 2  # the mean of the peak and the end
    np.testing.assert_allclose([rate(110), rate(200), rate(999)], [halfway, 0.1, 0.1], rtol=1e-5)


@pytest.mark.parametrize("num_steps", [0, 1, 2, 7])
def test_a_run_of_few_steps_has_a_schedule(num_steps):
    rate = optimizers.learning_rate_schedule(config(learning_rate=0.4, warmup_fraction=1.0), num_steps)
    assert all(0 <= rate(step) <= 0.4 for step in range(num_steps + 2))


def test_weight_decay_touches_matrices_that_multiply_activations_and_nothing_else():
    tiny = tiny_run.config()
    tiny.simgr.update({"item_encoder": "mean_mlp", "user_pooling": "attention", "learn_temperature": True})
    model = tiny_run.make_model(tiny)
    decays = optimizers.decays(nnx.state(model, nnx.Param))
    names = {True: set(), False: set()}
    for path, leaf in nnx.to_flat_state(decays):
        names[leaf.get_value()].add(".".join(map(str, path)))
    block = "backbone.layers"
    assert names[True] == {
        *(f"{block}.self_attn.{x}_proj.kernel" for x in "qkvo"),
        *(f"{block}.mlp.{x}_proj.kernel" for x in ("gate", "up", "down")),
        "item_encoder.mlp.input",
        "item_encoder.mlp.output.kernel",
        "user_pooling.score.kernel",
    }
    assert names[False] == {
        "embedding",
        "log_temperature",
        f"{block}.pre_attention_norm.scale",
        f"{block}.pre_mlp_norm.scale",
        "backbone.final_norm.scale",
        "item_encoder.mlp.norm.scale",
        "item_encoder.mlp.bias",
    }


PARAMS = {"kernel": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "bias": jnp.array([0.3, -0.7])}


def gradients(seed, scale=1.0):
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(scale * generator.normal(size=x.shape), jnp.float32), PARAMS)


def updated(optimizer, *steps):
    params, state = PARAMS, optimizer.init(PARAMS)
    for gradient in steps:
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_equals_adamw_written_out():
    options = config(
        learning_rate=0.1,
        warmup_fraction=0.5,
        beta1=0.8,
        beta2=0.9,
        weight_decay=0.3,
        clip_norm=1.0,
    )
    steps = [gradients(seed, scale=3.0) for seed in range(4)]
    rate = optimizers.learning_rate_schedule(options, 4)
    expected, first, second = (jax.tree.map(np.asarray, PARAMS), *({"kernel": 0.0, "bias": 0.0} for _ in range(2)))
    for t, gradient in enumerate(steps, start=1):
        norm = np.sqrt(sum((np.asarray(g) ** 2).sum() for g in gradient.values()))
        assert norm > 1
        for name, g in gradient.items():
            g = np.asarray(g) / norm
            first[name] = 0.8 * first[name] + 0.2 * g
            second[name] = 0.9 * second[name] + 0.1 * g**2
            step = first[name] / (1 - 0.8**t) / (np.sqrt(second[name] / (1 - 0.9**t)) + 1e-8)
            decay = 0.3 * expected[name] if name == "kernel" else 0
            expected[name] = expected[name] - float(rate(t - 1)) * (step + decay)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        updated(optimizers.create(options, 4), *steps),
        expected,
    )


def test_small_gradients_are_not_clipped_and_a_norm_of_zero_never_clips():
    """Adam's updates do not depend on a gradient's scale, so the test compares its moments."""

    def moments(clip_norm, gradient):
        optimizer = optimizers.create(config(clip_norm=clip_norm), 10)
        state = optimizer.update(gradient, optimizer.init(PARAMS), PARAMS)[1]
        return np.asarray(optax.tree.get(state, "mu")["bias"])

    small, large = gradients(0, scale=0.01), gradients(0, scale=100.0)
    np.testing.assert_array_equal(moments(1.0, small), moments(0.0, small))
    np.testing.assert_allclose(moments(1.0, large) * float(optax.global_norm(large)), moments(0.0, large), rtol=1e-5)


def test_accumulated_batches_make_one_step_of_their_mean_gradient():
    halves = [(gradients(2 * i), gradients(2 * i + 1)) for i in range(3)]
    accumulated = updated(optimizers.create(config(accumulate_steps=2), 6), *[g for pair in halves for g in pair])
    means = [jax.tree.map(lambda a, b: (a + b) / 2, *pair) for pair in halves]
    at_once = updated(optimizers.create(config(accumulate_steps=1), 3), *means)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), accumulated, at_once)
    assert not np.allclose(accumulated["bias"], PARAMS["bias"])


def test_nothing_changes_until_the_last_batch_of_an_update():
    optimizer = optimizers.create(config(accumulate_steps=3, warmup_fraction=0.0), 6)
    for name, value in updated(optimizer, gradients(0), gradients(1)).items():
        np.testing.assert_array_equal(value, PARAMS[name])
