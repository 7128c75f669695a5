"""An LLM that reads item texts and is trained with the model, from the config to the export."""

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import simgr_jax
from simgr_jax.config_files import load_run_config
from simgr_jax.run import Run
from simgr_jax.training import loop
from tests.test_model_options import LLM, SMALL, with_tokenizer

SETTINGS = {
    "simgr.item_text": "trained",
    "simgr.item_text_tokens": 128,
    "optimizer.item_reader.learning_rate": 0.1,
    "training.epochs": 2,
    "training.checkpoint_every_steps": 1,
    "training.row_length": 64,
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = with_tokenizer(LLM, tmp_path_factory.mktemp("llm") / "llm")
    small = {key: value for key, value in SMALL.items() if key != "backbone.dtype"}
    return small | SETTINGS | {"item_reader.checkpoint": str(folder), "cache_dir": str(folder.parent / "cache")}


@pytest.fixture(scope="module")
def run(settings, tmp_path_factory):
    return simgr_jax.fit("quickstart", settings, workdir=tmp_path_factory.mktemp("runs") / "whole")


@pytest.mark.slow
def test_a_run_that_was_cut_off_ends_as_one_that_was_not(run, settings, tmp_path, monkeypatch):
    join_batch, steps = loop.sharding.join_batch, []

    def fail_at_step_4(batch):
        steps.append(batch)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return join_batch(batch)

    with monkeypatch.context() as patch:
        patch.setattr(loop.sharding, "join_batch", fail_at_step_4)
        with pytest.raises(KeyboardInterrupt):
            simgr_jax.fit("quickstart", settings, workdir=tmp_path)
    resumed = simgr_jax.fit("quickstart", settings, workdir=tmp_path)
    last = [[line for line in one.log() if "validation/NDCG@10" in line][-1] for one in (run, resumed)]
    names = [name for name in last[0] if name.startswith("validation/")]
    assert last[0]["step"] > 4 and [last[0][name] for name in names] == [last[1][name] for name in names]
    np.testing.assert_array_equal(run.item_vectors(), resumed.item_vectors())


@pytest.mark.slow
def test_the_model_begins_with_the_readings_before_training(settings, tmp_path):
    run = Run(load_run_config("quickstart", settings), tmp_path)
    with run.mesh():
        model = run.model
        before = np.asarray(model.readings.table)
        np.testing.assert_array_equal(before, run.item_readings)
        nnx.jit(lambda model: model.read_catalog())(model)
        np.testing.assert_allclose(model.readings.table[...], before, atol=1e-4)


@pytest.mark.slow
def test_what_is_read_after_training_differs_from_what_was_read_before(run, tmp_path):
    found = np.asarray(run.best_model().readings.table)[: run.dataset.num_items]
    before = run.item_readings
    assert np.abs(found - before).max() > 0.05
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), np.linalg.norm(before, axis=1), atol=1e-5)
    again = simgr_jax.load(run.workdir)
    np.testing.assert_array_equal(
        np.asarray(again.best_model().readings.table), np.asarray(run.best_model().readings.table)
    )
    again.export(tmp_path / "export")
    texts = load_file(tmp_path / "export" / "item_index" / "items.safetensors")["texts"]
    np.testing.assert_allclose(texts, run.item_vectors()[:, -texts.shape[1] :], atol=1e-6)
