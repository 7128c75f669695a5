"""Cross-entropy over the full catalog, computed in chunks so that no array holds all item vectors or logits.

Each chunk of items is encoded, scored, and folded into a running maximum and sum, as flash attention
does with keys (Dao et al., arXiv 2205.14135). The backward pass computes each chunk again. Memory therefore grows with
the chunk, not with the catalog; the price is one more product of users and items than in the dense loss.

When several devices split the catalog, each processes its own part and the results are summed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from simgr_jax.devices import sharding
from simgr_jax.ops.similarity_loss import MASKED

Parameters = TypeVar("Parameters")  # A pytree of float arrays.
Items = TypeVar("Items")  # What items are encoded from: a pytree of arrays [N, ...], like their tokens.
Encode = Callable[[Parameters, Items], Float[Array, "C D"]]


# The shares of a device's memory that logits and vectors may take: those of all its items without chunks, and those of
# one chunk. Parameters, gradients and optimizer state need most of the rest.
_DENSE_SHARE, _CHUNK_SHARE = 1 / 4, 1 / 32
# Larger chunks do not fit CPU caches and run slower there.
_LARGEST_CHUNK = 4096


def choose_chunk(num_items: int, num_queries: int, width: int, memory: int) -> int:
    """The number of items to encode and score at once: 0 (all) if memory allows, else a power of two.

    Args:
      num_items, num_queries: per device.
      width: D.
      memory: bytes per device.
    """
    # All float32: logits, their exponentials and gradients; raw and normalised vectors and their gradients.
    item_bytes = 4 * (3 * num_queries + 4 * width)
    if num_items * item_bytes <= _DENSE_SHARE * memory:
        return 0
    return min(_LARGEST_CHUNK, 2 ** int(math.log2(max(1, _CHUNK_SHARE * memory / item_bytes))))


def streamed_cross_entropy(
    encode: Encode,
    parameters: Parameters,
    items: Items,
    num_items: int,
    user_states: Float[Array, "B D"],
    target_vectors: Float[Array, "B D"],
    temperature: Float[Array, ""] | float,
    label_smoothing: float,
    chunk: int,
) -> Float[Array, " B"]:
    """Same value and gradients as `similarity_loss.full_catalog_cross_entropy`, over all items.

    If the context's mesh splits the catalog, each device encodes and scores its own part, for the rows that its copy of
    the catalog serves. N must then be a multiple of the number of parts.

    Args:
      encode: a pure function from `parameters` and some of `items` to their vectors, float32 and in the similarity's
        space. An item's vector must not depend on the other items of the call. Everything to be learned must be in
        `parameters`: values that `encode` closes over get no gradient and must not be traced. Gradients are summed
        over chunks, so compute what all items share beforehand.
      items: what the N items are encoded from. It gets no gradient.
      num_items: the first `num_items` rows of `items` are items; later rows are padding and are ignored.
      target_vectors: the output of `encode` for each row's target.
      chunk: the most items that a device encodes and scores at once; 0 means all, whose logits are then kept for the
        backward pass.
    """
    scaled = user_states / temperature
    if jax.sharding.get_abstract_mesh().empty:
        log_normalizer, vector_sum = _summary(encode, chunk, parameters, items, jnp.int32(num_items), scaled)
        mean_logits = scaled @ vector_sum / num_items
    else:
        log_normalizer, mean_logits = _sharded(encode, chunk, parameters, items, num_items, scaled)
    target_logits = jnp.sum(scaled * target_vectors, axis=-1)
    return log_normalizer - (1 - label_smoothing) * target_logits - label_smoothing * mean_logits


def _sharded(
    encode: Encode,
    chunk: int,
    parameters: Parameters,
    items: Items,
    num_items: int,
    queries: Float[Array, "B D"],
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """(log-normaliser, mean logit) of each query, combined from all devices' parts of the catalog."""
    by_item, by_query = sharding.spec("items"), sharding.spec("queries")
    parts = by_item[0]

    def of_part(parameters, items, queries):
        count = jnp.clip(num_items - jax.lax.axis_index(parts) * _rows(items), 0, _rows(items))
        # Marked as varying between devices, so that shard_map sums their gradients.
        own_parameters = jax.lax.pcast(parameters, jax.sharding.get_abstract_mesh().axis_names, to="varying")
        own_queries = jax.lax.pcast(queries, parts, to="varying")
        log_normalizer, vector_sum = _summary(encode, chunk, own_parameters, items, count, own_queries)
        largest = jax.lax.pmax(jax.lax.stop_gradient(log_normalizer), parts)
        log_normalizer = largest + jnp.log(jax.lax.psum(jnp.exp(log_normalizer - largest), parts))
        return log_normalizer, queries @ jax.lax.psum(vector_sum, parts) / num_items

    in_specs = (PartitionSpec(), by_item, by_query)
    return jax.shard_map(of_part, in_specs=in_specs, out_specs=(by_query, by_query))(parameters, items, queries)


def _summary(
    encode: Encode,
    chunk: int,
    parameters: Parameters,
    items: Items,
    count: Int[Array, ""],
    queries: Float[Array, "B D"],
) -> tuple[Float[Array, " B"], Float[Array, " D"]]:
    """What cross-entropy needs from the first `count` items: (log Σ_i exp(q·v_i) for each query q, Σ_i v_i)."""
    if chunk:
        return _streamed_summary(encode, chunk, parameters, items, count, queries)
    vectors = encode(parameters, items)
    real = jnp.arange(_rows(items)) < count
    logits = jnp.where(real, queries @ vectors.T, MASKED)
    return jax.nn.logsumexp(logits, axis=-1), real.astype(vectors.dtype) @ vectors


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _streamed_summary(encode, chunk, parameters, items, count, queries):
    def fold(carry, index):
        maximum, total, vector_sum = carry
        chunk_items, fresh = _chunk(items, count, chunk, index)
        vectors = encode(parameters, chunk_items)
        logits = jnp.where(fresh, queries @ vectors.T, MASKED)
        new_maximum = jnp.maximum(maximum, jnp.max(logits, axis=1))
        exponentials = jnp.exp(logits - new_maximum[:, None])
        total = total * jnp.exp(maximum - new_maximum) + jnp.sum(exponentials, axis=1)
        return (new_maximum, total, vector_sum + fresh.astype(vectors.dtype) @ vectors), None

    zeros = jnp.zeros_like(queries)
    start = (zeros[:, 0] + MASKED, zeros[:, 0], zeros[0])
    (maximum, total, vector_sum), _ = jax.lax.scan(fold, start, jnp.arange(_num_chunks(items, chunk)))
    return maximum + jnp.log(total), vector_sum


def _forward(encode, chunk, parameters, items, count, queries):
    summary = _streamed_summary(encode, chunk, parameters, items, count, queries)
    return summary, (parameters, items, count, queries, summary[0])


def _backward(encode, chunk, residuals, gradients):
    """∂/∂q = g Σ_i p_i v_i and ∂/∂v_i = Σ_q g_q p_qi q + ∂sum, with p recomputed from the normaliser."""
    parameters, items, count, queries, log_normalizer = residuals
    d_normalizer, d_sum = gradients
    weighted_queries = (queries * d_normalizer[:, None]).T

    def accumulate(carry, index):
        d_parameters, mean_vectors = carry
        chunk_items, fresh = _chunk(items, count, chunk, index)
        vectors, pull_back = jax.vjp(lambda p: encode(p, chunk_items), parameters)
        logits = jnp.where(fresh, queries @ vectors.T, MASKED)
        probabilities = jnp.exp(logits - log_normalizer[:, None])
        mean_vectors += probabilities @ vectors
        # Transpose the product: transposing the probabilities is slow on CPU.
        d_vectors = (weighted_queries @ probabilities).T + fresh[:, None] * d_sum
        (d_chunk,) = pull_back(d_vectors)
        return (jax.tree.map(jnp.add, d_parameters, d_chunk), mean_vectors), None

    start = (jax.tree.map(jnp.zeros_like, parameters), jnp.zeros_like(queries))
    (d_parameters, mean_vectors), _ = jax.lax.scan(accumulate, start, jnp.arange(_num_chunks(items, chunk)))
    return d_parameters, None, None, mean_vectors * d_normalizer[:, None]


_streamed_summary.defvjp(_forward, _backward)


def _rows(items: Items) -> int:
    return len(jax.tree.leaves(items)[0])


def _num_chunks(items: Items, chunk: int) -> int:
    return -(-_rows(items) // chunk)


def _chunk(items: Items, count: Int[Array, ""], chunk: int, index: Int[Array, ""]) -> tuple[Items, Bool[Array, " C"]]:
    """The index-th chunk, and a mask of its rows that are items and in no earlier chunk.

    The last chunk overlaps the one before so that it is full: padding would copy all items.
    """
    size = -(-_rows(items) // _num_chunks(items, chunk))
    start = jnp.minimum(index * size, _rows(items) - size)
    rows = start + jnp.arange(size)
    sliced = jax.tree.map(lambda array: jax.lax.dynamic_slice_in_dim(array, start, size), items)
    return sliced, (rows >= index * size) & (rows < count)
