import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simgr_jax.data.dataset import EvaluationCases, Sequences
from simgr_jax.errors import UserError
from simgr_jax.inputs.prompts import item_prompt, token_prompt
from simgr_jax.inputs.rank_batches import rank_batches
from tests.inputs.examples import distinct_items, newest, prompts, rendered


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=20),
    batch_size=st.integers(1, 7),
    max_items=st.integers(1, 8),
    prompt=prompts(),
    extra=st.integers(0, 20),
)
def test_prompts_keep_the_newest_items_and_histories_keep_all(lengths, batch_size, max_items, prompt, extra):
    histories, row_length = distinct_items(lengths), prompt.longest(1) + extra
    cases = EvaluationCases(np.arange(len(lengths)), histories, np.arange(len(lengths)) + 1000)
    longest = min(row_length, len(prompt.prefix) - prompt.merged + max_items * prompt.pieces.lengths.max())
    history_width = 2 ** math.ceil(math.log2(max(lengths)))
    seen, before = [], 0
    for batch, chosen in rank_batches(cases, prompt, batch_size, max_items, row_length):
        width, count = batch.inputs.shape[1], len(chosen)
        assert batch.inputs.shape == (batch_size, width)
        assert batch.history.shape == (batch_size, history_width)
        assert batch.lengths.shape == batch.targets.shape == (batch_size,)
        assert all(array.dtype == np.int32 for array in batch)
        assert batch.lengths.min() >= 1
        assert (batch.history[count:] == -1).all()
        for i, case in enumerate(chosen):
            items = histories[case].tolist()
            inputs, _ = rendered(prompt, newest(prompt, items, max_items, row_length))
            assert batch.lengths[i] == len(inputs) >= before
            assert batch.inputs[i].tolist() == inputs + [0] * (width - len(inputs))
            # Also the items that are too old for the prompt.
            assert batch.history[i].tolist() == items + [-1] * (history_width - len(items))
            assert batch.targets[i] == 1000 + case
            before = len(inputs)
        assert width == min(w for w in (math.ceil(longest / 4), math.ceil(longest / 2), longest) if w >= before)
        seen.extend(chosen)
    assert sorted(seen) == list(range(len(lengths)))


@pytest.mark.parametrize(("longest", "width"), [(1, 1), (2, 2), (3, 4), (5, 8), (8, 8), (9, 16)])
def test_the_width_of_histories_is_a_power_of_two(longest, width):
    """So that other cases often share the shape, and nothing compiles again. It does not depend on `max_items`."""
    cases = EvaluationCases(np.arange(2), distinct_items([longest, 1]), np.zeros(2))
    for batch, _ in rank_batches(cases, item_prompt(longest + 1), 1, 2, 64):
        assert batch.history.shape == (1, width)


def test_an_item_that_no_row_can_hold_is_refused():
    cases = EvaluationCases(np.zeros(1), Sequences.from_lists([[0, 1, 2]]), np.zeros(1))
    message = r"^config\.training\.row_length: 3 is too short for the item with the longest prompt, 4 tokens; give"
    with pytest.raises(UserError, match=message):
        next(rank_batches(cases, token_prompt(np.arange(12).reshape(3, 4)), 2, 5, 3))
