"""An LLM's first layers that read item texts within a model: the mean state of each text's tokens, whitened."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from simgr_jax.devices import sharding
from simgr_jax.models.lora import Frozen
from simgr_jax.models.model_inputs import Catalog
from simgr_jax.models.transformer import Transformer
from simgr_jax.ops.similarity_loss import to_similarity_space

# Rows hold several short texts, or one long one.
_SHORTEST_ROW = 128
# The texts of a part of the catalog have lengths that are equal when rounded up to a multiple of this.
_LENGTH_STEP = 8


class TextReader(nnx.Module):
    """Reads the texts of any items, packed into rows, as `huggingface.item_reader` does before training.

    Attributes:
      decoder: with adapters, or with weights that are trained.
      count: M, the number of items that it takes at once.
      parts: int32 [P, M], the whole catalog in parts that fit; places without an item are -1.
    """

    def __init__(
        self,
        decoder: Transformer,
        embedding: Float[Array, "W E"],
        tokens: Int[np.ndarray, "N T"],
        lengths: Int[np.ndarray, " N"],
        center: Float[np.ndarray, " D"],
        directions: Float[np.ndarray, "D X"],
        room: int,
    ):
        """
        Args:
          embedding: of the tokens in the texts.
          tokens: places in `embedding`; those beyond a text's length mean nothing.
          lengths: of the texts, in tokens; an item of length 0 has no text.
          center, directions: see `huggingface.item_reader.Whitening`.
          room: tokens that are read at once, rounded up to whole rows.
        """
        self.decoder, self.embedding = decoder, Frozen(embedding, axes=(None, "embed"))
        self.center, self.directions = Catalog(jnp.asarray(center)), Catalog(jnp.asarray(directions))
        padding = (0, -len(lengths) % sharding.shards("items"))
        self.tokens = Catalog(jnp.asarray(np.pad(tokens, (padding, (0, 0))), jnp.int32), axes=("items", None))
        self.lengths = Catalog(jnp.asarray(np.pad(lengths, padding), jnp.int32), axes=("items",))
        self.row_length = max(tokens.shape[1], _SHORTEST_ROW)
        parts = sharding.shards("batch")
        self.rows = -(-room // (self.row_length * parts)) * parts
        texts = lengths[lengths > 0]
        self.count = int(self.rows * self.row_length // max(texts.mean(), 1)) if len(texts) else 1
        self.parts = Catalog(jnp.asarray(self._parts(np.asarray(lengths)), jnp.int32))

    def _parts(self, lengths: Int[np.ndarray, " N"]) -> Int[np.ndarray, "P M"]:
        rounded = -(-lengths // _LENGTH_STEP) * _LENGTH_STEP
        parts = []
        for length in np.unique(rounded[rounded > 0]):
            items = np.flatnonzero(rounded == length)
            size = min(self.rows * (self.row_length // min(length, self.row_length)), self.count)
            items = np.pad(items, (0, -len(items) % size), constant_values=-1).reshape(-1, size)
            parts.append(np.pad(items, ((0, 0), (0, self.count - size)), constant_values=-1))
        return np.concatenate(parts) if parts else np.full((1, self.count), -1)

    def __call__(self, items: Int[Array, " M"]) -> tuple[Float[Array, "M X"], Bool[Array, " M"]]:
        """The readings of the items' texts, unit vectors, float32; and which were read: not those without text, and not
        those for which there was no room.

        Args:
          items: -1 is none.
        """
        lengths = jnp.where(items >= 0, self.lengths[jnp.maximum(items, 0)], 0)
        begins, was_read = self._places(lengths)
        size, offsets = self.rows * self.row_length, jnp.arange(self.tokens.shape[1])
        is_text = was_read[:, None] & (offsets < lengths[:, None])
        places = jnp.where(is_text, begins[:, None] + offsets, size)

        def in_rows(values: Int[Array, "M T"]) -> Int[Array, "R L"]:
            flat = jnp.zeros(size, jnp.int32).at[places].set(values, mode="drop")
            return sharding.constrain(flat.reshape(self.rows, self.row_length), "batch", None)

        tokens = in_rows(self.tokens[jnp.maximum(items, 0)])
        texts = in_rows(jnp.broadcast_to(jnp.arange(1, len(items) + 1)[:, None], places.shape))
        positions = in_rows(jnp.broadcast_to(offsets, places.shape))
        embedding = sharding.constrain(self.embedding[...], None, None)
        states = self.decoder(embedding[tokens], texts, positions).astype(jnp.float32)
        # See `item_reader` on the first position.
        is_read = (positions > 0) | (jnp.pad(lengths, (1, 0))[texts] == 1)
        states = jnp.where(is_read[..., None], states, 0).reshape(size, -1)
        sums = jax.ops.segment_sum(states, texts.reshape(-1), len(items) + 1)[1:]
        means = sharding.constrain(sums, None, None) / jnp.maximum(lengths - (lengths > 1), 1)[:, None]
        whitened = (means - self.center[...]) @ self.directions[...]
        return to_similarity_space(whitened, "cosine"), was_read

    def _places(self, lengths: Int[Array, " M"]) -> tuple[Int[Array, " M"], Bool[Array, " M"]]:
        """Where each text begins in the flat rows, one after the other with no text in two rows; and whether it has a
        place."""

        def place(end: Int[Array, ""], length: Int[Array, ""]):
            left = -end % self.row_length
            begin = jnp.where(length > left, end + left, end)
            fits = (length > 0) & (begin + length <= self.rows * self.row_length)
            return jnp.where(fits, begin + length, end), (begin, fits)

        return jax.lax.scan(place, jnp.int32(0), lengths)[1]
