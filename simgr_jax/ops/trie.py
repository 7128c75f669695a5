"""The trie of a catalog's semantic IDs: which codes may follow which."""

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
    """A tree of L levels of codes, then the items, in O(N L) memory.

    A node at depth l is a distinct beginning of l codes; depth 0 is the root alone. The nodes of a depth are numbered
    in the order of their codes, so the children of one node have consecutive numbers, and the items of one leaf lie
    together.

    A pytree whose leaves are arrays of int32, the same for all who hold it; a variable's value, too
    (`variable.get_value()`).

    Attributes:
      offsets: for depth l from 0 to L: the children of node n are the nodes `offsets[l][n]` to `offsets[l][n + 1] - 1`
        of the next depth; after the last depth, places in `items`.
      codes: for l from 0 to L - 1: the code that leads to each node of depth l + 1.
      items: a leaf's items in the order of their index.
      most_children: for depth l from 0 to L, the most that any node has.
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
    """The trie of N items, which may share codes.

    Args:
      codes: `0 <= codes[:, l] < codebook_sizes[l]`, L at least 1.

    Raises:
      ValueError: there are no items, or a code is not in its codebook.
    """
    codes = np.asarray(codes)
    if codes.size == 0 or (codes < 0).any() or (codes >= codebook_sizes).any():
        raise ValueError(f"codes of shape {codes.shape} must be below {codebook_sizes}, and there must be some")
    order = np.lexsort(codes.T[::-1])  # Stable: items of equal codes stay in the order of their index.
    codes = codes[order]
    # In this order, a node of depth l begins wherever one of the first l codes changes.
    is_start = np.zeros(len(codes), bool)
    is_start[0] = True
    starts = [np.flatnonzero(is_start)]
    for level in codes.T:
        is_start[1:] |= level[1:] != level[:-1]
        starts.append(np.flatnonzero(is_start))
    # The items are numbered like a depth of their own.
    starts.append(np.arange(len(codes)))
    offsets = [np.searchsorted(below, [*here, len(codes)]) for here, below in itertools.pairwise(starts)]
    to_array = partial(jnp.asarray, dtype=jnp.int32)
    return Trie(
        offsets=tuple(map(to_array, offsets)),
        codes=tuple(to_array(level[here]) for level, here in zip(codes.T, starts[1:], strict=False)),
        items=to_array(order),
        most_children=tuple(int(np.diff(ends).max()) for ends in offsets),
    )
