import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from simgr_jax.ops.clip_between import clip_between

LOWEST, HIGHEST = -1.0, 2.0
# (x, the sign of x's gradient with which gradient descent moves it outward)
AT_OR_BEYOND_A_BOUND = [(-3.0, 1), (-1.0, 1), (2.0, -1), (5.0, -1)]


def gradient(x: float, slope: float) -> float:
    """The gradient of slope * clip_between(x)."""
    return float(jax.grad(lambda x: slope * clip_between(x, LOWEST, HIGHEST))(x))


@pytest.mark.parametrize("x", [-3.0, -1.0, 0.5, 2.0, 5.0])
def test_the_value_is_clipped(x):
    assert clip_between(jnp.float32(x), LOWEST, HIGHEST) == min(max(x, LOWEST), HIGHEST)


@pytest.mark.parametrize("slope", [-0.7, 0.7])
def test_between_the_bounds_the_gradient_passes(slope):
    np.testing.assert_allclose(gradient(0.5, slope), slope)


@pytest.mark.parametrize(("x", "outward"), AT_OR_BEYOND_A_BOUND)
def test_a_gradient_that_leads_back_passes_and_one_that_leads_outward_is_zero(x, outward):
    assert gradient(x, 0.7 * outward) == 0
    np.testing.assert_allclose(gradient(x, -0.7 * outward), -0.7 * outward)


@pytest.mark.parametrize("outward", [-1, 1])
def test_with_adam_a_parameter_comes_back_soon_after_its_gradient_turns(outward):
    """Adam's momentum carries it a little beyond the bound, but not further the longer it is pushed."""
    optimizer, bound = optax.adam(0.1), HIGHEST if outward > 0 else LOWEST

    @jax.jit
    def step(x, state, slope):
        value = jax.grad(lambda x: slope * clip_between(x, LOWEST, HIGHEST))(x)
        updates, state = optimizer.update(value, state)
        return optax.apply_updates(x, updates), state

    x = jnp.float32(0.5)
    state, beyond = optimizer.init(x), []
    for _ in range(300):
        x, state = step(x, state, -outward)
        beyond.append(outward * float(x - bound))
    assert 0 < beyond[-1] < 1.5  # Without a clip it would be about 30.
    assert beyond[-1] == pytest.approx(beyond[99], rel=1e-2)
    steps = 0
    while outward * (x - bound) > 0:
        x, state = step(x, state, outward)
        steps += 1
    assert steps < 20
