import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from simgr_jax.data.dataset import EvaluationCases, Sequences
from simgr_jax.evaluation.ranking import Ranker
from simgr_jax.inputs.prompts import item_prompt
from simgr_jax.ops.top_k import rank_catalog, without_history


class LastItem(nnx.Module):
    """Recommends the items whose numbers are nearest to the last item's."""

    def __init__(self, shift=100):
        self.shift = nnx.Param(jnp.array(shift))

    def catalog(self):
        return self.shift[...]

    def last(self, batch, catalog, factor=1):
        """The last item, shifted, and the number of inputs in the batch's rows."""
        return factor * batch.at_end(batch.inputs) + catalog, jnp.full(len(batch.inputs), batch.inputs.shape[1])

    def rank(self, batch, catalog, k, filter_history):
        distance = jnp.abs(batch.at_end(batch.inputs)[:, None] - jnp.arange(50))
        scores = -distance.astype(jnp.float32)
        return rank_catalog(without_history(scores, batch.history) if filter_history else scores, batch.targets, k)


def make_cases():
    """Seven cases with histories of different lengths. A case's last item is the case's number."""
    lengths = [1, 16, 3, 9, 2, 15, 4]
    histories = Sequences.from_lists([[*range(10, 10 + length - 1), case] for case, length in enumerate(lengths)])
    return EvaluationCases(np.arange(7), histories, np.array([0, 2, 2, 2, 2, 2, 10]))


CASES = make_cases()


def make_ranker():
    return Ranker(LastItem(), item_prompt(50), batch_size=2, max_items=16, row_length=64)


def test_answers_are_in_the_order_of_the_cases_whatever_their_lengths():
    last, width = make_ranker().ask(LastItem(), CASES, "last")
    assert last.tolist() == [100 + case for case in range(7)]
    # In pairs, from the shortest: (1, 2), (3, 4), (9, 15), (16).
    assert width.tolist() == [4, 16, 4, 16, 4, 16, 4]


def test_a_question_may_have_options():
    ranker = make_ranker()
    for factor in (1, 3):
        last, _ = ranker.ask(LastItem(), CASES, "last", factor=factor)
        assert last.tolist() == [100 + factor * case for case in range(7)]


def test_each_call_ranks_with_the_model_that_is_given():
    """A ranker only keeps the structure of the model that it was made with."""
    ranker = make_ranker()
    for shift in (100, 7):
        assert ranker.catalog(LastItem(shift)) == shift
        last, _ = ranker.ask(LastItem(shift), CASES, "last")
        assert last.tolist() == [shift + case for case in range(7)]


def test_a_question_is_compiled_once_per_shape(monkeypatch):
    traced, rank = [], LastItem.rank

    def counted(self, batch, catalog, k, filter_history):
        traced.append((k, filter_history))
        return rank(self, batch, catalog, k, filter_history)

    monkeypatch.setattr(LastItem, "rank", counted)
    ranker = make_ranker()
    for _ in range(2):
        for filter_history in (False, True):
            ranker.rank(LastItem(), CASES, 3, filter_history)
    assert traced == [(3, False)] * 2 + [(3, True)] * 2  # Batches have rows of 4 or of 16 inputs.


def test_history_items_are_left_in_or_taken_out():
    ranker = make_ranker()
    left_in, taken_out = (ranker.rank(LastItem(), CASES, 3, filter_history) for filter_history in (False, True))
    assert left_in.items[:, 0].tolist() == list(range(7))
    assert left_in.target_rank[:2].tolist() == [1, 2.5]
    for row, history in enumerate(CASES.histories):
        assert not set(taken_out.items[row].tolist()) & set(history.tolist())
    # The targets of the first, the third and the last case are in their histories.
    assert np.isinf(taken_out.target_rank).tolist() == [True, False, True, False, False, False, True]
    assert taken_out.target_rank[1] == 1.5


@pytest.mark.parametrize("filter_history", [False, True])
def test_lists_are_those_of_the_ranking(filter_history):
    ranker = make_ranker()
    ranking = ranker.rank(LastItem(), CASES, 3, filter_history)
    for catalog in (None, ranker.catalog(LastItem())):
        items, scores = ranker.lists(LastItem(), CASES, 3, filter_history, catalog)
        np.testing.assert_array_equal(items, ranking.items)
        np.testing.assert_array_equal(scores, ranking.scores)
        assert (items.dtype, scores.dtype) == (np.int32, np.float32)
