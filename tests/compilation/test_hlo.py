"""Parses shortened excerpts of the TPU compiler's output."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from simgr_jax.compilation import hlo, loops
from simgr_jax.compilation.collectives import group_size
from simgr_jax.compilation.cost import Traffic, cost


def text(name: str) -> str:
    return (Path(__file__).parent / "hlo" / f"{name}.txt").read_text()


def test_types_operands_and_attributes():
    module = hlo.parse(text("types"))
    assert module.devices == 4
    kernel = module.entry.instructions["kernel.1"]
    assert kernel.type == (
        hlo.Shape("f32", (2, 4)),
        (hlo.Shape("pred", (3,)), hlo.Shape("s4", (8,))),
        hlo.Shape("token", ()),
    )
    assert [array.bytes for array in kernel.arrays] == [32, 3, 4, 0]
    assert kernel.operands == ("p", "p")
    assert kernel.call_target == "tpu_custom_call"
    assert module.entry.instructions["p"].type == hlo.Shape("bf16", (8, 64), memory_space=1)
    assert module.entry.root.operands == ("p", "n")


def test_text_that_is_not_a_module_is_refused():
    with pytest.raises(ValueError, match="not an HLO module"):
        hlo.parse("builtin.module @jit_f {\n}\n")


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,2},{4,6},{1,3},{5,7}}", 2),
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[2,2,2]T(2,1,0)", 2),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", 4),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_0','axis_1'}", 8),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_0':(2)2}", 2),
        ("mesh['axis_0'=1,'axis_1'=2,'axis_2'=4], device_ids=([4,2]T(1,0)) {'axis_1'}", 2),
        ("{}", 8),
    ],
)
def test_group_sizes(groups, size):
    assert group_size(f"channel_id=1, replica_groups={groups}, use_global_device_ids=true", devices=8) == size


def test_groups_in_an_unknown_form_are_an_error():
    with pytest.raises(ValueError, match="replica_groups: unknown form"):
        group_size("channel_id=1, replica_groups=<2 x 4>, use_global_device_ids=true", devices=8)


def test_trip_counts_without_annotations():
    """The inner loop counts up by 2 to a bound that comes from outside both loops."""
    module = hlo.parse(text("nested"))
    loop = module.entry.instructions["loop"]
    assert loops.trip_count(module, module.entry, loop, ()) == 5  # 4, 3, 2, 1, 0
    outer = module.computations["outer"]
    known = loops.invariants(module, module.entry, loop, ())
    assert (known(0), known(1)) == (None, 12)
    assert loops.trip_count(module, outer, outer.instructions["loop"], [known]) == 6  # 1, 3, ..., 11
    assert loops.trip_count(module, outer, outer.instructions["loop"], [None]) is None


def test_a_loop_of_unknown_length_is_reported_as_uncounted():
    unknown = text("nested").replace(
        "%twelve = s32[] constant(12)", '%twelve = s32[] custom-call(), custom_call_target="Ask"'
    )
    assert cost(unknown).uncounted == {"Ask": 1, "loop after its first turn": 5}


def test_fused_products_and_collectives():
    """An all-gather that overlaps with a product, a reduce-scatter, and a batched product as one convolution."""
    found = cost(text("fused"))
    whole = (64 * 128 + 64 * 64) * 4
    assert found.collectives == {
        "all-gather": Traffic(1, 64 * 32 * 2 * 3),
        "reduce-scatter": Traffic(1, whole * 3 / 4),
    }
    one = 2 * 16 * 64 * 32
    # Two outputs times two window positions make four pairs, but only one pair per output meets an input.
    assert found.flops == one + 2 * one
    gathering = (64 * 32 + 64 * 128) * 2
    product = (16 * 64 + 64 * 32) * 2  # Its result stays on the chip.
    scattering = whole + whole / 4
    assert found.memory_bytes == gathering + product + scattering + 2 * product
    assert found.uncounted == {}


def test_attention_kernels_and_kernels_that_state_their_cost():
    # The 4 blocks of 128 queries in a row see 1, 2, 3 and 4 blocks of 128 keys.
    pairs = (1 + 2 + 3 + 4) * 128**2
    one = 2 * 2 * 16 * pairs * 128
    found = cost(text("splash"))
    assert math.isclose(found.flops, (2 + 4 + 3) * one + 1000)
    assert found.uncounted == {"secret": 1}
