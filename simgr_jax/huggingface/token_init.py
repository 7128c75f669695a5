"""Initial embeddings for new semantic-ID tokens, in the LLM's embedding space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse
from jaxtyping import Float, Int

from simgr_jax.errors import UserError
from simgr_jax.huggingface.checkpoint import Checkpoint
from simgr_jax.huggingface.load_weights import embedding_statistics, read_embedding_rows
from simgr_jax.inputs.control_tokens import ControlTokens, token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKEN_INITS = ("mean", "words", "reading")


def from_mean(checkpoint: Checkpoint, count: int, seed: int) -> Float[np.ndarray, "count D"]:
    """Normal draws with the mean and standard deviation of the LLM's embeddings in each dimension; float32."""
    return _draw(*embedding_statistics(checkpoint), count, seed)


def _draw(
    mean: Float[np.ndarray, " D"], std: Float[np.ndarray, " D"], count: int, seed: int
) -> Float[np.ndarray, "count D"]:
    return mean + np.random.default_rng(seed).standard_normal((count, len(mean)), np.float32) * std


def from_words(
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerFast,
    item_texts: Sequence[str],
    tokens: Int[np.ndarray, "N L"],
    vocab_size: int,
    seed: int,
) -> Float[np.ndarray, "V D"]:
    """The LLM's embeddings of the words that describe each token's items; float32.

    An item's vector is the mean of its text's token embeddings, and a semantic-ID token's vector is the mean of its
    items' vectors. Averaging shrinks the spread, so the vectors are rescaled to the standard deviation of the LLM's
    embeddings. Tokens without any item that has text are drawn as in `from_mean`.

    Args:
      item_texts: [N].
      tokens: the semantic-ID tokens of each item, below `vocab_size`.

    Raises:
      UserError: no item has text.
    """
    words = token_ids([tokens for _, tokens in ControlTokens(tokenizer).encode_as_text(item_texts)])
    items = np.repeat(np.arange(len(words)), words.lengths)
    if not len(items):
        raise UserError(
            'config.backbone.token_init: "words" found no words in the item texts; use "mean", or give the items text'
        )
    used, columns = np.unique(words.values, return_inverse=True)
    item_vectors = _row_means(items, columns, (len(words), len(used))) @ read_embedding_rows(checkpoint, used)

    has_words = np.isin(np.arange(len(words)), items)
    carriers = np.repeat(np.flatnonzero(has_words), tokens.shape[1])
    carried = tokens[has_words].reshape(-1)
    token_vectors = _row_means(carried, carriers, (vocab_size, len(words))) @ item_vectors

    mean, std = embedding_statistics(checkpoint)
    start = _draw(mean, std, vocab_size, seed)
    chosen = np.unique(carried)
    found = token_vectors[chosen]
    start[chosen] = mean + (found - found.mean(axis=0)) / np.maximum(found.std(axis=0), 1e-12) * std
    return start


def from_readings(
    checkpoint: Checkpoint,
    readings: Float[np.ndarray, "N X"],
    tokens: Int[np.ndarray, "N L"],
    vocab_size: int,
) -> Float[np.ndarray, "V D"]:
    """Embeddings whose mean over an item's codes comes nearest to the LLM's reading of its text, by least squares, at
    the standard deviation of the LLM's embeddings; float32.

    Args:
      readings: of the items' texts (see `item_reader.whiten`); more than D columns are cut, fewer are filled with 0.
      tokens: the semantic-ID tokens of each item, below `vocab_size`.
    """
    from sklearn.linear_model import Ridge  # Takes seconds to import.

    _, std = embedding_statistics(checkpoint)
    items = np.repeat(np.arange(len(tokens)), tokens.shape[1])
    codes = _row_means(items, tokens.reshape(-1), (len(tokens), vocab_size))
    # A little ridge decides between codes that always occur together.
    fitted = Ridge(alpha=0.1, fit_intercept=False, solver="sparse_cg").fit(codes, readings[:, : len(std)]).coef_.T
    embeddings = np.zeros((vocab_size, len(std)), np.float32)
    embeddings[:, : fitted.shape[1]] = fitted
    return embeddings * (np.sqrt(np.mean(np.square(std))) / np.sqrt(np.mean(np.square(embeddings))))


def _row_means(rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> scipy.sparse.csr_array:
    """The matrix that averages each row's columns; a repeated column counts each time."""
    counts = np.bincount(rows, minlength=shape[0])
    return scipy.sparse.csr_array(((1 / counts[rows]).astype(np.float32), (rows, columns)), shape=shape)
