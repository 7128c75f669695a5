import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from simgr_jax.ops import trie as tries

SIZES = (3, 2, 4)


@st.composite
def catalogs(draw):
    """int [N, 3]; rows may repeat."""
    return np.array(draw(st.lists(st.tuples(*(st.integers(0, size - 1) for size in SIZES)), min_size=1, max_size=30)))


def walk(trie, depth=0, node=0):
    """(codes, items) of every leaf below a node."""
    offsets = np.asarray(trie.offsets[depth])
    for child in range(offsets[node], offsets[node + 1]):
        if depth == trie.levels:
            yield (), [int(trie.items[child])]
        else:
            for codes, items in walk(trie, depth + 1, child):
                yield (int(trie.codes[depth][child]), *codes), items


@settings(deadline=None)
@given(catalogs())
def test_leaves_hold_the_items_sorted_by_codes_and_then_by_index(codes):
    leaves = [(path, item) for path, items in walk(tries.build(codes, SIZES)) for item in items]
    assert leaves == sorted((tuple(row), item) for item, row in enumerate(codes.tolist()))


@settings(deadline=None)
@given(catalogs())
def test_a_node_is_a_distinct_prefix_with_at_least_one_child(codes):
    trie = tries.build(codes, SIZES)
    for depth in range(1, 4):
        assert len(trie.codes[depth - 1]) == len(np.unique(codes[:, :depth], axis=0))
    for offsets, most in zip(trie.offsets, trie.most_children, strict=True):
        children = np.diff(offsets)
        assert children.min() >= 1 and children.max() == most


def test_memory_does_not_depend_on_the_size_of_the_codebooks():
    codes = np.random.default_rng(0).integers(0, 50_000, (40, 3))
    trie = tries.build(codes, (50_000, 60_000, 70_000))
    leaves = jax.tree.leaves(trie)
    assert sum(leaf.size for leaf in leaves) <= 2 * 40 * 4
    assert {leaf.dtype for leaf in leaves} == {np.dtype(np.int32)}


def test_a_variable_can_hold_a_trie_and_pass_it_through_jit():
    class Model(nnx.Module):
        def __init__(self):
            self.trie = nnx.Variable(tries.build(np.array([[2, 1, 3], [0, 1, 1]]), SIZES))

    graphdef, state = nnx.split(Model())
    trie = jax.jit(lambda state: nnx.merge(graphdef, state).trie.get_value())(state)
    assert list(walk(trie)) == [((0, 1, 1), [1]), ((2, 1, 3), [0])]


@pytest.mark.parametrize("codes", [np.zeros((0, 3), int), np.array([[0, 2, 0]]), np.array([[0, 0, -1]])])
def test_an_empty_catalog_and_codes_outside_their_codebook_are_refused(codes):
    with pytest.raises(ValueError, match="codes"):
        tries.build(codes, SIZES)
