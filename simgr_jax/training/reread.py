"""Brings what a model remembers up to date with its parameters (see `models.item_readings`)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from simgr_jax.devices import sharding
from simgr_jax.models.model_inputs import Memory

Reread = Callable[[nnx.State, nnx.State, nnx.State], nnx.State]


def make_reread(graphdef: nnx.GraphDef) -> Reread:
    """The function (params, memory, rest) -> memory for models of this structure. A model may have no memory."""

    def reread(params: nnx.State, memory: nnx.State, rest: nnx.State) -> nnx.State:
        model = nnx.merge(graphdef, params, memory, rest)
        model.read_catalog()
        return nnx.state(model, Memory)

    compiled = jax.jit(reread)
    return lambda params, memory, rest: compiled(params, memory, rest) if memory else memory


def forget(memory: nnx.State) -> nnx.State:
    """An empty memory like `memory`, whose arrays may have been deleted."""
    zeros = lambda x, where: jnp.zeros(x.shape, x.dtype, device=where)  # noqa: E731
    return jax.tree.map(zeros, memory, sharding.shardings(memory))
