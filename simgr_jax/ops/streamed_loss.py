"""Cross-entropy over a catalog whose item vectors and logits never exist at once.

Item vectors are made from their codes a chunk at a time, scored, and folded into a running maximum and sum, as flash
attention does with keys (Dao et al., arXiv 2205.14135); the backward pass makes each chunk again. So memory grows with
the chunk, not with the catalog, for one more product of users and items than the dense loss takes.

Over devices that split the catalog, each goes through its own part, and what comes of the parts is added up.
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

from simgr_jax import sharding
from simgr_jax.ops.similarity_loss import MASKED

Parameters = TypeVar("Parameters")  # A pytree of float arrays.
Encode = Callable[[Parameters, Int[Array, "C L"]], Float[Array, "C D"]]


# Of a device's memory: how much the logits and vectors of all its items may take before they are made by chunks, and
# how much those of a chunk may. The parameters, their gradients and the optimizer's state want the most of it.
_DENSE_SHARE, _CHUNK_SHARE = 1 / 4, 1 / 32
# Larger ones no longer fit the caches of CPUs, and are slower there.
_LARGEST_CHUNK = 4096


def choose_chunk(num_items: int, num_queries: int, width: int, memory: int) -> int:
    """How many items to encode and score at once: 0 for all, if there is room for it, else a power of two.

    Args:
      num_items, num_queries: of a device.
      width: D.
      memory: of a device, in bytes.
    """
    # Logits, their exponentials and gradient; vectors, normalised and not, and their gradients. All float32.
    item_bytes = 4 * (3 * num_queries + 4 * width)
    if num_items * item_bytes <= _DENSE_SHARE * memory:
        return 0
    return min(_LARGEST_CHUNK, 2 ** int(math.log2(max(1, _CHUNK_SHARE * memory / item_bytes))))


def streamed_cross_entropy(
    encode: Encode,
    parameters: Parameters,
    tokens: Int[Array, "N L"],
    num_items: int,
    user_states: Float[Array, "B D"],
    target_vectors: Float[Array, "B D"],
    temperature: Float[Array, ""] | float,
    label_smoothing: float,
    chunk: int,
) -> Float[Array, " B"]:
    """`similarity_loss.full_catalog_cross_entropy` of the items that `tokens` spell: same value, same gradients.

    Where the context's mesh splits the catalog, each device encodes and scores its own part of it, for the rows that
    its copy of the catalog serves. N must then be a multiple of the parts.

    Args:
      encode: a pure function from `parameters` and the tokens of some items to their vectors, float32 and in the
        similarity's space. An item's vector may not depend on what other items it is encoded with. All that is to be
        learned must be in `parameters`: what `encode` closes over gets no gradient, and must not be traced. Their
        gradient is added up over chunks, so what all items share is better computed before.
      num_items: rows of `tokens` that are items; those after them are padding, and don't count.
      target_vectors: what `encode` makes of each row's target.
      chunk: items, of each device's, that are encoded and scored at once, at most; 0 is all, whose logits are then
        kept for the backward pass.
    """
    scaled = user_states / temperature
    if jax.sharding.get_abstract_mesh().empty:
        log_normalizer, vector_sum = _summary(encode, chunk, parameters, tokens, jnp.int32(num_items), scaled)
        mean_logits = scaled @ vector_sum / num_items
    else:
        log_normalizer, mean_logits = _sharded(encode, chunk, parameters, tokens, num_items, scaled)
    target_logits = jnp.sum(scaled * target_vectors, axis=-1)
    return log_normalizer - (1 - label_smoothing) * target_logits - label_smoothing * mean_logits


def _sharded(
    encode: Encode,
    chunk: int,
    parameters: Parameters,
    tokens: Int[Array, "N L"],
    num_items: int,
    queries: Float[Array, "B D"],
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """(log-normaliser, mean logit) of each query, put together from the devices' parts of the catalog."""
    by_item, by_query = sharding.spec("items"), sharding.spec("queries")
    parts = by_item[0]

    def of_part(parameters, tokens, queries):
        count = jnp.clip(num_items - jax.lax.axis_index(parts) * len(tokens), 0, len(tokens))
        # Typed as copies that may differ between devices, as their gradients do: those are then added up.
        own_parameters = jax.lax.pcast(parameters, jax.sharding.get_abstract_mesh().axis_names, to="varying")
        own_queries = jax.lax.pcast(queries, parts, to="varying")
        log_normalizer, vector_sum = _summary(encode, chunk, own_parameters, tokens, count, own_queries)
        largest = jax.lax.pmax(jax.lax.stop_gradient(log_normalizer), parts)
        log_normalizer = largest + jnp.log(jax.lax.psum(jnp.exp(log_normalizer - largest), parts))
        return log_normalizer, queries @ jax.lax.psum(vector_sum, parts) / num_items

    in_specs = (PartitionSpec(), by_item, by_query)
    return jax.shard_map(of_part, in_specs=in_specs, out_specs=(by_query, by_query))(parameters, tokens, queries)


def _summary(
    encode: Encode,
    chunk: int,
    parameters: Parameters,
    tokens: Int[Array, "N L"],
    count: Int[Array, ""],
    queries: Float[Array, "B D"],
) -> tuple[Float[Array, " B"], Float[Array, " D"]]:
    """All that cross-entropy needs of the first `count` items: (log Σ_i exp(q·v_i) for each query q, Σ_i v_i)."""
    if chunk:
        return _streamed_summary(encode, chunk, parameters, tokens, count, queries)
    vectors = encode(parameters, tokens)
    real = jnp.arange(len(tokens)) < count
    logits = jnp.where(real, queries @ vectors.T, MASKED)
    return jax.nn.logsumexp(logits, axis=-1), real.astype(vectors.dtype) @ vectors


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _streamed_summary(encode, chunk, parameters, tokens, count, queries):
    def fold(carry, index):
        maximum, total, vector_sum = carry
        chunk_tokens, fresh = _chunk(tokens, count, chunk, index)
        vectors = encode(parameters, chunk_tokens)
        logits = jnp.where(fresh, queries @ vectors.T, MASKED)
        new_maximum = jnp.maximum(maximum, jnp.max(logits, axis=1))
        exponentials = jnp.exp(logits - new_maximum[:, None])
        total = total * jnp.exp(maximum - new_maximum) + jnp.sum(exponentials, axis=1)
        return (new_maximum, total, vector_sum + fresh.astype(vectors.dtype) @ vectors), None

    zeros = jnp.zeros_like(queries)
    start = (zeros[:, 0] + MASKED, zeros[:, 0], zeros[0])
    (maximum, total, vector_sum), _ = jax.lax.scan(fold, start, jnp.arange(_num_chunks(tokens, chunk)))
    return maximum + jnp.log(total), vector_sum


def _forward(encode, chunk, parameters, tokens, count, queries):
    summary = _streamed_summary(encode, chunk, parameters, tokens, count, queries)
    return summary, (parameters, tokens, count, queries, summary[0])


def _backward(encode, chunk, residuals, gradients):
    """∂/∂q = g Σ_i p_i v_i and ∂/∂v_i = Σ_q g_q p_qi q + ∂sum, with p made again from the normaliser."""
    parameters, tokens, count, queries, log_normalizer = residuals
    d_normalizer, d_sum = gradients
    weighted_queries = (queries * d_normalizer[:, None]).T

    def accumulate(carry, index):
        d_parameters, mean_vectors = carry
        chunk_tokens, fresh = _chunk(tokens, count, chunk, index)
        vectors, pull_back = jax.vjp(lambda p: encode(p, chunk_tokens), parameters)
        logits = jnp.where(fresh, queries @ vectors.T, MASKED)
        probabilities = jnp.exp(logits - log_normalizer[:, None])
        mean_vectors += probabilities @ vectors
        # Transposed after the product: to transpose the probabilities is slow on CPU.
        d_vectors = (weighted_queries @ probabilities).T + fresh[:, None] * d_sum
        (d_chunk,) = pull_back(d_vectors)
        return (jax.tree.map(jnp.add, d_parameters, d_chunk), mean_vectors), None

    start = (jax.tree.map(jnp.zeros_like, parameters), jnp.zeros_like(queries))
    (d_parameters, mean_vectors), _ = jax.lax.scan(accumulate, start, jnp.arange(_num_chunks(tokens, chunk)))
    return d_parameters, None, None, mean_vectors * d_normalizer[:, None]


_streamed_summary.defvjp(_forward, _backward)


def _num_chunks(tokens: Int[Array, "N L"], chunk: int) -> int:
    return -(-len(tokens) // chunk)


def _chunk(
    tokens: Int[Array, "N L"], count: Int[Array, ""], chunk: int, index: Int[Array, ""]
) -> tuple[Int[Array, "C L"], Bool[Array, " C"]]:
    """The index-th chunk, and which of its rows are items that no chunk before had.

    The last one reaches back so as to be full: padding would take a copy of all tokens.
    """
    size = -(-len(tokens) // _num_chunks(tokens, chunk))
    start = jnp.minimum(index * size, len(tokens) - size)
    rows = start + jnp.arange(size)
    return jax.lax.dynamic_slice_in_dim(tokens, start, size), (rows >= index * size) & (rows < count)
