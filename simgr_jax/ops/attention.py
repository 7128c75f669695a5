"""Attention within packed rows."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jaxtyping import Array, Bool, Float, Int

from simgr_jax.devices import sharding

# "auto" takes the fastest for the machine's accelerator.
IMPLEMENTATIONS = ("auto", "xla", "cudnn", "splash")

# The widest that cuDNN's kernel takes, on Hopper and later.
_WIDEST_CUDNN_HEAD = 256

# Positions per block of the splash kernel.
_SPLASH_BLOCK = 128


def segment_mask(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """True where two positions share a segment. Padding (segment 0) is also a segment."""
    return segment_ids[:, :, None] == segment_ids[:, None, :]


def causal_segment_mask(segment_ids: Int[Array, "B T"], window: Int[Array, ""] | int = 0) -> Bool[Array, "B T T"]:
    """True where position t (second axis) may attend to position s (third): both in one segment, s <= t, and
    t - s < window unless `window` is 0.

    Padding (segment 0) is a segment of its own, so no row of the mask is empty and no softmax is NaN.
    """
    positions = jnp.arange(segment_ids.shape[1])
    distance = positions[:, None] - positions[None, :]
    near = distance < jnp.where(window == 0, segment_ids.shape[1], window)
    return (distance >= 0) & near & segment_mask(segment_ids)


def attention(
    query: Float[Array, "B T H head"],
    key: Float[Array, "B T Hkv head"],
    value: Float[Array, "B T Hkv head"],
    segment_ids: Int[Array, "B T"],
    *,
    causal: bool = True,
    windows: tuple[int, ...] = (0,),
    window_index: Int[Array, ""] | int = 0,
    scale: float,
    softcap: float = 0.0,
    implementation: str = "auto",
) -> Float[Array, "B T H head"]:
    """Attention that never crosses a segment boundary.

    Grouped-query attention (https://arxiv.org/abs/2305.13245): H is a multiple of Hkv.

    Args:
      causal: if true, a position attends to itself and earlier positions; else to its whole segment, ignoring windows.
      windows: every window that the model uses; 0 means all earlier positions. `window_index` selects this layer's.
        Scanned layers share one computation, and a kernel must know its masks at compile time.
      scale: multiplies the scores.
      softcap: c above 0 turns each score into c tanh(score / c) (Gemma 2, https://arxiv.org/abs/2408.00118).
      implementation: one of IMPLEMENTATIONS: XLA's, cuDNN's on NVIDIA GPUs (bfloat16 only), or the splash kernel on
        TPUs. Falls back to XLA's if a kernel cannot compute the shape.
    """
    if implementation == "auto":
        implementation = {"gpu": "cudnn", "tpu": "splash"}.get(sharding.platform(), "xla")
    if implementation == "splash" and causal and _fits_splash(query, key):
        kernels = [functools.partial(_splash, window=window, softcap=softcap) for window in windows]
        by_head = sharding.spec("batch", None, "heads", None)
        # The compiler cannot partition a kernel, so each device calls its own.
        switch = sharding.per_device(
            lambda index, *arrays: jax.lax.switch(index, kernels, *arrays),
            (sharding.spec(), by_head, by_head, by_head, sharding.spec("batch", None)),
            by_head,
            check_vma=False,
        )
        return switch(jnp.asarray(window_index), query * scale, key, value, segment_ids)
    mask = causal_segment_mask(segment_ids, jnp.asarray(windows)[window_index]) if causal else segment_mask(segment_ids)
    fits_cudnn = query.dtype == jnp.bfloat16 and query.shape[-1] <= _WIDEST_CUDNN_HEAD and not softcap
    if implementation == "cudnn" and fits_cudnn:
        return jax.nn.dot_product_attention(query, key, value, mask=mask[:, None], scale=scale, implementation="cudnn")
    return _by_key_head(query, key, value, mask, scale, softcap)


def branch_attention(
    query: Float[Array, "B W S H head"],
    history_key: Float[Array, "B T Hkv head"],
    history_value: Float[Array, "B T Hkv head"],
    history_lengths: Int[Array, " B"],
    key: Float[Array, "B W P Hkv head"],
    value: Float[Array, "B W P Hkv head"],
    *,
    windows: tuple[int, ...] = (0,),
    window_index: Int[Array, ""] | int = 0,
    scale: float,
    softcap: float = 0.0,
) -> Float[Array, "B W S H head"]:
    """Causal attention of W branches that continue one history; each attends to the history and to itself.

    The branches share the history's keys and values instead of holding W copies.

    Args:
      query: for each branch's last S positions.
      history_lengths: the number of the T history positions that are not padding.
      key, value: for all P positions of each branch, which follow the history.
      windows, window_index, scale, softcap: as in `attention`.
    """
    batch, width, new, heads, head_width = query.shape
    length, grown = history_key.shape[1], key.shape[2]
    query = query.reshape(batch, width, new, key.shape[3], -1, head_width)

    window = jnp.asarray(windows)[window_index]
    window = jnp.where(window == 0, length + grown, window)
    into_branch = jnp.arange(grown - new, grown)[:, None]
    to_branch = into_branch - jnp.arange(grown)  # How far back each key is.
    to_history = into_branch + history_lengths[:, None, None] - jnp.arange(length)
    sees_branch = (to_branch >= 0) & (to_branch < window)
    sees_history = (to_history > into_branch) & (to_history < window)
    mask = jnp.concatenate([sees_history, jnp.broadcast_to(sees_branch, (batch, new, grown))], axis=-1)

    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores = [product("bwskgd,btkd->bkwsgt", query, history_key), product("bwskgd,bwpkd->bkwsgp", query, key)]
    scores = jnp.concatenate(scores, axis=-1) * scale
    weights = _softmax(scores, mask[:, None, None, :, None], softcap).astype(value.dtype)
    mixed = jnp.einsum("bkwsgt,btkd->bwskgd", weights[..., :length], history_value)
    mixed += jnp.einsum("bkwsgp,bwpkd->bwskgd", weights[..., length:], value)
    return mixed.reshape(batch, width, new, heads, head_width)


def _by_key_head(
    query: Float[Array, "B T H head"],
    key: Float[Array, "B T Hkv head"],
    value: Float[Array, "B T Hkv head"],
    mask: Bool[Array, "B T T"],
    scale: float,
    softcap: float,
) -> Float[Array, "B T H head"]:
    """The queries of one key head are the rows of one matrix, [B, Hkv, H / Hkv * T, head].

    So no product transposes the weights, the largest arrays, in the forward or backward pass. On a CPU, attention takes
    half the time that it takes with `jax.nn.dot_product_attention`.
    """
    batch, length, heads, width = query.shape
    by_key_head = (batch, key.shape[2], heads // key.shape[2], length, -1)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    rows = query.reshape(batch, length, *by_key_head[1:3], width).transpose(0, 2, 3, 1, 4)
    rows = rows.reshape(*by_key_head[:2], -1, width)
    scores = product("bkrh,bksh->bkrs", rows, key.swapaxes(1, 2)) * scale
    weights = _softmax(scores.reshape(by_key_head), mask[:, None, None], softcap)
    weights = weights.reshape(scores.shape).astype(value.dtype)
    mixed = jnp.einsum("bkrs,bksh->bkrh", weights, value.swapaxes(1, 2)).reshape(by_key_head)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(query.shape)


def _softmax(scores: Float[Array, "*B T"], mask: Bool[Array, "*B T"], softcap: float) -> Float[Array, "*B T"]:
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    return jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)


def _fits_splash(query: Float[Array, "B T H head"], key: Float[Array, "B T Hkv head"]) -> bool:
    return query.shape[1] % _SPLASH_BLOCK == 0 and key.shape[2] % sharding.shards("heads") == 0


def _splash(query, key, value, segment_ids, *, window: int, softcap: float) -> Float[Array, "B T H head"]:
    """Pallas's block-sparse flash attention (jax.experimental.pallas.ops.tpu.splash_attention)."""
    length, heads = query.shape[1:3]
    shape = (length, length)
    mask = (
        splash_attention_mask.LocalMask(shape, window_size=(window - 1, 0), offset=0)
        if window
        else splash_attention_mask.CausalMask(shape)
    )
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * heads),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap or None,
    )
    by_head = lambda x: jnp.swapaxes(x, 1, 2)  # noqa: E731
    segments = splash_attention_kernel.SegmentIds(segment_ids, segment_ids)
    return by_head(jax.vmap(kernel)(by_head(query), by_head(key), by_head(value), segments))
