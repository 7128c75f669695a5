"""Standardizes a model's readout by the states of some training batches, before the first step."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import closing

import jax
import numpy as np

from simgr_jax.devices import sharding
from simgr_jax.inputs.train_batches import TrainBatches
from simgr_jax.models.recommender import Recommender

BATCHES = 4


def standardize(model: Recommender, make_batches: Callable[[], TrainBatches]) -> None:
    """Does nothing for a model without a readout (see `models.readout`).

    Args:
      make_batches: makes the training batches, of which the first BATCHES are read.
    """
    if getattr(model, "readout", None) is None:
        return
    with closing(make_batches()) as batches:
        moments = jax.jit(lambda model, batch: model.state_moments(batch), out_shardings=sharding.replicated())
        found = [moments(model, sharding.join_batch(batch)) for batch in itertools.islice(batches, BATCHES)]
    columns = zip(*jax.device_get(found), strict=True)
    counts, sums, squares = (np.sum(np.asarray(part, np.float64), axis=0) for part in columns)
    mean = sums / counts
    model.readout.standardize_by(mean, np.sqrt(np.maximum(squares / counts - np.square(mean), 0)))
