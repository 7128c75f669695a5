"""The trie of a catalog's semantic IDs: which codes may follow a given prefix."""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["offsets", "codes", "items"],
    meta_fields=["most_children"],
)
@dataclasses.dataclass(frozen=True)
class Trie:
    """A tree of L levels of codes with the items below its leaves, in O(N L) memory.

    A node at depth l is a distinct prefix of l codes; depth 0 holds only the root. The nodes of a depth are numbered in
    the order of their codes, so a node's children have consecutive numbers and a leaf's items are adjacent.

    A pytree of int32 arrays. An nnx variable can hold one (`variable.get_value()`).

    Attributes:
      offsets: for depth l from 0 to L: the children of node n are the nodes `offsets[l][n]` to `offsets[l][n + 1] - 1`
        of the next depth; at depth L they are positions in `items`.
      codes: for l from 0 to L - 1: the code that leads to each node of depth l + 1.
      items: item indices, leaf by leaf; ascending within a leaf.
      most_children: for depth l from 0 to L, the largest number of children of any node.
    """

    offsets: tuple[Int[Array, " nodes+1"], ...]
    codes: tuple[Int[Array, " nodes"], ...]
    items: Int[Array, " N"]
    most_children: tuple[int, ...]

    @property
    def levels(self) -> int:
        """L."""
        return len(self.codes)


def build(codes: Int[np.ndarray, "N L"], codebook_sizes: tuple[int, ...]) -> Trie:
    """The trie of N items. Several items may have equal codes.

    Args:
      codes: `0 <= codes[:, l] < codebook_sizes[l]`; L is at least 1.

    Raises:
      ValueError: there are no items, or a code is not in its codebook.
    """
    codes = np.asarray(codes)
    if codes.size == 0 or (codes < 0).any() or (codes >= codebook_sizes).any():
        raise ValueError(
            f"codes of shape {codes.shape}: must not be empty and must be from 0 to below {codebook_sizes}"
        )
    order = np.lexsort(codes.T[::-1])  # Stable: items with equal codes stay in index order.
    codes = codes[order]
    # In this order, a node of depth l begins wherever one of the first l codes changes.
    is_start = np.zeros(len(codes), bool)
    is_start[0] = True
    starts = [np.flatnonzero(is_start)]
    for level in codes.T:
        is_start[1:] |= level[1:] != level[:-1]
        starts.append(np.flatnonzero(is_start))
    # Number the items as one more depth.
    starts.append(np.arange(len(codes)))
    offsets = [np.searchsorted(below, [*here, len(codes)]) for here, below in itertools.pairwise(starts)]
    to_array = partial(jnp.asarray, dtype=jnp.int32)
    return Trie(
        offsets=tuple(map(to_array, offsets)),
        codes=tuple(to_array(level[here]) for level, here in zip(codes.T, starts[1:], strict=False)),
        items=to_array(order),
        most_children=tuple(int(np.diff(ends).max()) for ends in offsets),
    )
