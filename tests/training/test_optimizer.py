from unittest import mock

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
import tiny_run
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from simgr_jax import default_config
from simgr_jax.models import registry
from simgr_jax.models.model_inputs import ModelInputs
from simgr_jax.models.scratch import scratch_backbone
from simgr_jax.training import optimizer as optimizers


def config(**changes) -> ml_collections.ConfigDict:
    """A run of one epoch. changes: of `config.optimizer`."""
    run = default_config.get_config()
    run.training.epochs = 1
    run.optimizer.update(changes)
    return run


def with_checkpoint(freeze: float = 0.0, backbone: tuple | dict = (), **changes) -> ml_collections.ConfigDict:
    """backbone: changes of `config.optimizer.backbone`."""
    run = config(**changes)
    run.backbone.checkpoint = "llm"
    run.optimizer.backbone.update(dict(backbone))
    run.training.freeze_epochs = freeze
    return run


def test_the_schedule_warms_up_linearly_and_ends_on_a_cosine():
    rate = optimizers.learning_rate_schedule(
        config(learning_rate=0.4, warmup_fraction=0.1, final_fraction=0.25).optimizer, num_steps=200
    )
    np.testing.assert_allclose([rate(step) for step in (0, 5, 10, 20)], [0, 0.1, 0.2, 0.4], rtol=1e-6)
    halfway = 0.1 + 0.3 / 2  # the mean of the peak and the end
    np.testing.assert_allclose([rate(110), rate(200), rate(999)], [halfway, 0.1, 0.1], rtol=1e-5)


@pytest.mark.parametrize("num_steps", [0, 1, 2, 7])
def test_a_run_of_few_steps_has_a_schedule(num_steps):
    rate = optimizers.learning_rate_schedule(config(learning_rate=0.4, warmup_fraction=1.0).optimizer, num_steps)
    assert all(0 <= rate(step) <= 0.4 for step in range(num_steps + 2))


def test_weight_decay_touches_matrices_that_multiply_activations_and_nothing_else():
    tiny = tiny_run.config()
    tiny.simgr.update({"item_encoder": "mean_mlp", "user_pooling": "attention", "learn_temperature": True})
    model = tiny_run.make_model(tiny)
    decays = optimizers.decays(nnx.state(model, nnx.Param))
    names = {True: set(), False: set()}
    for path, leaf in nnx.to_flat_state(decays):
        names[leaf.get_value()].add(".".join(map(str, path)))
    block = "backbone.layers.0"
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


def written_out(params, steps, options, num_updates):
    """AdamW in numpy, with one norm for clipping over all of `params`; only kernels decay.

    Args:
      steps: the gradients of each step.
      options: a ConfigDict with `learning_rate` and so on.
      num_updates: the length of the schedule.
    """
    rate = optimizers.learning_rate_schedule(options, num_updates)
    params = {name: np.asarray(value, np.float64) for name, value in params.items()}
    first, second = ({name: 0.0 for name in params} for _ in range(2))
    for t, gradient in enumerate(steps, start=1):
        norm = np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in gradient.values()))
        for name, g in gradient.items():
            g = np.asarray(g, np.float64) / max(1, norm / options.clip_norm)
            first[name] = options.beta1 * first[name] + (1 - options.beta1) * g
            second[name] = options.beta2 * second[name] + (1 - options.beta2) * g**2
            step = first[name] / (1 - options.beta1**t) / (np.sqrt(second[name] / (1 - options.beta2**t)) + 1e-8)
            decay = options.weight_decay * params[name] if "kernel" in name else 0
            params[name] = params[name] - float(rate(t - 1)) * (step + decay)
    return params


def assert_close(params, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), params, expected)


MOMENTS = {"beta1": 0.8, "beta2": 0.9}


def test_equals_adamw_written_out():
    run = config(learning_rate=0.1, warmup_fraction=0.5, weight_decay=0.3, clip_norm=1.0, **MOMENTS)
    steps = [gradients(seed, scale=3.0) for seed in range(4)]
    assert_close(updated(optimizers.create(run, 4), *steps), written_out(PARAMS, steps, run.optimizer, 4))


# Parameters of a model with a checkpoint.
NEW, BACKBONE = ("embedding", "head.kernel"), ("backbone.scale", "backbone.layers.kernel", "text_embedding")


def model_state(seed: int, scale: float = 1.0) -> nnx.State:
    generator = np.random.default_rng(seed)
    values = {tuple(name.split(".")): scale * generator.normal(size=(3, 2)) for name in (*NEW, *BACKBONE)}
    return nnx.from_flat_state({path: nnx.Param(jnp.asarray(value, jnp.float32)) for path, value in values.items()})


def by_name(state: nnx.State, names=(*NEW, *BACKBONE)) -> dict[str, np.ndarray]:
    flat = {".".join(path): np.asarray(leaf.get_value()) for path, leaf in nnx.to_flat_state(state)}
    return {name: flat[name] for name in names}


@pytest.mark.parametrize(("accumulated", "freeze"), [(1, 0.0), (1, 0.25), (2, 0.25), (2, 1.0)])
def test_new_parts_and_backbone_have_their_own_adamw_and_the_backbones_begins_when_it_thaws(accumulated, freeze):
    """Two of eight updates are done before it thaws: a quarter of the epoch."""
    run = with_checkpoint(
        freeze,
        backbone={"learning_rate": 0.02, "warmup_fraction": 0.5, "weight_decay": 0.5, "clip_norm": 0.7},
        **{"learning_rate": 0.1, "warmup_fraction": 0.25, "weight_decay": 0.3, "clip_norm": 2.0},
        **MOMENTS,
        accumulate_steps=accumulated,
    )
    num_steps, frozen = 8 * accumulated, round(8 * freeze) * accumulated
    assert optimizers.frozen_steps(run, num_steps) == frozen
    start = model_state(seed=100)
    params, steps = start, [model_state(seed, scale=3.0) for seed in range(num_steps)]
    state = optimizers.create(run, num_steps).init(params)
    update = {is_frozen: jax.jit(optimizers.create(run, num_steps, is_frozen).update) for is_frozen in (True, False)}
    for step, gradient in enumerate(steps):
        before = state
        updates, state = update[step < frozen](gradient, state, params)
        params = optax.apply_updates(params, updates)
        if step < frozen:
            jax.tree.map(np.testing.assert_array_equal, by_name(params, BACKBONE), by_name(start, BACKBONE))
            at_rest = (one.inner_states["backbone"] for one in (state, before))
            jax.tree.map(np.testing.assert_array_equal, *at_rest)

    def means(names, begin):
        every = [by_name(gradient, names) for gradient in steps[begin:]]
        return [
            {name: sum(gradient[name] for gradient in every[i : i + accumulated]) / accumulated for name in names}
            for i in range(0, len(every), accumulated)
        ]

    rates = ml_collections.ConfigDict({**run.optimizer, **run.optimizer.backbone})
    assert_close(by_name(params, NEW), written_out(by_name(start, NEW), means(NEW, 0), run.optimizer, 8))
    left = 8 - frozen // accumulated
    expected = written_out(by_name(start, BACKBONE), means(BACKBONE, frozen), rates, left)
    assert_close(by_name(params, BACKBONE), expected)


def test_the_backbones_schedule_restarts_with_that_of_the_new_parts():
    """Ten steps of which the backbone is frozen in two, with a restart after five."""
    run = with_checkpoint(0.4, learning_rate=0.1, restart_epoch=1)
    run.training.epochs = 2
    with mock.patch.object(optimizers, "learning_rate_schedule", wraps=optimizers.learning_rate_schedule) as schedule:
        optimizers.create(run, 5)
    asked = [call.args for call in schedule.call_args_list if len(call.args) == 3]
    assert [(options.learning_rate, *steps) for options, *steps in asked] == [(0.1, 10, 5), (2e-4, 8, 3)]


@settings(deadline=None)
@given(epochs=st.integers(1, 9), steps=st.integers(1, 50), accumulated=st.integers(1, 4), freeze=st.floats(0.0, 9.0))
def test_the_backbone_is_frozen_for_whole_updates_near_what_was_asked(epochs, steps, accumulated, freeze):
    run = with_checkpoint(freeze, accumulate_steps=accumulated)
    run.training.epochs = epochs
    frozen = optimizers.frozen_steps(run, steps)
    assert frozen % accumulated == 0
    assert (frozen > 0) == (freeze > 0)
    assert abs(frozen - freeze * steps) <= accumulated
    run.backbone.checkpoint = ""
    assert optimizers.frozen_steps(run, steps) == 0


TAKES_CHECKPOINT = [name for name in registry.MODELS if registry.module_of(name).Options.takes_checkpoint]


@pytest.mark.parametrize("name", TAKES_CHECKPOINT)
def test_what_a_checkpoint_fills_is_the_backbones_group(name):
    """In every model that takes a checkpoint, whatever it calls the decoder and the LLM's own token embeddings."""
    tiny = tiny_run.config(name)
    backbone = scratch_backbone(tiny, nnx.Rngs(0))._replace(text_embedding=jnp.full((3, 16), 7.0))
    ids = tiny_run.SEMANTIC_IDS
    inputs = ModelInputs(ids.num_items, ids, tiny_run.split().train, lambda: backbone, nnx.Rngs(0))
    params = nnx.state(registry.create(tiny, inputs), nnx.Param)
    new, old = optimizers.split_parts(params, ("backbone", "text_embedding"))
    is_text = lambda leaf: np.all(leaf == 7)  # noqa: E731
    assert not any(map(is_text, jax.tree.leaves(new)))
    from_decoder = [leaf for leaf in jax.tree.leaves(old) if not is_text(leaf)]
    decoder = jax.tree.leaves(nnx.state(backbone.decoder, nnx.Param))
    assert len(decoder) == len(from_decoder) and set(map(id, decoder)) == set(map(id, from_decoder))


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
