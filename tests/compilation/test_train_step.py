"""The step that is compiled for other devices is the step that is trained."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

from simgr_jax import run_config
from simgr_jax.compilation import train_step
from simgr_jax.errors import UserError
from simgr_jax.preparation import open_mesh, prepare
from tests.compilation.same_step import config, llm_config


def test_it_is_the_step_that_is_trained(on_eight_devices):
    assert on_eight_devices("tests.compilation.same_step") == "same\n"


def test_without_a_number_of_items_it_is_of_the_configs_own_data(trained_workdir):
    config = run_config.load(trained_workdir)
    plan = train_step.plan(config, trained_workdir, num_items=None)
    with open_mesh(config):
        prepared = prepare(config, trained_workdir)
    np.testing.assert_array_equal(plan.semantic_ids.codes, prepared.semantic_ids.codes)
    np.testing.assert_array_equal(plan.prompt.pieces.values, prepared.prompt.pieces.values)


def test_model_flops_by_hand(tmp_path):
    tiny, num_items = config(), 50
    tiny.model.item_encoder = "mean"
    tiny.training.batch_rows = 2
    positions, attended = 2 * 32, 32
    projections = 16 * (4 * 8 + 2 * 8 + 2 * 8) + 4 * 8 * 16 + 3 * 16 * 24
    attention = 2 * attended * 4 * 8
    scores = num_items * 16
    # The mean over the items, that label smoothing takes, has a product of its own.
    by_hand = 3 * 2 * positions * (3 * (projections + attention) + scores + 16)
    assert train_step.model_flops(train_step.plan(tiny, tmp_path, num_items)) == by_hand


def test_model_flops_are_of_no_way_to_compute_it(tmp_path):
    flops = {
        train_step.model_flops(train_step.plan(config(remat=remat, attention=attention), tmp_path, num_items=50))
        for remat, attention in (("none", "auto"), ("full", "splash"), ("dots", "xla"))
    }
    assert len(flops) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"semantic_ids.quantizer.levels": 2}, "2 levels of 8 codes can't tell 65 items apart"),
        ({"model.history": "tokens", "prompt.prefix": "Bought:"}, "config.prompt.prefix: has text"),
        ({"training.row_length": 5}, "config.training.row_length: 5 is shorter"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_compiled(tmp_path, changes, message):
    tiny = config()
    tiny.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        train_step.plan(tiny, tmp_path, num_items=65)


def test_assumed_items_have_no_text(tmp_path):
    llm = llm_config(rank=0)
    llm.prompt.item = "\n{title} {codes}"
    with pytest.raises(UserError, match=r"--num_items: .* have no text; leave out config.prompt"):
        train_step.plan(llm, tmp_path, num_items=65)


def test_codes_of_assumed_items_differ(tmp_path):
    plan = train_step.plan(config(), tmp_path, num_items=8**4)
    assert len(np.unique(plan.semantic_ids.codes, axis=0)) == 8**4
    assert jax.tree.all(jax.tree.map(lambda x: isinstance(x, jax.ShapeDtypeStruct), nnx.state(train_step.model(plan))))
