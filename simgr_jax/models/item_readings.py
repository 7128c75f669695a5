"""An LLM's readings of the items' texts, as a model keeps them: fixed, or of an LLM that is trained with it."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from simgr_jax.devices import sharding
from simgr_jax.models.model_inputs import Catalog, Memory
from simgr_jax.models.text_reader import TextReader


class ItemReadings(nnx.Module):
    """Fixed readings.

    Attributes:
      table: [N, X], padded at the end if the catalog is split.
    """

    def __init__(self, readings: Float[np.ndarray, "N X"], dtype: str):
        self.table: Catalog | Memory = Catalog(_padded(readings, dtype), axes=("items", None))

    @property
    def width(self) -> int:
        return self.table.shape[1]

    def of(self, items: Int[Array, "*M"]) -> Float[Array, "*M X"]:
        return self.table[items]


class Fresh(NamedTuple):
    """The readings that one training step makes.

    Attributes:
      items: [M].
      readings: [M, X], float32.
      is_one: whether `items` has an item here, and not at another place.
      place: [N], of each item in `items`; -1 for those that are not there.
      share_of_batch, share_of_others: the chances that an item of the batch was read as such, and that any item was
        read as one of the others.
    """

    items: Int[Array, " M"]
    readings: Float[Array, "M X"]
    is_one: Bool[Array, " M"]
    place: Int[Array, " N"]
    share_of_batch: Float[Array, ""]
    share_of_others: Float[Array, ""]


class TrainedReadings(ItemReadings):
    """Readings of an LLM that is trained with the model (HLLM, https://arxiv.org/abs/2409.12740).

    Reading the whole catalog at each step would cost too much. So a step reads some texts, from which the LLM learns,
    and remembers these readings for the steps to come. What the model learns from the whole catalog, it learns from the
    readings that it remembers.

    Attributes:
      fresh: what this step has read, within a step.
    """

    def __init__(self, readings: Float[np.ndarray, "N X"], dtype: str, reader: TextReader):
        """readings: before training."""
        self.table = Memory(_padded(readings, dtype), axes=("items", None))
        self.reader = reader
        self.fresh = nnx.data(None)

    def of(self, items: Int[Array, "*M"]) -> Float[Array, "*M X"]:
        if self.fresh is None:
            return self.table[items]
        place = self.fresh.place[items]
        remembered = self.table[items].astype(jnp.float32)
        return jnp.where((place >= 0)[..., None], self.fresh.readings[place], remembered)

    def read_some(self, items: Int[Array, " K"], num_items: int, key: Array) -> Fresh:
        """Reads as many of the items as fit, chosen at random, and if there is room, random items of the catalog.

        Until `fresh` is None again, `of` gives these readings.

        Args:
          items: those of the batch; -1 is none.
          num_items: N.
        """
        count, (for_order, for_others) = self.reader.count, jax.random.split(key)
        distinct = jnp.unique(items, size=len(items), fill_value=-1)
        order = jnp.argsort(jax.random.uniform(for_order, distinct.shape) + (distinct < 0))
        in_batch = jnp.sum(distinct >= 0)
        distinct = jnp.pad(distinct[order], (0, max(count - len(items), 0)), constant_values=-1)[:count]
        items = jnp.where(distinct >= 0, distinct, jax.random.randint(for_others, (count,), 0, num_items))
        readings, was_read = self.reader(items)
        nowhere, numbers = len(self.table), jnp.arange(count, dtype=jnp.int32)
        place = jnp.full(nowhere, -1, jnp.int32)
        place = place.at[jnp.where(was_read, items, nowhere)].set(numbers, mode="drop")
        is_one = was_read & (place[items] == numbers)
        share_of_batch = jnp.sum(was_read & (distinct >= 0)) / jnp.maximum(in_batch, 1)
        share_of_others = -jnp.expm1(-jnp.sum(was_read & (distinct < 0)) / num_items)
        fresh = Fresh(items, readings, is_one, place, share_of_batch, share_of_others)
        self.fresh = fresh
        # Only later steps look these up in the table.
        known = jax.lax.stop_gradient(readings).astype(self.table.dtype)
        self.table[...] = self.table.at[jnp.where(is_one, items, nowhere)].set(known, mode="drop")
        return fresh

    def read_all(self) -> None:
        """Reads the whole catalog, in parts, so that memory does not grow with it."""

        def read(table: Float[Array, "N X"], items: Int[Array, " M"]) -> tuple[Float[Array, "N X"], None]:
            readings, was_read = self.reader(items)
            table = table.at[jnp.where(was_read, items, len(table))].set(readings.astype(table.dtype), mode="drop")
            return sharding.constrain(table, "items", None), None

        self.table[...] = jax.lax.scan(read, jnp.zeros_like(self.table[...]), self.reader.parts[...])[0]


def _padded(readings: Float[np.ndarray, "N X"], dtype: str) -> Float[Array, "N_padded X"]:
    return jnp.pad(jnp.asarray(readings, dtype), ((0, -len(readings) % sharding.shards("items")), (0, 0)))
