from __future__ import annotations

import math

import pytest

from simgr_jax.compilation.cost import Cost, Traffic
from simgr_jax.compilation.roofline import roofline
from simgr_jax.devices.chips import CHIPS, ici_bandwidth

V5E, V5P = CHIPS["v5e"], CHIPS["v5p"]


@pytest.mark.parametrize(
    ("name", "documented"),  # "Bidirectional inter-chip interconnect bandwidth per chip" in GB/s.
    [("v5e", 400), ("v5p", 1200), ("v6e", 800)],
)
def test_a_torus_uses_all_links(name, documented):
    chip = CHIPS[name]
    shape = (16, 16) if chip.topologies[-1] == "16x16" else (4, 4, 8)
    assert 2 * ici_bandwidth(chip, shape) == documented * 1e9


def test_chips_at_the_ends_of_an_open_side_have_one_link_less():
    assert ici_bandwidth(V5E, (1, 1)) == 0
    assert ici_bandwidth(V5E, (2, 2)) == 2 * 50e9
    assert ici_bandwidth(V5E, (4, 4)) == 3 * 50e9
    # In 2D, each long enough side closes independently; in 3D, only all sides together.
    assert ici_bandwidth(V5E, (8, 16)) == (2 * 7 / 8 + 2) * 50e9
    assert ici_bandwidth(V5P, (2, 4, 4)) == (1 + 1.5 + 1.5) * 100e9


def test_bounds():
    cost = Cost(flops=197e12, memory_bytes=2 * 819e9, collectives={"all-gather": Traffic(1, 50e9)})
    times = roofline(cost, V5E, (16, 16))
    assert times == (1, 2, 0.25)
    assert times.bound == 2
    assert times.serial == 3.25
    assert roofline(Cost(flops=197e12), V5E, (1, 1)).serial == 1


def test_costs_add_up():
    one = Cost(1, 2, {"all-gather": Traffic(1, 8)}, {"kernel": 1})
    two = Cost(3, 4, {"all-gather": Traffic(2, 8), "all-reduce": Traffic(1, 1)})
    assert one * 3 + two == Cost(6, 10, {"all-gather": Traffic(5, 32), "all-reduce": Traffic(1, 1)}, {"kernel": 3})
    assert math.isclose((one + two).collective_bytes, 17)
