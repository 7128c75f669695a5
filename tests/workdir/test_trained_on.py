"""A run continues only with what it learned from, and its model is only asked about the items it knows."""

import json

import pytest

from simgr_jax.errors import UserError
from simgr_jax.workdir import trained_on

FINGERPRINTS = {"items": "a", "semantic_ids": "b", "text_tokens": "c", "training_sequences": "d"}


def begin(workdir, fingerprints=FINGERPRINTS, learned=True):
    trained_on.save(fingerprints, workdir)
    if learned:
        (workdir / "checkpoints" / "10").mkdir(parents=True)


@pytest.mark.parametrize("name", FINGERPRINTS)
def test_a_run_continues_only_with_what_it_began_with(tmp_path, name):
    begin(tmp_path)
    trained_on.check(FINGERPRINTS, tmp_path)
    with pytest.raises(UserError) as caught:
        trained_on.check(FINGERPRINTS | {name: "other"}, tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}/trained_on.json:{name}: have changed since the run here was trained; give the data and the cache "
        "that it was trained with, or train in a new workdir"
    )


def test_only_what_is_asked_about_is_checked(tmp_path):
    """A model takes new interactions, but not other items."""
    begin(tmp_path)
    trained_on.check({"items": "a", "semantic_ids": "b"}, tmp_path)
    with pytest.raises(UserError):
        trained_on.check({"items": "other"}, tmp_path)


def test_what_the_record_lacks_is_not_checked(tmp_path):
    """A model that knows items by index has no semantic IDs in its record."""
    begin(tmp_path, {"items": "a"})
    trained_on.check(FINGERPRINTS, tmp_path)


def test_data_may_change_until_the_first_checkpoint(tmp_path):
    begin(tmp_path, learned=False)
    assert not trained_on.has_learned(tmp_path)
    changed = FINGERPRINTS | {"items": "other"}
    trained_on.check(changed, tmp_path)
    begin(tmp_path, changed)
    assert trained_on.has_learned(tmp_path)
    trained_on.check(changed, tmp_path)
    with pytest.raises(UserError):
        trained_on.check(FINGERPRINTS, tmp_path)


def test_the_record_stays_as_it_was_from_the_first_checkpoint_on(tmp_path):
    begin(tmp_path)
    trained_on.save(FINGERPRINTS | {"items": "other"}, tmp_path)
    assert json.loads((tmp_path / trained_on.FILE_NAME).read_text()) == FINGERPRINTS


def test_a_run_without_a_record_gets_no_record_of_todays_data(tmp_path):
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    trained_on.save(FINGERPRINTS, tmp_path)
    assert not (tmp_path / trained_on.FILE_NAME).exists()
    trained_on.check(FINGERPRINTS, tmp_path)
