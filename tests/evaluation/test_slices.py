import math

import numpy as np
import pytest

from simgr_jax.data.dataset import EvaluationCases, Sequences
from simgr_jax.evaluation import slices

# Item 0 has 4 of 12 interactions, items 1 and 2 have 2 each, items 3 to 6 one each, item 7 none.
TRAIN = Sequences.from_lists([[0, 0, 0, 0, 1, 1], [2, 2, 3, 4, 5, 6]])


def test_popularity_slices_hold_a_third_of_the_interactions_each():
    members = slices.popularity_slices(np.arange(8), TRAIN, num_items=8)
    names = [slices.POPULARITY_SLICES[m] for m in members]
    assert names == ["head", "middle", "middle", "tail", "tail", "tail", "tail", "unseen"]


def test_equally_popular_items_are_in_one_slice():
    train = Sequences.from_lists([np.arange(50)])
    assert set(slices.popularity_slices(np.arange(50), train, num_items=50)) == {3}


def test_history_slices_have_the_lengths_that_their_names_say():
    lengths = [1, 3, 4, 5, 6, 10, 11, 20, 21, 500]
    members = slices.history_slices(Sequences.from_lists([[0] * n for n in lengths]))
    names = [slices.HISTORY_SLICES[m] for m in members]
    assert names == ["1-3", "1-3", "4-5", "4-5", "6-10", "6-10", "11-20", "11-20", "21+", "21+"]


def test_slice_metrics_on_a_hand_made_example():
    cases = EvaluationCases(
        users=np.arange(4),
        histories=Sequences.from_lists([[1], [1] * 3, [1] * 7, [1] * 7]),
        targets=np.array([0, 0, 3, 7]),
    )
    rows = slices.slice_metrics(np.array([1, 11, 3, np.inf]), cases, TRAIN, num_items=8)
    assert [(r["by"], r["slice"], r["num_cases"], r["HR@10"]) for r in rows] == [
        ("target popularity", "unseen", 1, 0.0),
        ("target popularity", "tail", 1, 1.0),
        ("target popularity", "head", 2, 0.5),
        ("history length", "1-3", 2, 0.5),
        ("history length", "6-10", 2, 0.5),
    ]
    assert [r["NDCG@10"] for r in rows] == pytest.approx([0, 1 / math.log2(4), 0.5, 0.5, 0.25])
