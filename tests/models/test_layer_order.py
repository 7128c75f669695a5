import pytest
from hypothesis import given
from hypothesis import strategies as st

from simgr_jax.models.layer_order import Segment, segments


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=24).map(tuple))
def test_segments_cover_all_layers_in_order_and_each_stack_has_one_kind(kinds):
    found, layers = segments(kinds), []
    for segment in found:
        assert segment.first == len(layers)
        stacks = segment.stacks()
        layers += [stack[turn] for turn in range(segment.repeats) for stack in stacks]
        assert all(len({kinds[layer] for layer in stack}) == 1 for stack in stacks)
    assert layers == list(range(len(kinds)))


@pytest.mark.parametrize(
    ("kinds", "found"),
    [
        ("a" * 40, [Segment(0, 1, 40)]),
        ("dddf" * 8, [Segment(0, 4, 8)]),
        ("ssssf" * 3 + "rrrrg" * 4, [Segment(0, 5, 3), Segment(15, 5, 4)]),
        # LFM2-1.2B's.
        ("ccaccaccacacacac", [Segment(0, 1, 2), Segment(2, 3, 2), Segment(8, 2, 4)]),
    ],
)
def test_periods_are_as_short_as_they_can_be(kinds, found):
    assert segments(tuple(kinds)) == tuple(found)


def test_many_layers_are_divided_at_once():
    assert len(segments(tuple(i * i % 7 for i in range(2000)))) < 2000
