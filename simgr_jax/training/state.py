"""The training state and the jit-compiled step."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from simgr_jax.devices import sharding
from simgr_jax.inputs.batch import TrainBatch
from simgr_jax.models.model_inputs import Memory
from simgr_jax.training import optimizer as optimizers
from simgr_jax.training.random_keys import step_rngs

NO_MEMORY = nnx.State({})


class TrainState(NamedTuple):
    """Everything that a step changes.

    Attributes:
      step: int32 [], batches seen.
      params: the trained parameters.
      memory: what the model remembers from step to step (see `model_inputs.Memory`).
      averaged_params: exponential moving average of `params`, or None.
      optimizer_state: optax's.
    """

    step: jax.Array
    params: nnx.State
    memory: nnx.State
    averaged_params: nnx.State | None
    optimizer_state: Any

    @property
    def evaluation_params(self) -> nnx.State:
        """The parameters that are evaluated and exported: the average, if there is one."""
        return self.params if self.averaged_params is None else self.averaged_params


def create_state(
    params: nnx.State, optimizer: optax.GradientTransformation, ema_decay: float, memory: nnx.State = NO_MEMORY
) -> TrainState:
    """The state before the first step, split over the mesh.

    Args:
      ema_decay: 0 keeps no average.
    """
    others = partial(_all_but_params, optimizer, ema_decay)
    others = jax.jit(others, out_shardings=sharding.shardings(jax.eval_shape(others, params)))
    return others(params)._replace(params=params, memory=memory)


def abstract_state(
    params: nnx.State, optimizer: optax.GradientTransformation, ema_decay: float, memory: nnx.State = NO_MEMORY
) -> TrainState:
    """The shapes of what `create_state` returns."""
    others = jax.eval_shape(partial(_all_but_params, optimizer, ema_decay), params)
    return others._replace(params=params, memory=memory)


def _all_but_params(optimizer: optax.GradientTransformation, ema_decay: float, params: nnx.State) -> TrainState:
    # A copy, because the step donates its state, and no buffer may be donated twice.
    averaged = jax.tree.map(jnp.copy, params) if ema_decay else None
    return TrainState(jnp.int32(0), None, None, averaged, optimizer.init(params))


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    seed: int,
    state: TrainState,
    frozen: Collection[str] = (),
) -> Callable[[TrainState, nnx.State, TrainBatch], tuple[TrainState, dict[str, jax.Array]]]:
    """The compiled step (state, catalog, batch) -> (state, scalars), for states like `state`. It reuses the old state's
    buffers.

    A step whose loss or gradient is not finite is skipped: only `step` changes. The scalar `is_finite` says so.

    Args:
      seed: for dropout and negatives (see `random_keys`).
      frozen: the parts of the model whose parameters, and their average, stay as they are. Their gradients are not
        computed; `optimizer` must be made for it, too.
    """
    split = partial(optimizers.split_parts, parts=frozen)

    def train_step(state: TrainState, catalog: nnx.State, batch: TrainBatch):
        trained, fixed = split(state.params)

        def loss_of(trained):
            memory = jax.tree.map(lambda x: x, state.memory)  # Variables of this trace, which the model may change.
            model = nnx.merge(graphdef, nnx.merge_state(trained, fixed), memory, catalog)
            loss, scalars = model.loss(batch, step_rngs(seed, state.step))
            return loss, (scalars, nnx.state(model, Memory))

        (loss, (scalars, memory)), gradients = jax.value_and_grad(loss_of, has_aux=True)(trained)
        # Counted here, where the whole batch is known: each process has only its own rows.
        scalars = {"targets": jnp.sum(batch.valid)} | scalars
        scalars |= {"loss": loss, "gradient_norm": optax.global_norm(gradients)}
        is_finite = jnp.isfinite(loss) & jnp.isfinite(scalars["gradient_norm"])
        keep_if_not = partial(jax.tree.map, partial(jnp.where, is_finite))

        gradients = nnx.merge_state(gradients, optax.tree.zeros_like(fixed))
        updates, optimizer_state = optimizer.update(gradients, state.optimizer_state, state.params)
        optimizer_state = keep_if_not(optimizer_state, state.optimizer_state)
        trained = keep_if_not(optax.apply_updates(trained, split(updates)[0]), trained)
        averaged = state.averaged_params
        if averaged is not None:
            # Early steps average over the steps so far, so that the random initial values are soon forgotten.
            decay = jnp.minimum(ema_decay, (state.step + 1) / (state.step + 10))
            before, fixed_average = split(averaged)
            after = optax.incremental_update(trained, before, jnp.where(is_finite, 1 - decay, 0))
            averaged = nnx.merge_state(after, fixed_average)
        memory = keep_if_not(memory, state.memory)
        state = TrainState(state.step + 1, nnx.merge_state(trained, fixed), memory, averaged, optimizer_state)
        return state, scalars | {"is_finite": is_finite}

    # The new state is split as the old one was.
    return jax.jit(train_step, donate_argnums=0, out_shardings=(jax.tree.map(lambda x: x.sharding, state), None))
