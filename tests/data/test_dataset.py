import dataclasses

import numpy as np

from simgr_jax.data.dataset import EvaluationCases, Sequences


def test_take_gives_the_chosen_cases_in_order():
    cases = EvaluationCases(np.arange(4), Sequences.from_lists([[1], [2, 3], [4], [5, 6]]), np.arange(10, 14))
    assert cases.take([3, 1]).tied is None
    cases = dataclasses.replace(cases, tied=np.array([False, False, True, True]))
    chosen = cases.take([3, 1])
    assert [list(history) for history in chosen.histories] == [[5, 6], [2, 3]]
    assert (list(chosen.users), list(chosen.targets)) == ([3, 1], [13, 11])
    assert list(chosen.tied) == [True, False]
    assert len(chosen) == len(chosen.histories) == 2
