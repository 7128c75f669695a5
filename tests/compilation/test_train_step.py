"""The step compiled for other devices equals the step used in training."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

from simgr_jax.compilation.train_step import PlannedRun, model_flops
from simgr_jax.devices import sharding
from simgr_jax.devices.choose_dtype import choose_dtype
from simgr_jax.errors import UserError
from simgr_jax.run import Run
from tests.compilation.same_step import config, llm_config


@pytest.mark.slow
def test_the_compiled_step_is_the_one_used_in_training(on_eight_devices):
    assert on_eight_devices("tests.compilation.same_step") == "same\n"


def test_without_a_number_of_items_the_step_uses_the_configs_data(trained_workdir):
    trained = Run.load(trained_workdir)
    planned = PlannedRun(trained.config, trained_workdir)
    np.testing.assert_array_equal(planned.semantic_ids.codes, trained.semantic_ids.codes)
    np.testing.assert_array_equal(planned.prompt.pieces.values, trained.prompt.pieces.values)


def test_codes_that_are_fitted_to_an_llms_readings_can_be_planned_for_with_the_configs_data(tmp_path):
    tiny = llm_config(rank=2)
    tiny.semantic_ids.embeddings.names, tiny.cache_dir = ("llm", "interactions"), str(tmp_path / "cache")
    tiny.data.format = "synthetic"
    tiny.data.synthetic.update({"num_users": 60, "num_items": 40})
    planned = PlannedRun(tiny, tmp_path)
    assert len(planned.semantic_ids.codes) == len(planned.item_readings) == planned.dataset.num_items


def test_model_flops_by_hand(tmp_path):
    tiny, num_items = config(), 50
    tiny.simgr.item_encoder = "mean"
    tiny.training.batch_rows = 2
    positions, attended = 2 * 32, 32
    projections = 16 * (4 * 8 + 2 * 8 + 2 * 8) + 4 * 8 * 16 + 3 * 16 * 24
    attention = 2 * attended * 4 * 8
    scores = num_items * 16
    # Label smoothing's mean over the items adds a separate product.
    by_hand = 3 * 2 * positions * (3 * (projections + attention) + scores + 16)
    assert model_flops(PlannedRun(tiny, tmp_path, num_items)) == by_hand


def test_model_flops_do_not_depend_on_the_implementation(tmp_path):
    flops = {
        model_flops(PlannedRun(config(remat=remat, attention=attention), tmp_path, num_items=50))
        for remat, attention in (("none", "auto"), ("full", "splash"), ("dots", "xla"))
    }
    assert len(flops) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"semantic_ids.quantizer.levels": 2}, "2 levels of 8 codes can't distinguish 65 items"),
        ({"simgr.history": "tokens", "prompt.prefix": "Bought:"}, "config.prompt.prefix: has text"),
        ({"training.row_length": 5}, "config.training.row_length: 5 is shorter"),
    ],
)
def test_impossible_configs_are_refused_before_compilation(tmp_path, changes, message):
    tiny = config()
    tiny.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        PlannedRun(tiny, tmp_path, num_items=65).abstract_model()


def test_assumed_items_have_no_text(tmp_path):
    llm = llm_config(rank=0)
    llm.prompt.item = "\n{title} {codes}"
    with pytest.raises(UserError, match=r"--num_items: .* have no text; remove the text from config.prompt"):
        PlannedRun(llm, tmp_path, num_items=65).abstract_model()


def test_assumed_items_have_distinct_codes(tmp_path):
    planned = PlannedRun(config(), tmp_path, num_items=8**4)
    assert len(np.unique(planned.semantic_ids.codes, axis=0)) == 8**4
    state = nnx.state(planned.abstract_model())
    assert jax.tree.all(jax.tree.map(lambda x: isinstance(x, jax.ShapeDtypeStruct), state))


def test_assumed_items_give_rows_of_whole_histories_for_every_device(tmp_path, monkeypatch):
    tiny = config()
    tiny.training.update({"batch_rows": 0, "row_length": 0})
    planned = PlannedRun(tiny, tmp_path, num_items=50)
    assert planned.batch_rows == 16
    monkeypatch.setattr(sharding, "shards", lambda axis: 12)
    assert planned.batch_rows == 24
    assert planned.windows.row_length == max(64, planned.prompt.longest(tiny.data.max_items))


def test_the_dtype_suits_the_devices_that_are_planned_for(tmp_path):
    tiny = config()
    tiny.backbone.dtype = "auto"
    assert PlannedRun(tiny, tmp_path, 50, "tpu").config.backbone.dtype == "bfloat16"
    assert PlannedRun(tiny, tmp_path, 50).config.backbone.dtype == choose_dtype("cpu")


@pytest.mark.slow
def test_a_trained_item_readers_texts_are_counted(tmp_path):
    """Each further row of texts costs the same."""
    flops = []
    for item_text, rows in (("read", 0), ("trained", 1), ("trained", 2), ("trained", 3)):
        tiny = llm_config(rank=2)
        tiny.simgr.item_text, tiny.simgr.item_text_tokens = item_text, max(rows * 128, 1)
        flops.append(model_flops(PlannedRun(tiny, tmp_path, num_items=60)))
    without, *with_rows = flops
    assert with_rows[2] - with_rows[1] == with_rows[1] - with_rows[0] > 0.2 * without
