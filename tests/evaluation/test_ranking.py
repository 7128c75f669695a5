import jax.numpy as jnp
import numpy as np
from flax import nnx

from simgr_jax.data.dataset import EvaluationCases, Sequences
from simgr_jax.data.prompts import item_prompt
from simgr_jax.evaluation.ranking import Ranker


class LastItem(nnx.Module):
    """Says what came last, and how many inputs the batch had."""

    def __init__(self):
        self.shift = nnx.Param(jnp.array(100))

    def catalog(self):
        return self.shift[...]

    def last(self, batch, catalog):
        return batch.at_end(batch.inputs) + catalog, jnp.full(len(batch.inputs), batch.inputs.shape[1])


def test_answers_are_in_the_order_of_the_cases_whatever_their_lengths():
    lengths = [1, 16, 3, 9, 2, 15, 4]
    histories = Sequences.from_lists([[*range(10, 10 + length - 1), case] for case, length in enumerate(lengths)])
    cases = EvaluationCases(np.arange(7), histories, np.zeros(7, int))
    graphdef, params, rest = nnx.split(LastItem(), nnx.Param, ...)
    ranker = Ranker(
        graphdef, prompt=item_prompt(50), batch_size=2, max_items=16, row_length=64, k=1, filter_history=False
    )
    last, width = ranker.ask("last", params, rest, cases)
    assert last.tolist() == [100 + case for case in range(7)]
    # In pairs, from the shortest: (1, 2), (3, 4), (9, 15), (16).
    assert width.tolist() == [4, 16, 4, 16, 4, 16, 4]
