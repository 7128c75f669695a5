"""Turns evaluation cases into the batches that are ranked."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int

from simgr_jax.data.dataset import EvaluationCases, gather
from simgr_jax.inputs.batch import RankBatch
from simgr_jax.inputs.newest_items import NewestItems
from simgr_jax.inputs.prompts import Prompt
from simgr_jax.inputs.render_rows import render_rows


def rank_batches(
    cases: EvaluationCases, prompt: Prompt, batch_size: int, max_items: int, row_length: int
) -> Iterator[tuple[RankBatch, Int[np.ndarray, " C"]]]:
    """Yields batches of `batch_size` cases, and the numbers of these cases. Batches go from the shortest to the longest
    prompts. Prompts hold the newest items of their histories, as training windows do.

    To compute little padding but compile at most three shapes, T is a quarter, half or all of the longest possible
    prompt, whichever is just enough for the batch. Rows with one input fill up the last batch.

    Raises:
      UserError: an item's prompt is longer than `row_length`.
    """
    histories, longest = cases.histories, min(row_length, prompt.longest(max_items))
    starts, ends = histories.offsets[:-1], histories.offsets[1:]
    newest = NewestItems(histories.values, prompt, max_items, row_length)
    begins = newest.begins(starts, ends)
    # One shape for all batches: the longest history, rounded up so that other cases often share it.
    history_width = 1 << int(histories.lengths.max() - 1).bit_length()
    prompt_lengths = newest.lengths(begins, ends)
    order = np.argsort(prompt_lengths, kind="stable")
    for chosen in np.split(order, range(batch_size, len(order), batch_size)):
        count, longest_here = len(chosen), prompt_lengths[chosen[-1]]
        width = next(width for width in (-(-longest // 4), -(-longest // 2), longest) if longest_here <= width)
        lengths, targets = np.ones(batch_size, np.int32), np.zeros(batch_size, np.int32)
        lengths[:count], targets[:count] = prompt_lengths[chosen], cases.targets[chosen]

        positions = np.broadcast_to(np.arange(width), (count, width))
        items, item_ends = gather(histories.values, begins[chosen], ends[chosen])
        inputs = np.zeros((batch_size, width), np.int32)
        inputs[:count], _ = render_rows(items, item_ends, prompt, positions < lengths[:count, None], positions)

        history = np.full((batch_size, history_width), -1, np.int32)
        real = np.arange(history_width) < histories.lengths[chosen, None]
        history[:count][real], _ = gather(histories.values, starts[chosen], ends[chosen])
        yield RankBatch(inputs, lengths, history, targets), chosen
