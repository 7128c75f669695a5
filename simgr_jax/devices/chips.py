"""The resources of each TPU generation and the links between its chips.

Numbers are from https://cloud.google.com/tpu/docs (pages v4, v5e, v5p and v6e), and v4's 6 links of 50 GB/s from "TPU
v4" (https://arxiv.org/abs/2304.01433, Table 4). "Bidirectional bandwidth per chip" there counts both directions of all
links.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """
    Attributes:
      name: the prefix of topology names, e.g. "v5e".
      device_kind: JAX's name.
      hbm_gib: memory; the runtime takes up to 1.25 GiB of it.
      flops: operations per second of bfloat16 matrix products; by default, XLA also rounds float32 ones to bfloat16.
      hbm_bandwidth: bytes per second.
      link_bandwidth: bytes per second that a chip can send over one link to a neighbour.
      ring: a side of a slice is closed to a ring if its length is a multiple of this; else its ends are not linked.
      topologies: the documented shapes of slices, up to a few hundred chips.
    """

    name: str
    device_kind: str
    hbm_gib: float
    flops: float
    hbm_bandwidth: float
    link_bandwidth: float
    ring: int
    topologies: tuple[str, ...]


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")

CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "TPU v4", 32, 275e12, 1200e9, 50e9, 4, _CUBES),
        Chip("v5e", "TPU v5 lite", 16, 197e12, 819e9, 50e9, 16, _FLAT),
        Chip("v5p", "TPU v5", 95, 459e12, 2765e9, 100e9, 4, _CUBES),
        Chip("v6e", "TPU v6 lite", 32, 918e12, 1600e9, 100e9, 16, _FLAT),
    )
}


def ici_bandwidth(chip: Chip, shape: tuple[int, ...]) -> float:
    """Bytes per second that a chip of a slice can send over all its links together; 0 for a single chip.

    This is the mean over the chips: where a side is not a ring, the chips at its ends have one link less.
    """
    whole = [side % chip.ring == 0 for side in shape]
    # The 2D generations close each side independently; the 3D ones close either all three sides or none.
    rings = whole if len(shape) == 2 else [all(whole)] * len(shape)
    links = sum(2 if ring else 2 * (side - 1) / side for side, ring in zip(shape, rings, strict=True))
    return links * chip.link_bandwidth
