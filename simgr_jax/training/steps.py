"""How many rows a batch has when the run chooses, and how many steps and updates follow."""

from __future__ import annotations

import math

import ml_collections

from simgr_jax.devices import sharding
from simgr_jax.inputs.training_windows import TrainingWindows

# A run that chooses takes the most of these rows that leave an epoch so many updates, else the fewest. With 24 updates
# an epoch, an LLM on 1,500 users ends as a popularity ranker; with 90 it learns.
ROWS = (16, 8, 4)
ENOUGH_UPDATES = 100


def choose_batch_rows(config: ml_collections.ConfigDict, windows: TrainingWindows) -> int:
    """The rows of a batch for training windows: one of ROWS, rounded up to what the mesh and the input streams need.

    It depends on no number of epochs, because a run may be trained longer.
    """
    choices = [round_rows(rows, config) for rows in ROWS]
    accumulated = config.optimizer.accumulate_steps
    enough = (rows for rows in choices if steps_per_epoch(windows, rows) // accumulated >= ENOUGH_UPDATES)
    return next(enough, choices[-1])


def round_rows(rows: int, config: ml_collections.ConfigDict) -> int:
    """As many rows or a few more, such that the devices of the context's mesh and the input streams can share them."""
    multiple = math.lcm(sharding.shards("batch"), max(config.training.input_streams, 1))
    return -(-rows // multiple) * multiple


def steps_per_epoch(windows: TrainingWindows, rows: int) -> int:
    """Packing leaves some room empty, so an epoch is slightly more batches than this."""
    return -(-windows.num_inputs // (rows * windows.row_length))
