"""The gated delta rule, a linear attention whose state forgets and corrects itself (Gated Delta Networks,
https://arxiv.org/abs/2412.06464)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from simgr_jax.devices import sharding

# Positions that are computed at once, by matrix products; from one chunk to the next, the state is passed on.
_CHUNK = 64


def gated_delta_rule(
    query: Float[Array, "B T H key"],
    key: Float[Array, "B T H key"],
    value: Float[Array, "B T H value"],
    log_decay: Float[Array, "B T H"],
    beta: Float[Array, "B T H"],
    segment_ids: Int[Array, "B T"],
    state: Float[Array, "B H key value"] | None = None,
) -> tuple[Float[Array, "B T H value"], Float[Array, "B H key value"]]:
    """For each head, with a state S that is zero at each segment's beginning (equation 10 of the paper):

        S[t] = exp(log_decay[t]) (I - beta[t] key[t] key[t]^T) S[t-1] + beta[t] key[t] value[t]^T
        output[t] = S[t]^T query[t]

    In chunks as in the paper's section 3.3, in float32. The memory grows with T, the number of steps with T / 64.

    Args:
      log_decay: at most 0.
      beta: how much of what the state says of a key is replaced by the value, in [0, 1].
      segment_ids: a segment's positions follow each other.
      state: that of the row's first segment before the row; None is zero.

    Returns:
      The outputs, in the values' dtype, and the state after the last position, float32.
    """
    if state is None:
        state = jnp.zeros((len(key), *key.shape[2:], value.shape[-1]), jnp.float32)
    heads = "heads" if key.shape[2] % sharding.shards("heads") == 0 else None
    by_head, by_row, of_state = (
        sharding.spec(*axes) for axes in (("batch", None, heads, None), ("batch", None), ("batch", heads, None, None))
    )
    of_gate = sharding.spec("batch", None, heads)
    # Heads and rows do not depend on each other: each device computes its own.
    compute = sharding.per_device(
        _in_chunks, (by_head, by_head, by_head, of_gate, of_gate, by_row, of_state), (by_head, of_state)
    )
    with jax.default_matmul_precision("float32"):
        return compute(query, key, value, log_decay, beta, segment_ids, state)


def _in_chunks(query, key, value, log_decay, beta, segment_ids, state):
    batch, length, heads, _ = key.shape
    size = min(_CHUNK, length)
    padding = -length % size

    def chunks(x: Array, **how) -> Array:
        """[N, B, H, size, ...] of [B, T, H, ...]. Padding changes no state."""
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2), **how)
        return jnp.moveaxis(jnp.moveaxis(x, 2, 1).reshape(batch, x.shape[2], -1, size, *x.shape[3:]), 2, 0)

    outputs_dtype = value.dtype
    query, key, value, log_decay, beta = (chunks(x.astype(jnp.float32)) for x in (query, key, value, log_decay, beta))
    segments = chunks(segment_ids[:, :, None], mode="edge")
    # The segment of the position before each chunk.
    before = jnp.concatenate([segments[:1, ..., :1], segments[:-1, ..., -1:]])
    continues = segments == before

    decay = jnp.cumsum(log_decay, axis=-1)  # Since the chunk's beginning.
    order = jnp.arange(size)
    sees = (order[:, None] >= order) & (segments[..., :, None] == segments[..., None, :])
    between = jnp.exp(jnp.where(sees, decay[..., :, None] - decay[..., None, :], -jnp.inf))
    since_before = jnp.where(continues, jnp.exp(decay), 0)
    to_end = between[..., -1, :]

    # What position i writes depends on what those before it in the chunk write: a unit triangular system.
    product = functools.partial(jnp.einsum, "...id,...jd->...ij")
    system = beta[..., None] * product(key, key) * jnp.where(order[:, None] > order, between, 0)
    written = beta[..., None] * jnp.concatenate([value, key * since_before[..., None]], axis=-1)
    written = _unit_lower_inverse(system) @ written
    own, read_before = written[..., : value.shape[-1]], written[..., value.shape[-1] :]

    def step(state, chunk):
        own, read_before, within, query, key, kept = chunk
        written = own - read_before @ state
        output = query @ state + within @ written
        return state * kept + jnp.swapaxes(key, -1, -2) @ written, output

    chunked = (
        own,
        read_before,
        product(query, key) * between,
        query * since_before[..., None],
        key * to_end[..., None],
        since_before[..., -1, None, None],
    )
    state, outputs = jax.lax.scan(step, state, chunked)
    outputs = jnp.moveaxis(outputs, 0, 2).reshape(batch, heads, -1, outputs.shape[-1])[:, :, :length]
    return jnp.swapaxes(outputs, 1, 2).astype(outputs_dtype), state


def _unit_lower_inverse(below: Float[Array, "*B C C"]) -> Float[Array, "*B C C"]:
    """The inverse of I + `below`, which is strictly lower triangular, by blocks of twice the size each time:
    [[A, 0], [C, B]] has the inverse [[A', 0], [-B' C A', B']].

    On CPUs, `jax.scipy.linalg.solve_triangular` hangs: a batch of systems waits for threads of the pool that it runs
    in, so as many solutions at once as there are cores wait for each other for ever (jaxlib 0.10).
    """
    order = jnp.arange(below.shape[-1])
    inverse = jnp.broadcast_to(jnp.eye(len(order), dtype=below.dtype), below.shape)
    width = 1
    while width < len(order):
        block = order // width
        is_joined = (block[:, None] == block + 1) & (block[:, None] % 2 == 1)
        inverse -= inverse @ jnp.where(is_joined, below, 0) @ inverse
        width *= 2
    return inverse
