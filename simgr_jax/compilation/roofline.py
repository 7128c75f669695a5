"""Lower bounds on a step's time, from its cost and a chip's rates (https://jax-ml.github.io/scaling-book/roofline)."""

from __future__ import annotations

from typing import NamedTuple

from simgr_jax.compilation.cost import Cost
from simgr_jax.devices.chips import Chip, ici_bandwidth


class Roofline(NamedTuple):
    """Seconds that each resource of a chip needs at its full rate.

    Attributes:
      compute: the matrix units.
      memory: HBM.
      collectives: all links to other chips together.
    """

    compute: float
    memory: float
    collectives: float

    @property
    def bound(self) -> float:
        """The time with full overlap of the three. No step is faster."""
        return max(self)

    @property
    def serial(self) -> float:
        """The time without any overlap, each at its full rate."""
        return sum(self)


def roofline(cost: Cost, chip: Chip, shape: tuple[int, ...]) -> Roofline:
    """
    Args:
      shape: the slice's sides, in chips.
    """
    ici = ici_bandwidth(chip, shape)
    return Roofline(
        cost.flops / chip.flops,
        cost.memory_bytes / chip.hbm_bandwidth,
        cost.collective_bytes / ici if ici else 0.0,
    )
