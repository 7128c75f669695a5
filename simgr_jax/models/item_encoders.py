"""Item encoders: turn an item's semantic-ID tokens into its vector.

An encoder works in two steps. `tables` computes everything that depends on a single token, once per row of the (small)
table of token embeddings. `combine` looks up an item's rows and makes its vector. A loss that goes through the catalog
in chunks calls `tables` once and `combine` for each chunk.

`combine` takes tokens, not gathered embeddings: for N items of L levels, the gathered [N, L, D] array would be the
largest of the whole step. Most encoders avoid it with `sum_of_rows`, which adds up the levels one at a time.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

Tables = Any  # A pytree of arrays [V, ...].
# What M items are encoded from: their tokens, or their tokens and the readings of their texts.
Contents = Int[Array, "M L"] | tuple[Int[Array, "M L"], Float[Array, "M X"]]


@jax.custom_vjp
def sum_of_rows(table: Float[Array, "V D"], tokens: Int[Array, "M L"]) -> Float[Array, "M D"]:
    """Σ_l table[tokens[:, l]], without an [M, L, D] array in the forward or the backward pass."""

    def add(total, level_tokens):
        return total + table[level_tokens], None

    return jax.lax.scan(add, table[tokens[:, 0]], tokens[:, 1:].T)[0]


def _sum_of_rows_forward(table, tokens):
    return sum_of_rows(table, tokens), (table, tokens)


def _sum_of_rows_backward(residuals, d_sum):
    table, tokens = residuals

    # Autodiff would make a gradient of the whole table for each level and then add them up.
    def add(d_table, level_tokens):
        return d_table.at[level_tokens].add(d_sum), None

    return jax.lax.scan(add, jnp.zeros_like(table), tokens.T)[0], None


sum_of_rows.defvjp(_sum_of_rows_forward, _sum_of_rows_backward)


class ItemEncoder(nnx.Module):
    """The base of all encoders: `tables`, then `combine`."""

    def __call__(self, table: Float[Array, "V D"], contents: Contents) -> Float[Array, "M D"]:
        """The items' vectors, from the embeddings of all tokens."""
        return self.combine(self.tables(table), contents)

    def tables(self, table: Float[Array, "V D"]) -> Tables:
        """The part that is computed once for all items."""
        raise NotImplementedError

    def combine(self, tables: Tables, contents: Contents) -> Float[Array, "M D"]:
        """The items' vectors. Each depends only on the item's own contents and on `tables`."""
        raise NotImplementedError


class Mean(ItemEncoder):
    """v = 1/L Σ_l e_l, the paper's aggregation (SimGR, arXiv 2602.07847)."""

    def tables(self, table):
        return table

    def combine(self, tables, tokens):
        return sum_of_rows(tables, tokens) / tokens.shape[1]


_NORMAL = nnx.initializers.normal(0.02)


def _linear(
    in_width: int,
    out_width: int,
    rngs: nnx.Rngs,
    *,
    use_bias: bool = False,
    kernel_init: nnx.Initializer = _NORMAL,
) -> nnx.Linear:
    return nnx.Linear(
        *(in_width, out_width),
        use_bias=use_bias,
        kernel_init=kernel_init,
        kernel_metadata={"axes": ("embed", None)},
        rngs=rngs,
    )


class Gated(ItemEncoder):
    """v = 1/L Σ_l sigmoid(W e_l + U m + b) ⊙ e_l with m the mean: the whole ID decides how much each level adds."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.from_level = _linear(width, width, rngs, use_bias=True)
        self.from_mean = _linear(width, width, rngs)

    def tables(self, table):
        return table, self.from_level(table)

    def combine(self, tables, tokens):
        table, gate_table = tables
        levels = tokens.shape[1]
        context = self.from_mean(sum_of_rows(table, tokens) / levels)

        # Recomputing the gates in the backward pass is cheaper than keeping L of them for every item.
        @jax.checkpoint
        def add(total, level_tokens):
            return total + nnx.sigmoid(gate_table[level_tokens] + context) * table[level_tokens], None

        return jax.lax.scan(add, jnp.zeros_like(context), tokens.T)[0] / levels


class Attention(ItemEncoder):
    """Self-attention among an item's levels, added to their embeddings and then averaged.

    Levels need no position embeddings, because tokens of different levels are different rows of the table.
    """

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        self.heads = heads
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.qkv = _linear(width, 3 * width, rngs)
        self.output = _linear(width, width, rngs)

    def tables(self, table):
        return table, self.qkv(self.norm(table))

    def combine(self, tables, tokens):
        table, qkv_table = tables
        count, levels = tokens.shape
        qkv = qkv_table[tokens].reshape(count, levels, 3, self.heads, -1)
        mixed = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
        # The output layer is linear without a bias, so it can be applied after the mean over levels.
        return sum_of_rows(table, tokens) / levels + self.output(mixed.reshape(count, levels, -1).mean(axis=1))


class CrossAttention(ItemEncoder):
    """Multi-head cross-attention from the mean of an item's levels to its levels (the paper's future work).

    v = m + W_o softmax(q(m)·k(e_l) / sqrt(head)) v(e_l)
    """

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        self.heads = heads
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.query = _linear(width, width, rngs)
        self.key_value = _linear(width, 2 * width, rngs)
        self.output = _linear(width, width, rngs)

    def tables(self, table):
        return table, self.key_value(self.norm(table))

    def combine(self, tables, tokens):
        table, key_value_table = tables
        count, levels = tokens.shape
        mean = sum_of_rows(table, tokens) / levels
        query = self.query(self.norm(mean)).reshape(count, 1, self.heads, -1)
        key_value = key_value_table[tokens].reshape(count, levels, 2, self.heads, -1)
        mixed = jax.nn.dot_product_attention(query, key_value[:, :, 0], key_value[:, :, 1])
        return mean + self.output(mixed.reshape(count, -1))


_LECUN_NORMAL = nnx.initializers.lecun_normal()


class MLP(ItemEncoder):
    """v = W_2 silu(W_1 [ê_1; ...; ê_L] + b) with ê the RMS-normalized embeddings.

    Any combination of codes can have its own vector.

    W_1 [ê_1; ...; ê_L] = Σ_l W_1l ê_l, so each level's part of W_1 is applied to the table's rows once: K·L products
    instead of N·L. With 12 thousand items and 256 codes per level, that is 47 times fewer.
    """

    def __init__(
        self,
        width: int,
        hidden_width: int,
        codebook_sizes: tuple[int, ...],
        rngs: nnx.Rngs,
        output_init: nnx.Initializer = _LECUN_NORMAL,
    ):
        self.codebook_sizes = codebook_sizes
        levels = len(codebook_sizes)
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        init = nnx.initializers.normal((levels * width) ** -0.5)
        self.input = nnx.Param(init(rngs.params(), (levels, width, hidden_width), jnp.float32), axes=("embed", None))
        self.bias = nnx.Param(jnp.zeros(hidden_width, jnp.float32))
        self.output = _linear(hidden_width, width, rngs, kernel_init=output_init)

    def tables(self, table):
        levels = jnp.split(self.norm(table), np.cumsum(self.codebook_sizes)[:-1])
        return jnp.concatenate([rows @ self.input[level] for level, rows in enumerate(levels)])

    def combine(self, tables, tokens):
        return self.output(nnx.silu(sum_of_rows(tables, tokens) + self.bias[...]))


class MeanMLP(ItemEncoder):
    """v = mean + MLP(concatenated levels): starts out as the paper's mean and learns what each combination adds."""

    def __init__(self, width: int, hidden_width: int, codebook_sizes: tuple[int, ...], rngs: nnx.Rngs):
        self.mean = Mean()
        self.mlp = MLP(width, hidden_width, codebook_sizes, rngs, output_init=nnx.initializers.zeros)

    def tables(self, table):
        return self.mean.tables(table), self.mlp.tables(table)

    def combine(self, tables, tokens):
        for_mean, for_mlp = tables
        return self.mean.combine(for_mean, tokens) + self.mlp.combine(for_mlp, tokens)


class WithText(ItemEncoder):
    """v = encoder(codes) + s x W / sqrt(D_x), with x the reading of the item's text (`huggingface.item_reader`).

    An item is known by its text where its codes are rare. W begins so that the text's part is the reading's leading
    dimensions, at the scale of `norm`. By the root of D_x, a step of the optimizer changes v no more than a step of an
    embedding does.
    """

    def __init__(self, codes: ItemEncoder, text_width: int, width: int, norm: Float[Array, ""]):
        """
        Args:
          codes: the encoder of the codes.
          text_width: D_x.
          norm: the norm of the text's part for a reading that lies in its leading dimensions.
        """
        self.codes, self.factor = codes, text_width**-0.5
        self.text_map = nnx.Param(jnp.eye(text_width, width) * (norm / self.factor), axes=(None, "embed"))

    def tables(self, table):
        return self.codes.tables(table), self.text_map[...]

    def combine(self, tables, contents):
        (for_codes, text_map), (tokens, texts) = tables, contents
        return self.codes.combine(for_codes, tokens) + self.factor * (texts.astype(jnp.float32) @ text_map)


ITEM_ENCODERS = ("mean", "mean_mlp", "mlp", "cross_attention", "attention", "gated")
# The encoders with an MLP, which has an inner width.
WITH_WIDTH = ("mean_mlp", "mlp")


def create(
    name: str, width: int, heads: int, hidden_width: int, codebook_sizes: tuple[int, ...], rngs: nnx.Rngs
) -> ItemEncoder:
    """The encoder called `name`, one of ITEM_ENCODERS; only some use `heads` or `hidden_width`."""
    match name:
        case "mean":
            return Mean()
        case "gated":
            return Gated(width, rngs)
        case "attention":
            return Attention(width, heads, rngs)
        case "cross_attention":
            return CrossAttention(width, heads, rngs)
        case "mlp":
            return MLP(width, hidden_width, codebook_sizes, rngs)
        case "mean_mlp":
            return MeanMLP(width, hidden_width, codebook_sizes, rngs)
    raise ValueError(f"no item encoder {name!r}")
