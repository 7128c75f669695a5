"""Builds a dataset from a table of interactions, and filters a dataset to its k-core."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import polars as pl
from jaxtyping import Bool, Int

from simgr_jax.data.dataset import Dataset, Sequences
from simgr_jax.errors import UserError


def from_frame(frame: pl.DataFrame, name: str, k_core: int = 0, item_texts: Mapping[str, str] | None = None) -> Dataset:
    """Builds a dataset from a log. The order of the log's rows doesn't matter.

    Duplicates (same user, item and timestamp) count once. A user's items are sorted by (timestamp, item id), so ties
    in time are always broken the same way. Users and items are sorted by id. The catalog holds the items that remain
    after k-core filtering.

    Args:
      frame: one row per interaction, with columns `user` and `item` (strings) and `timestamp` (a number), no nulls.
      k_core: see `k_core`; 0 keeps everything.
      item_texts: text by item id; an item without one gets an empty text.

    Raises:
      UserError: no interaction survives k-core filtering.
    """
    ids, columns = {}, {}
    for column in ("user", "item"):
        # With the sorted ids as categories, each id becomes its rank: 4 bytes instead of a string.
        ids[column] = frame[column].unique().sort()
        columns[column] = frame[column].cast(pl.Enum(ids[column])).to_physical().cast(pl.Int32)
    frame = frame.select("timestamp").with_columns(**columns).sort("user", "timestamp", "item")
    users, items, timestamps = (frame[column].to_numpy() for column in ("user", "item", "timestamp"))
    del frame, columns

    keep = _differs_from_previous(users, items, timestamps)
    users, items, timestamps = users[keep], items[keep], timestamps[keep]
    if k_core:
        keep = _k_core_or_error(users, items, k_core)
        users, items, timestamps = users[keep], items[keep], timestamps[keep]
    users, user_exists = _renumber(users, len(ids["user"]))
    items, item_exists = _renumber(items, len(ids["item"]))
    item_ids = ids["item"].filter(pl.Series(item_exists)).to_list()
    return Dataset(
        name=name,
        user_ids=ids["user"].filter(pl.Series(user_exists)).to_list(),
        item_ids=item_ids,
        sequences=Sequences.from_lengths(items, np.bincount(users)),
        timestamps=timestamps.astype(np.int64),
        item_texts=None if item_texts is None else [item_texts.get(item, "") for item in item_ids],
    )


def k_core(users: Int[np.ndarray, " E"], items: Int[np.ndarray, " E"], k: int) -> Bool[np.ndarray, " E"]:
    """Whether each interaction is in the k-core, the largest subset in which every user and item has at least k.

    Removes the users and items with fewer than k interactions until none are left. Repeated interactions all count.
    """
    mask = np.zeros(len(users), dtype=bool)
    kept = np.arange(len(users))
    while True:
        enough = (np.bincount(users)[users] >= k) & (np.bincount(items)[items] >= k)
        if enough.all():
            mask[kept] = True
            return mask
        kept, users, items = kept[enough], users[enough], items[enough]


def filter_k_core(dataset: Dataset, k: int) -> Dataset:
    """Filters a dataset to its k-core, and drops all users and items outside it.

    Raises:
      UserError: nothing is left.
    """
    values, lengths = dataset.sequences.values, dataset.sequences.lengths
    users = np.repeat(np.arange(len(lengths)), lengths)
    keep = _k_core_or_error(users, values, k)
    users, user_exists = _renumber(users[keep], len(dataset.user_ids))
    items, item_exists = _renumber(values[keep], dataset.num_items)

    def pick(rows: list[str], exists: np.ndarray) -> list[str]:
        return [rows[i] for i in np.flatnonzero(exists)]

    return dataclasses.replace(
        dataset,
        user_ids=pick(dataset.user_ids, user_exists),
        item_ids=pick(dataset.item_ids, item_exists),
        sequences=Sequences.from_lengths(items, np.bincount(users)),
        timestamps=None if dataset.timestamps is None else dataset.timestamps[keep],
        item_texts=None if dataset.item_texts is None else pick(dataset.item_texts, item_exists),
        codes=None if dataset.codes is None else dataset.codes[item_exists],
        parts=None if dataset.parts is None else dataset.parts[keep],
    )


def _k_core_or_error(users: np.ndarray, items: np.ndarray, k: int) -> np.ndarray:
    keep = k_core(users, items, k)
    if not keep.any():
        raise UserError(f"config.data.k_core: {k} leaves no interactions; use a smaller value")
    return keep


def _differs_from_previous(*columns: np.ndarray) -> np.ndarray:
    """bool [E]: whether each row differs from the row before it. columns: [E] each."""
    differs = np.ones(len(columns[0]), dtype=bool)
    differs[1:] = np.logical_or.reduce([column[1:] != column[:-1] for column in columns])
    return differs


def _renumber(index: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Closes the gaps in `index`, int [E] below `size`.

    Returns:
      int32 [E], the new indices in the same order, and bool [size], whether each old index occurs.
    """
    exists = np.bincount(index, minlength=size) > 0
    return (np.cumsum(exists, dtype=np.int32) - 1)[index].astype(np.int32), exists
