import dataclasses

import numpy as np
import pytest

from simgr_jax.data.dataset import EvaluationCases, Sequences
from simgr_jax.errors import UserError
from simgr_jax.evaluation import saved_ranking
from simgr_jax.evaluation.protocols import FILTERED, LEFT_IN
from simgr_jax.ops.top_k import Ranking

CASES = EvaluationCases(np.array([3, 3, 5], np.int32), Sequences.from_lists([[1]] * 3), np.array([7, 8, 9], np.int32))


ITEMS = np.arange(36).reshape(3, 12)
RANKS = np.array([1, 2.5, np.inf])


def write(report, cases=CASES):
    scores = np.zeros((3, 12), np.float32)
    rankings = {LEFT_IN: Ranking(ITEMS, scores, RANKS), FILTERED: Ranking(ITEMS[::-1], scores, RANKS[::-1])}
    saved_ranking.write(report, rankings, cases)
    return saved_ranking.read(report)


def test_what_is_read_is_what_was_written(tmp_path):
    found = write(tmp_path / "report")
    assert found.items.tolist() == ITEMS.tolist() and found.items.dtype == np.int32
    assert found.target_rank.tolist() == [1, 2.5, np.inf] and found.target_rank.dtype == np.float32
    assert found.filtered_items.tolist() == ITEMS[::-1].tolist() and found.filtered_items.dtype == np.int32
    assert found.filtered_target_rank.tolist() == [np.inf, 2.5, 1] and found.filtered_target_rank.dtype == np.float32
    by_protocol = found.by_protocol()
    assert list(by_protocol) == [LEFT_IN, FILTERED]
    for protocol, (ranks, items) in {LEFT_IN: (RANKS, ITEMS), FILTERED: (RANKS[::-1], ITEMS[::-1])}.items():
        np.testing.assert_array_equal(by_protocol[protocol][0], ranks)
        np.testing.assert_array_equal(by_protocol[protocol][1], items)
    assert (found.users.tolist(), found.targets.tolist()) == ([3, 3, 5], [7, 8, 9])


@pytest.mark.parametrize("change", [{"users": np.array([3, 4, 5])}, {"targets": np.array([7, 8, 8])}])
def test_other_users_or_targets_are_other_cases(tmp_path, change):
    found = write(tmp_path)
    assert found.is_of(CASES)
    assert not found.is_of(dataclasses.replace(CASES, **change))
    assert not found.is_of(CASES.take([0, 1]))


@pytest.mark.parametrize("damage", ["missing", "cut off", "of another version"])
def test_a_file_that_cannot_be_read_says_how_to_get_a_new_one(tmp_path, damage):
    file = tmp_path / "ranking.npz"
    if damage != "missing":
        np.savez(file, items=np.zeros((3, 10)), target_rank=np.ones(3))
    if damage == "cut off":
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError) as error:
        saved_ranking.read(tmp_path)
    message = f"{file}: is missing, damaged or of another version; run simgr_jax.evaluate --workdir={tmp_path.parent}"
    assert str(error.value) == message
