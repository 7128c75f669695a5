"""A run resumes only with the data that it learned from, and its model is only asked about the items it knows."""

import dataclasses
import json

import numpy as np
import pytest

from simgr_jax.data.dataset import Dataset, Sequences
from simgr_jax.errors import UserError
from simgr_jax.inputs.prompts import item_prompt
from simgr_jax.semantic_ids.codes import SemanticIds
from simgr_jax.workdir import trained_on

TRAIN = Sequences.from_lists([[0, 1, 2], [2, 1]])
DATASET = Dataset("shop", ["u", "v"], ["a", "b", "c"], TRAIN)
IDS = SemanticIds(np.array([[0, 0], [0, 1], [1, 0]], np.int32), (2, 2))
PROMPT = item_prompt(3)
OTHER_DATASET = dataclasses.replace(DATASET, item_ids=["a", "c", "b"])
OTHER_IDS = SemanticIds(IDS.codes[::-1], (2, 2))
OTHER_PROMPT = dataclasses.replace(PROMPT, text_tokens=np.array([5, 8], np.int32))
OTHER_TRAIN = Sequences.from_lists([[0, 1, 2], [2, 0]])
QUALITY = {"collisions": 0}


def begin(workdir, model="simgr", prompt=PROMPT, learned=True):
    trained_on.save(model, DATASET, IDS, prompt, TRAIN, QUALITY, workdir)
    if learned:
        (workdir / "checkpoints" / "10").mkdir(parents=True)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({0: OTHER_DATASET}, "items"),
        ({1: OTHER_IDS}, "semantic_ids"),
        ({2: dataclasses.replace(PROMPT, text_tokens=np.array([5, 9], np.int32))}, "text_tokens"),
        ({3: OTHER_TRAIN}, "training_sequences"),
    ],
)
def test_a_run_resumes_only_with_the_data_it_began_with(tmp_path, changes, name):
    begin(tmp_path, prompt=OTHER_PROMPT)
    data = [DATASET, IDS, OTHER_PROMPT, TRAIN]
    trained_on.check(*data, tmp_path)
    for place, other in changes.items():
        data[place] = other
    with pytest.raises(UserError, match=f"trained_on.json:{name}: are not those of now; give the data"):
        trained_on.check(*data, tmp_path)


def test_a_model_takes_new_interactions_but_not_other_items(tmp_path):
    begin(tmp_path)
    trained_on.check_items(DATASET, IDS, PROMPT, tmp_path)
    for data in ((OTHER_DATASET, IDS), (DATASET, OTHER_IDS)):
        with pytest.raises(UserError):
            trained_on.check_items(*data, PROMPT, tmp_path)


def test_a_model_that_knows_items_by_index_ignores_their_codes(tmp_path):
    begin(tmp_path, model="sasrec")
    trained_on.check_items(DATASET, OTHER_IDS, PROMPT, tmp_path)
    with pytest.raises(UserError):
        trained_on.check_items(OTHER_DATASET, OTHER_IDS, PROMPT, tmp_path)


def test_data_may_change_until_the_first_checkpoint(tmp_path):
    begin(tmp_path, learned=False)
    trained_on.check(OTHER_DATASET, IDS, PROMPT, TRAIN, tmp_path)
    trained_on.save("simgr", OTHER_DATASET, OTHER_IDS, PROMPT, TRAIN, QUALITY, tmp_path)
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    with pytest.raises(UserError):
        trained_on.check(DATASET, IDS, PROMPT, TRAIN, tmp_path)
    np.testing.assert_array_equal(trained_on.kept_semantic_ids(OTHER_DATASET, tmp_path)[0].codes, OTHER_IDS.codes)


def test_semantic_ids_are_kept_from_the_first_checkpoint_on(tmp_path):
    begin(tmp_path, learned=False)
    assert trained_on.kept_semantic_ids(DATASET, tmp_path) is None
    begin(tmp_path)
    trained_on.save("simgr", DATASET, OTHER_IDS, PROMPT, TRAIN, {"collisions": 7}, tmp_path)
    kept, quality = trained_on.kept_semantic_ids(DATASET, tmp_path)
    np.testing.assert_array_equal(kept.codes, IDS.codes)
    assert (kept.codes.dtype, kept.codebook_sizes, quality) == (np.int32, (2, 2), QUALITY)
    with pytest.raises(UserError, match=r"trained_on.json:items: are not those of now"):
        trained_on.kept_semantic_ids(OTHER_DATASET, tmp_path)
    (tmp_path / "semantic_ids.npz").unlink()
    assert trained_on.kept_semantic_ids(DATASET, tmp_path) is None


def test_an_old_run_without_a_record_gets_no_record_of_todays_data(tmp_path):
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    trained_on.save("simgr", DATASET, IDS, PROMPT, TRAIN, QUALITY, tmp_path)
    assert not any((tmp_path / name).exists() for name in trained_on.FILES)


def test_the_record_holds_fingerprints(tmp_path):
    begin(tmp_path, prompt=OTHER_PROMPT)
    record = json.loads((tmp_path / trained_on.FILE_NAME).read_text())
    assert record.keys() == {"items", "semantic_ids", "text_tokens", "training_sequences"}
    assert all(isinstance(value, str) for value in record.values())
