"""How a decoder's layers are divided for scanning: layers of equal shape are stacked, and one period of layers is
compiled however often it is repeated."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import NamedTuple

# Published decoders repeat 2 to 6 layers.
_LONGEST_PERIOD = 16


class Segment(NamedTuple):
    """`repeats` times a period of `period` layers.

    Attributes:
      first: the number of its first layer.
    """

    first: int
    period: int
    repeats: int

    def stacks(self) -> list[range]:
        """The layers at each place of the period."""
        stop = self.first + self.period * self.repeats
        return [range(self.first + place, stop, self.period) for place in range(self.period)]


@functools.cache
def segments(kinds: tuple[Hashable, ...]) -> tuple[Segment, ...]:
    """Segments that cover all layers with few layers in all periods together.

    Args:
      kinds: each layer's kind; layers of one kind have parameters of equal shapes.
    """
    count = len(kinds)
    longest = 1 if len(set(kinds)) == 1 else min(count, _LONGEST_PERIOD)
    # agree[period][i]: from layer i on, how many layers are of the same kind as the one `period` layers later.
    agree = {period: [0] * (count + 1) for period in range(1, longest + 1)}
    for period, lengths in agree.items():
        for i in reversed(range(count - period)):
            lengths[i] = lengths[i + 1] + 1 if kinds[i] == kinds[i + period] else 0
    # The cheapest cover of layers i, i + 1, ...: its cost and its first segment.
    best: list[tuple[int, Segment]] = [(0, Segment(count, 0, 0))] * (count + 1)
    for i in reversed(range(count)):
        covers = (
            Segment(i, period, 1 + agree[period][i] // period) for period in range(1, min(longest, count - i) + 1)
        )
        best[i] = min((one.period + best[i + one.period * one.repeats][0], one) for one in covers)
    found, i = [], 0
    while i < count:
        found.append(best[i][1])
        i += found[-1].period * found[-1].repeats
    return tuple(found)
