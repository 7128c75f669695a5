"""Cross-entropy over a catalog whose item vectors and logits never exist at once.

Item vectors are made from their codes a chunk at a time, scored, and folded into a running maximum and sum, as flash
attention does with keys (Dao et al., arXiv 2205.14135); the backward pass makes each chunk again. So memory grows with
the chunk, not with the catalog, for one more product of users and items than the dense loss takes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Parameters = TypeVar("Parameters")  # A pytree of float arrays.
Encode = Callable[[Parameters, Int[Array, "C L"]], Float[Array, "C D"]]


def streamed_cross_entropy(
    encode: Encode,
    parameters: Parameters,
    tokens: Int[Array, "N L"],
    user_states: Float[Array, "B D"],
    target_vectors: Float[Array, "B D"],
    temperature: Float[Array, ""] | float,
    label_smoothing: float,
    chunk: int,
) -> Float[Array, " B"]:
    """`similarity_loss.full_catalog_cross_entropy` of the items that `tokens` spell: same value, same gradients.

    Args:
      encode: a pure function from `parameters` and the tokens of some items to their vectors, float32 and in the
        similarity's space. An item's vector may not depend on what other items it is encoded with. All that is to be
        learned must be in `parameters`: what `encode` closes over gets no gradient, and must not be traced.
      target_vectors: what `encode` makes of each row's target.
      chunk: items that are encoded and scored at once; more than N means all.
    """
    scaled = user_states / temperature
    log_normalizer, mean_vector = catalog_summary(encode, chunk, parameters, tokens, scaled)
    target_logits = jnp.sum(scaled * target_vectors, axis=-1)
    return log_normalizer - (1 - label_smoothing) * target_logits - label_smoothing * (scaled @ mean_vector)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def catalog_summary(
    encode: Encode, chunk: int, parameters: Parameters, tokens: Int[Array, "N L"], queries: Float[Array, "B D"]
) -> tuple[Float[Array, " B"], Float[Array, " D"]]:
    """All that cross-entropy needs of the catalog: (log Σ_i exp(q·v_i) for each query q, the mean of all v_i).

    Args: as of `streamed_cross_entropy`; the queries are already divided by the temperature.
    """

    def fold(carry, index):
        maximum, total, vector_sum = carry
        chunk_tokens, fresh = _chunk(tokens, chunk, index)
        vectors = encode(parameters, chunk_tokens)
        logits = jnp.where(fresh[:, None], vectors @ queries.T, -jnp.inf)
        new_maximum = jnp.maximum(maximum, jnp.max(logits, axis=0))
        total = total * jnp.exp(maximum - new_maximum) + jnp.sum(jnp.exp(logits - new_maximum), axis=0)
        return (new_maximum, total, vector_sum + fresh.astype(vectors.dtype) @ vectors), None

    batch, width = queries.shape
    start = (jnp.full(batch, -jnp.inf), jnp.zeros(batch), jnp.zeros(width))
    (maximum, total, vector_sum), _ = jax.lax.scan(fold, start, jnp.arange(_num_chunks(tokens, chunk)))
    return maximum + jnp.log(total), vector_sum / len(tokens)


def _forward(encode, chunk, parameters, tokens, queries):
    summary = catalog_summary(encode, chunk, parameters, tokens, queries)
    return summary, (parameters, tokens, queries, summary[0])


def _backward(encode, chunk, residuals, gradients):
    """∂/∂q = g Σ_i p_i v_i and ∂/∂v_i = Σ_q g_q p_qi q + ∂mean / N, with p made again from the normaliser."""
    parameters, tokens, queries, log_normalizer = residuals
    d_normalizer, d_mean = gradients
    weighted_queries = queries * d_normalizer[:, None]

    def accumulate(carry, index):
        d_parameters, mean_vectors = carry
        chunk_tokens, fresh = _chunk(tokens, chunk, index)
        vectors, pull_back = jax.vjp(lambda p: encode(p, chunk_tokens), parameters)
        # Items by queries: the larger of the gradients' products then needs no transposition, which is slow on CPU.
        probabilities = jnp.where(fresh[:, None], jnp.exp(vectors @ queries.T - log_normalizer), 0)
        mean_vectors += probabilities.T @ vectors
        d_vectors = probabilities @ weighted_queries + fresh[:, None] * (d_mean / len(tokens))
        (d_chunk,) = pull_back(d_vectors)
        return (jax.tree.map(jnp.add, d_parameters, d_chunk), mean_vectors), None

    start = (jax.tree.map(jnp.zeros_like, parameters), jnp.zeros_like(queries))
    (d_parameters, mean_vectors), _ = jax.lax.scan(accumulate, start, jnp.arange(_num_chunks(tokens, chunk)))
    return d_parameters, None, mean_vectors * d_normalizer[:, None]


catalog_summary.defvjp(_forward, _backward)


def _num_chunks(tokens: Int[Array, "N L"], chunk: int) -> int:
    return -(-len(tokens) // chunk)


def _chunk(tokens: Int[Array, "N L"], chunk: int, index: Int[Array, ""]) -> tuple[Int[Array, "C L"], Bool[Array, " C"]]:
    """The index-th chunk, and which of its items no chunk before had.

    The last one reaches back so as to be full: padding would take a copy of all tokens.
    """
    size = min(chunk, len(tokens))
    start = jnp.minimum(index * size, len(tokens) - size)
    fresh = start + jnp.arange(size) >= index * size
    return jax.lax.dynamic_slice_in_dim(tokens, start, size), fresh
