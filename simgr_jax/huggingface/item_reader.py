"""Reads the items' texts with an LLM: the mean state of each text's tokens, whitened."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import logging
from flax import nnx
from jaxtyping import Array, Float, Int

from simgr_jax.devices import distributed, sharding
from simgr_jax.errors import UserError
from simgr_jax.huggingface import families
from simgr_jax.huggingface.checkpoint import Checkpoint
from simgr_jax.huggingface.llm_tokenizer import load_tokenizer
from simgr_jax.huggingface.load_weights import load_transformer, read_input_rows
from simgr_jax.inputs.control_tokens import ControlTokens
from simgr_jax.inputs.item_texts import tokens_around_text
from simgr_jax.models import lora
from simgr_jax.models.lora import LoRAConfig
from simgr_jax.models.text_reader import TextReader
from simgr_jax.models.transformer import Transformer
from simgr_jax.workdir.atomic_write import atomic_path
from simgr_jax.workdir.cache import fingerprint, load_arrays

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Part of every fingerprint: increment it when the same texts give different states.
VERSION = 1
# Texts are read in batches of this many tokens, of texts whose lengths are rounded up to a multiple of _STEP.
_BATCH_TOKENS = 2048
_STEP = 16


class Whitening(NamedTuple):
    """The states of all texts share a mean and a few directions with most of their energy and little of their meaning.

    Attributes:
      center: float64 [D], the mean.
      directions: float64 [D, D], the principal directions as columns, each divided by its deviation to a power. Power 1
        whitens (WhitenRec, https://arxiv.org/abs/2402.08920), which also raises noise; power 0 leaves the directions as
        they are. The first K columns hold the most of any K before whitening.
    """

    center: Float[np.ndarray, " D"]
    directions: Float[np.ndarray, "D D"]

    def __call__(self, states: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
        """The states, centered and in the directions, each divided by its norm; float32. An item without text, whose
        state is 0, stays 0."""
        has_text = states.any(axis=1)
        turned = (states[has_text].astype(np.float64) - self.center) @ self.directions
        whitened = np.zeros(states.shape, np.float32)
        whitened[has_text] = turned / np.maximum(np.linalg.norm(turned, axis=1, keepdims=True), 1e-12)
        return whitened


def fit_whitening(states: Float[np.ndarray, "N D"], power: float) -> Whitening:
    """The whitening of these states, without those that are 0."""
    texts = states[states.any(axis=1)].astype(np.float64)
    center = texts.sum(axis=0) / max(len(texts), 1)
    centered = texts - center
    variances, directions = np.linalg.eigh(centered.T @ centered / max(len(centered), 1))
    # Beyond the rank of the states there is only rounding.
    variances = np.where(variances > 1e-10 * variances.max(), variances, np.inf)
    order = np.argsort(np.where(np.isfinite(variances), -variances, 0))
    return Whitening(center, (directions / variances ** (power / 2))[:, order])


def layers_read(config: PretrainedConfig, depth: float) -> int:
    """The number of layers that an LLM of this config reads with, of which `depth` is the share."""
    return max(1, round(depth * families.text_config(config).num_hidden_layers))


class ItemReader:
    """What an LLM makes of the items' texts.

    Attributes:
      fingerprint: of everything that the readings depend on, but for the dtype.
    """

    def __init__(
        self, checkpoint: Checkpoint, config: ml_collections.ConfigDict, dtype: str, texts: Sequence[str], cache: Path
    ):
        """
        Args:
          checkpoint: the LLM's; only its first layers are loaded.
          config: `config.item_reader`.
          dtype: of weights and computation.
          texts: [N]; an empty text gets a state of 0.
          cache: the folder for the states.
        """
        self.config, self._checkpoint, self._dtype, self._texts = config, checkpoint, dtype, list(texts)
        self._layers = layers_read(checkpoint.config, config.depth)
        read = fingerprint(VERSION, checkpoint.path, self._layers, config.max_tokens, self._texts)
        self.fingerprint = fingerprint(read, config.whitening)
        self._path = cache / f"item_reader-{fingerprint(read, dtype)}.npz"

    def readings(self) -> Float[np.ndarray, "N D"]:
        """Whitened mean states."""
        states = self._read_cached()
        return fit_whitening(states, self.config.whitening)(states)

    def text_reader(self, room: int, adapters: LoRAConfig, rngs: nnx.Rngs, **computation: str) -> TextReader:
        """The LLM as a part of a model, which trains its adapters. It begins with the same readings, but for rounding.

        Args:
          room: tokens that it reads at once.
          adapters: their rank and targets.
          rngs: for the adapters.
          computation: the decoder's `dtype`, also that of its weights, and its `remat`.
        """
        tokens = self._tokenize()
        used, longest = self._used(tokens)
        decoder, table = self._load(used, longest, **computation)
        lora.add(decoder, adapters, rngs, "the LLM of config.item_reader")
        padded = np.zeros((len(tokens), longest), np.int32)
        for row, one in zip(padded, tokens, strict=True):
            row[: len(one)] = np.searchsorted(used, one)
        center, directions = fit_whitening(self._read_cached(), self.config.whitening)
        lengths = np.array([len(one) for one in tokens], np.int32)
        whitening = center.astype(np.float32), directions.astype(np.float32)
        return TextReader(decoder, table, padded, lengths, *whitening, room)

    def _read_cached(self) -> Float[np.ndarray, "N D"]:
        if any(distributed.all_gather(not self._path.exists())):
            states = self._read()  # All processes take part.
            if distributed.is_main():
                with atomic_path(self._path) as temporary:
                    np.savez(temporary, states=states)
            return states
        return load_arrays(self._path)["states"]

    def _read(self) -> Float[np.ndarray, "N D"]:
        """The mean state of each text's tokens, without the first. An LLM uses the first position as a sink of
        attention, and its state says little (https://arxiv.org/abs/2309.17453)."""
        logging.info("Reading %d item texts with the LLM in %s", len(self._texts), self._checkpoint.path)
        tokens = self._tokenize()
        used, longest = self._used(tokens)
        model, table = self._load(used, longest, dtype=self._dtype)
        states = np.zeros((len(tokens), model.config.width), np.float32)
        for rows, batch in _batches(tokens, used):
            means = np.asarray(_mean_states(model, table, sharding.split_batch(batch)))
            states[rows] = means[: len(rows)]
        return states

    def _used(self, tokens: list[Int[np.ndarray, " T"]]) -> tuple[Int[np.ndarray, " W"], int]:
        """The tokens that occur, and the length of the longest text.

        Raises:
          UserError: there is none.
        """
        if not (longest := max(map(len, tokens))):
            raise UserError(
                f"config.item_reader: the tokenizer in {self._checkpoint.path} finds no token in any item text; give "
                "the items text, or another LLM"
            )
        return np.unique(np.concatenate(tokens)), longest

    def _load(
        self, used: Int[np.ndarray, " W"], longest: int, *, dtype: str, **computation: str
    ) -> tuple[Transformer, Float[Array, "W E"]]:
        """The LLM's first layers, for texts of up to `longest` tokens, and the embeddings of the used tokens."""
        options = {"max_length": longest, "dtype": dtype, **computation}
        config = families.transformer_config(self._checkpoint.config, **options).first_layers(self._layers)
        model = load_transformer(self._checkpoint, config, dtype, sharding.variable_sharding)
        return model, jnp.asarray(read_input_rows(self._checkpoint, used), dtype)

    def _tokenize(self) -> list[Int[np.ndarray, " T"]]:
        """Each text's tokens, cut to `config.max_tokens`, after those that the tokenizer begins every text with; none
        for an empty text."""
        tokenizer = load_tokenizer(self._checkpoint.path)
        begin = tokens_around_text(tokenizer)[0]
        return [
            np.asarray(begin + tokens.ids[: self.config.max_tokens] if tokens.ids else [], np.int64)
            for _, tokens in ControlTokens(tokenizer).encode_as_text(self._texts)
        ]


class _Batch(NamedTuple):
    """Texts, each at the beginning of its row. A row of length 0 is no text."""

    tokens: Int[np.ndarray, "B T"]
    lengths: Int[np.ndarray, " B"]


def _batches(
    tokens: list[Int[np.ndarray, " T"]], used: Int[np.ndarray, " W"]
) -> Iterator[tuple[Int[np.ndarray, " R"], _Batch]]:
    """Batches of texts of similar length, whose tokens are places in `used`, and which texts they are. There are as
    many shapes as there are different lengths, rounded up."""
    lengths = np.array([len(one) for one in tokens])
    rounded = -(-lengths // _STEP) * _STEP
    for length in np.unique(rounded[rounded > 0]):
        texts = np.flatnonzero(rounded == length)
        parts = sharding.shards("batch")
        size = max(_BATCH_TOKENS // length // parts, 1) * parts
        for first in range(0, len(texts), size):
            rows = texts[first : first + size]
            batch = _Batch(np.zeros((size, length), np.int32), np.zeros(size, np.int32))
            for row, text in enumerate(rows):
                batch.tokens[row, : lengths[text]] = np.searchsorted(used, tokens[text])
            batch.lengths[: len(rows)] = lengths[rows]
            yield rows, batch


@nnx.jit
def _mean_states(model: Transformer, table: Float[Array, "W E"], batch: _Batch) -> Float[Array, "B D"]:
    positions = jnp.broadcast_to(jnp.arange(batch.tokens.shape[1]), batch.tokens.shape)
    is_text = positions < batch.lengths[:, None]
    states = model(table[batch.tokens], is_text.astype(jnp.int32), positions).astype(jnp.float32)
    is_read = is_text & ((positions > 0) | (batch.lengths[:, None] == 1))
    states = jnp.sum(jnp.where(is_read[..., None], states, 0), axis=1)
    means = states / jnp.maximum(jnp.sum(is_read, axis=1, keepdims=True), 1)
    return sharding.constrain(means, None, None)
