import jax.numpy as jnp
import numpy as np
from flax import nnx

from simgr_jax.data.dataset import EvaluationCases, Sequences
from simgr_jax.evaluation.ranking import Ranker
from simgr_jax.inputs.prompts import item_prompt
from simgr_jax.ops.top_k import rank_catalog


class LastItem(nnx.Module):
    """Says what came last, and how many inputs the batch had; recommends what is near what came last."""

    def __init__(self):
        self.shift = nnx.Param(jnp.array(100))

    def catalog(self):
        return self.shift[...]

    def last(self, batch, catalog):
        return batch.at_end(batch.inputs) + catalog, jnp.full(len(batch.inputs), batch.inputs.shape[1])

    def rank(self, batch, catalog, k, filter_history):
        distance = jnp.abs(batch.at_end(batch.inputs)[:, None] - jnp.arange(50))
        return rank_catalog(-distance.astype(jnp.float32), batch.targets, k)


def ranked(k=1):
    """A ranker, the model's state, and cases of many lengths, the last item of each its number."""
    lengths = [1, 16, 3, 9, 2, 15, 4]
    histories = Sequences.from_lists([[*range(10, 10 + length - 1), case] for case, length in enumerate(lengths)])
    cases = EvaluationCases(np.arange(7), histories, np.zeros(7, int))
    graphdef, params, rest = nnx.split(LastItem(), nnx.Param, ...)
    ranker = Ranker(
        graphdef, prompt=item_prompt(50), batch_size=2, max_items=16, row_length=64, k=k, filter_history=False
    )
    return ranker, params, rest, cases


def test_answers_are_in_the_order_of_the_cases_whatever_their_lengths():
    ranker, params, rest, cases = ranked()
    last, width = ranker.ask("last", params, rest, cases)
    assert last.tolist() == [100 + case for case in range(7)]
    # In pairs, from the shortest: (1, 2), (3, 4), (9, 15), (16).
    assert width.tolist() == [4, 16, 4, 16, 4, 16, 4]


def test_lists_are_those_of_the_ranking():
    ranker, params, rest, cases = ranked(k=3)
    lists = ranker.lists(params, rest, cases)
    assert lists[:, 0].tolist() == list(range(7))
    np.testing.assert_array_equal(lists, ranker(params, rest, cases).items)
