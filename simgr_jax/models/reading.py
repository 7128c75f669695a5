"""The ways in which a decoder reads: packed rows, histories up to their ends, and branches that continue histories.

A layer computes everything for each position on its own, except what it asks of a `Reading`: to mix positions. Each way
of reading knows which positions see each other, and what to keep for positions that come later.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from simgr_jax.models.transformer_config import TransformerConfig
from simgr_jax.ops.attention import attention, branch_attention
from simgr_jax.ops.causal_convolution import causal_convolution, continued_convolution, last_inputs
from simgr_jax.ops.gated_delta_rule import gated_delta_rule


class Cached(NamedTuple):
    """What a layer has kept of the positions before: those of the histories, and of the branches that continue them."""

    history: Any = None
    branches: Any = None

    def part(self, index: int) -> Cached:
        """One of several things that the layer keeps."""
        return Cached(*(None if kept is None else kept[index] for kept in self))


# Keys and values, by the group of layers that share them.
Shared = dict[str, tuple[Float[Array, "B T Hkv head"], Float[Array, "B T Hkv head"]]]


class Layer(NamedTuple):
    """What a layer needs to mix positions, besides its parameters.

    Attributes:
      frequencies, rotary_scale: its rotary positions (see `Rope`).
      windows: every window of the layers in its stack.
      window_index: which of them is its own.
      cached: from an earlier reading.
      shared: the keys and values that layers share, by group. A layer that has its own replaces those of its group.
      per_layer: what this layer reads of the inputs (see `PerLayerInputs`).
    """

    frequencies: Float[Array, " F"]
    rotary_scale: Float[Array, ""]
    windows: tuple[int, ...]
    window_index: Int[Array, ""]
    cached: Cached
    shared: Shared
    per_layer: Float[Array, "B T P"] | None


class Reading:
    """Reads packed rows, and keeps nothing. A position sees only its own segment.

    Attributes:
      positions: position within the segment.
    """

    def __init__(self, config: TransformerConfig, segment_ids: Int[Array, "B T"], positions: Int[Array, "B T"]):
        self.config, self.segment_ids, self.positions = config, segment_ids, positions

    def asked(self, x: Shaped[Array, "B T *D"]) -> Shaped[Array, "B Q *D"]:
        """x at the Q positions whose states are wanted."""
        return x

    def attend(
        self,
        query: Float[Array, "B Q H head"],
        key: Float[Array, "B T Hkv head"],
        value: Float[Array, "B T Hkv head"],
        cached: Cached,
        **options: Any,
    ) -> tuple[Float[Array, "B Q H head"], Any]:
        """Attention, and the keys and values to keep.

        Args:
          query: of the positions that are asked for.
          options: see `ops.attention.attention`.
        """
        causal, implementation = self.config.causal, self.config.attention
        mixed = attention(query, key, value, self.segment_ids, causal=causal, implementation=implementation, **options)
        return mixed, None

    def convolve(
        self, x: Float[Array, "B T C"], kernel: Float[Array, "C K"], cached: Cached
    ) -> tuple[Float[Array, "B T C"], Any]:
        """`causal_convolution`, and the positions to keep that later ones need."""
        return causal_convolution(x, kernel, self.segment_ids), None

    def delta_rule(
        self,
        query: Float[Array, "B T H key"],
        key: Float[Array, "B T H key"],
        value: Float[Array, "B T H value"],
        log_decay: Float[Array, "B T H"],
        beta: Float[Array, "B T H"],
        cached: Cached,
    ) -> tuple[Float[Array, "B Q H value"], Any]:
        """`gated_delta_rule`, at the positions that are asked for, and the state to keep."""
        return gated_delta_rule(query, key, value, log_decay, beta, self.segment_ids)[0], None


class Histories(Reading):
    """Reads histories, which start at the beginning of their rows, and keeps them for `Branches`.

    Args:
      lengths: the length of each history; later positions are padding.
      length: T, of the rows.
    """

    def __init__(self, config: TransformerConfig, lengths: Int[Array, " B"], length: int):
        positions = jnp.broadcast_to(jnp.arange(length), (len(lengths), length))
        super().__init__(config, (positions < lengths[:, None]).astype(jnp.int32), positions)
        self.lengths = lengths

    def attend(self, query, key, value, cached, **options):
        mixed, _ = super().attend(query, key, value, cached, **options)
        return mixed, (key, value)

    def convolve(self, x, kernel, cached):
        return super().convolve(x, kernel, cached)[0], last_inputs(x, self.lengths, kernel.shape[1] - 1)

    def delta_rule(self, query, key, value, log_decay, beta, cached):
        # Padding neither decays nor changes the state.
        is_real = self.segment_ids[..., None] > 0
        log_decay, beta = jnp.where(is_real, log_decay, 0), jnp.where(is_real, beta, 0)
        return gated_delta_rule(query, key, value, log_decay, beta, jnp.ones_like(self.segment_ids))


class HistoryEnds(Histories):
    """Reads histories, and asks only for the state at the end of each."""

    def asked(self, x):
        return _at(x, self.lengths[:, None] - 1)

    def attend(self, query, key, value, cached, **options):
        # The last position is a branch of length 1 that continues the positions before it.
        own = (self.asked(y)[:, None] for y in (key, value))
        mixed = branch_attention(query[:, None], key, value, self.lengths - 1, *own, **options)
        return mixed[:, 0], (key, value)

    def delta_rule(self, query, key, value, log_decay, beta, cached):
        mixed, state = super().delta_rule(query, key, value, log_decay, beta, cached)
        return self.asked(mixed), state


class Branches(Reading):
    """Reads S more positions on each of W branches per history. A branch sees its history and itself. In arrays, the
    branches' positions follow each other: T = W S.

    Args:
      lengths: the length of each history.
      positions: [B, W, S].
    """

    def __init__(self, config: TransformerConfig, lengths: Int[Array, " B"], positions: Int[Array, "B W S"]):
        self.shape = positions.shape
        flat = positions.reshape(len(lengths), -1)
        super().__init__(config, jnp.ones_like(flat), flat)
        self.lengths = lengths

    def attend(self, query, key, value, cached, **options):
        kept = self._by_branch(key), self._by_branch(value)
        if cached.branches is not None:
            kept = tuple(jnp.concatenate(pair, axis=2) for pair in zip(cached.branches, kept, strict=True))
        mixed = branch_attention(self._by_branch(query), *cached.history, self.lengths, *kept, **options)
        return mixed.reshape(query.shape), kept

    def convolve(self, x, kernel, cached):
        mixed, past = continued_convolution(self._rows(x), kernel, self._past(cached))
        return mixed.reshape(x.shape), past.reshape(*self.shape[:2], *past.shape[1:])

    def delta_rule(self, query, key, value, log_decay, beta, cached):
        inputs = map(self._rows, (query, key, value, log_decay, beta, self.segment_ids))
        mixed, state = gated_delta_rule(*inputs, self._past(cached))
        return mixed.reshape(value.shape), state.reshape(*self.shape[:2], *state.shape[1:])

    def _past(self, cached: Cached) -> Shaped[Array, B * W * D]:
        """What each branch, a row of its own, continues."""
        if cached.branches is not None:
            return cached.branches.reshape(-1, *cached.branches.shape[2:])
        return jnp.repeat(cached.history, self.shape[1], axis=0)

    def _rows(self, x: Shaped[Array, "B W*S *D"]) -> Shaped[Array, "B*W S *D"]:
        """The same with a row of its own for each branch."""
        return x.reshape(-1, self.shape[2], *x.shape[2:])

    def _by_branch(self, x: Shaped[Array, "B W*S *D"]) -> Shaped[Array, "B W S *D"]:
        return x.reshape(*self.shape, *x.shape[2:])


def _at(x: Shaped[Array, "B T *D"], places: Int[Array, "B Q"]) -> Shaped[Array, "B Q *D"]:
    return jnp.take_along_axis(x, places.reshape(*places.shape, *(1,) * (x.ndim - 2)), axis=1)
