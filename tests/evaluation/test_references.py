import numpy as np

from simgr_jax.data.dataset import EvaluationCases, Sequences
from simgr_jax.evaluation import references
from simgr_jax.evaluation.protocols import FILTERED, LEFT_IN

TRAIN = Sequences.from_lists([[0, 0, 0, 1, 1, 2]])
CASES = EvaluationCases(np.arange(3), Sequences.from_lists([[0], [0, 1, 0], [4]]), np.array([1, 2, 4]))


class World:
    """Items are the likelier the higher their number."""

    def next_item_probabilities(self, histories):
        return np.tile(np.arange(1, 7) / 21, (len(histories), 1))


def test_popularity_is_ranked_by_both_protocols():
    rankings = references.reference_rankings(TRAIN, 6, CASES, 3, None)
    assert list(rankings) == ["popularity"]
    left_in, filtered = rankings["popularity"][LEFT_IN], rankings["popularity"][FILTERED]
    assert left_in.items.tolist() == [[0, 1, 2]] * 3
    assert left_in.target_rank.tolist() == [2, 3, 5]
    assert filtered.items.tolist() == [[1, 2, 3], [2, 3, 4], [0, 1, 2]]
    assert filtered.target_rank.tolist() == [1, 1, np.inf]


def test_the_oracle_is_ranked_by_both_protocols(tmp_path, monkeypatch):
    """In batches of two cases, of which the last is not full."""
    monkeypatch.setattr(references, "_ORACLE_BATCH", 2)
    monkeypatch.setattr(references.synthetic, "oracle", lambda folder: World())
    oracle = references.reference_rankings(TRAIN, 6, CASES, 3, tmp_path)["oracle"]
    assert oracle[LEFT_IN].items.tolist() == [[5, 4, 3]] * 3
    assert oracle[LEFT_IN].target_rank.tolist() == [5, 4, 2]
    assert oracle[FILTERED].items.tolist() == [[5, 4, 3], [5, 4, 3], [5, 3, 2]]
    assert oracle[FILTERED].target_rank.tolist() == [5, 4, np.inf]
