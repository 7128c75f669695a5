from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simgr_jax import default_config
from simgr_jax.devices import sharding
from simgr_jax.training import steps


def make_config(accumulated=1, streams=0, epochs=5):
    config = default_config.get_config()
    config.training.update({"input_streams": streams, "epochs": epochs})
    config.optimizer.accumulate_steps = accumulated
    return config


def make_windows(num_inputs, row_length=100):
    return SimpleNamespace(num_inputs=num_inputs, row_length=row_length)


SIZES = {
    "num_inputs": st.integers(1, 10**7),
    "row_length": st.integers(64, 2000),
    "accumulated": st.integers(1, 8),
}


@settings(deadline=None)
@given(**SIZES)
def test_a_run_that_chooses_has_the_largest_batches_that_leave_an_epoch_enough_updates(
    num_inputs, row_length, accumulated
):
    rows = steps.choose_batch_rows(make_config(accumulated), make_windows(num_inputs, row_length))
    updates = {rows: -(-num_inputs // (rows * row_length)) // accumulated for rows in (4, 8, 16)}
    assert updates[rows] >= 100 or rows == 4
    assert all(updates[more] < 100 for more in updates if more > rows)


@settings(deadline=None)
@given(**SIZES, shards=st.integers(1, 64), streams=st.integers(0, 6))
def test_the_rows_can_be_shared_by_devices_and_input_streams(num_inputs, row_length, accumulated, shards, streams):
    config, windows = make_config(accumulated, streams), make_windows(num_inputs, row_length)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "shards", lambda axis: shards)
        rows = steps.choose_batch_rows(config, windows)
    assert rows % shards == rows % max(streams, 1) == 0
    assert rows < 16 + shards * max(streams, 1)


def test_little_data_make_small_batches_however_many_epochs_there_are():
    """1,500 users with 32 thousand codes, 22 thousand users with 750 thousand."""
    for epochs in (1, 5, 100):
        config, sizes = make_config(epochs=epochs), (31_900, 130_000, 750_000)
        assert [steps.choose_batch_rows(config, make_windows(inputs)) for inputs in sizes] == [4, 8, 16]
