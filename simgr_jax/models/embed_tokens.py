"""Embeddings of the tokens in prompts: semantic-ID tokens, and an LLM's own tokens."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from simgr_jax.devices import sharding

# Adam moves a weight by about the learning rate per step, so embeddings of this scale leave their random values within
# an epoch. At sqrt(L), where the mean of L levels has unit scale, they hardly moved, and learning took three times as
# long.
EMBEDDING_STD = 0.1


def new_embedding(
    rows: int, width: int, rngs: nnx.Rngs, values: Float[ArrayLike, "rows width"] | None = None
) -> nnx.Param:
    """A trained float32 table, initialized with `values` or at random."""
    if values is None:
        values = nnx.initializers.normal(EMBEDDING_STD)(rngs.params(), (rows, width), jnp.float32)
    return nnx.Param(jnp.asarray(values, jnp.float32), axes=(None, "embed"))


def embed_tokens(
    embedding: nnx.Variable, text_embedding: nnx.Variable | None, tokens: Int[Array, "*B T"]
) -> Float[Array, "*B T D"]:
    """The embeddings of a prompt's inputs.

    Args:
      embedding: [V, D], for the semantic-ID tokens.
      text_embedding: [W, D], whose row w is for input V + w (see `inputs.prompts.Prompt`); None if there is no text.
        It may be wider (see `Transformer`); the rest is zero for semantic-ID tokens.
    """
    codes = sharding.constrain(embedding[...], None, None)
    if text_embedding is None:
        return codes[tokens]
    text, text_rows = tokens - len(codes), sharding.constrain(text_embedding[...], None, None)
    from_text = text_rows[jnp.maximum(text, 0)]
    codes = jnp.pad(codes, ((0, 0), (0, text_rows.shape[1] - codes.shape[1])))
    from_codes = codes[jnp.minimum(tokens, len(codes) - 1)]
    return jnp.where((text >= 0)[..., None], from_text, from_codes)
