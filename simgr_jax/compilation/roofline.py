"""How fast a chip could run a step at best, from what the step costs (https://jax-ml.github.io/scaling-book/roofline)."""

from __future__ import annotations

from typing import NamedTuple

from simgr_jax.compilation.chips import Chip, ici_bandwidth
from simgr_jax.compilation.cost import Cost


class Roofline(NamedTuple):
    """Seconds that each resource of a chip is busy at least, at its full rate.

    Attributes:
      compute: the matrix units.
      memory: HBM.
      collectives: the links to other chips, all of them at once.
    """

    compute: float
    memory: float
    collectives: float

    @property
    def bound(self) -> float:
        """No step is faster: all three at once."""
        return max(self)

    @property
    def serial(self) -> float:
        """One after the other: what a step takes if nothing overlaps and each runs at its full rate."""
        return sum(self)


def roofline(cost: Cost, chip: Chip, shape: tuple[int, ...]) -> Roofline:
    """
    Args:
      shape: of the slice, in chips.
    """
    ici = ici_bandwidth(chip, shape)
    return Roofline(
        cost.flops / chip.flops,
        cost.memory_bytes / chip.hbm_bandwidth,
        cost.collective_bytes / ici if ici else 0.0,
    )
