"""Builds a dataset from a table of interactions, and filters a dataset to its k-core."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping

import numpy as np
import polars as pl
from jaxtyping import Bool, Int, UInt64

from simgr_jax.data.dataset import Dataset, Sequences
from simgr_jax.errors import UserError


def from_frame(
    frame: pl.DataFrame,
    name: str,
    k_core: int = 0,
    item_texts: Mapping[str, str] | None = None,
    keep_cold_items: bool = False,
) -> Dataset:
    """Builds a dataset from a log. The order of the log's rows doesn't matter.

    Duplicates (same user, item and timestamp) count once. A user's items are sorted by timestamp, and at the same time
    by `tie_order`. Users and items are sorted by id. The catalog holds the items that remain after k-core filtering.

    Args:
      frame: one row per interaction, with columns `user` and `item` (strings) and `timestamp` (a number), no nulls.
      k_core: see `k_core`; 0 keeps everything.
      item_texts: text by item id; an item without one gets an empty text.
      keep_cold_items: whether the catalog also holds the items of `item_texts` that no interaction is left of.

    Raises:
      UserError: no interaction survives k-core filtering.
    """
    cold_items = pl.Series(list(item_texts or ()) if keep_cold_items else [], dtype=pl.String)
    user_column, item_column = by_rank(frame["user"]), by_rank(frame["item"], cold_items)
    user_ids, item_ids = user_column.dtype.categories, item_column.dtype.categories
    frame = frame.select(
        "timestamp",
        user=user_column.to_physical().cast(pl.Int32),
        item=item_column.to_physical().cast(pl.Int32),
        tie=tie_order(user_column, item_column),
    ).sort("user", "timestamp", "tie", "item")
    del user_column, item_column
    users, items, timestamps = (frame[column].to_numpy() for column in ("user", "item", "timestamp"))
    del frame

    keep = _differs_from_previous(users, items, timestamps)
    notes = _repeats_note(keep)
    users, items, timestamps = users[keep], items[keep], timestamps[keep]
    before = len(user_ids), len(item_ids), len(users)
    if k_core:
        keep = _k_core_or_error(users, items, k_core)
        users, items, timestamps = users[keep], items[keep], timestamps[keep]
    users, user_exists = _renumber(users, len(user_ids))
    items, item_exists = _renumber(items, len(item_ids), item_ids.is_in(cold_items.implode()).to_numpy())
    notes += _k_core_note(k_core, before, (user_exists.sum(), item_exists.sum(), len(users)))
    item_ids = item_ids.filter(pl.Series(item_exists)).to_list()
    return Dataset(
        name=name,
        user_ids=user_ids.filter(pl.Series(user_exists)).to_list(),
        item_ids=item_ids,
        sequences=Sequences.from_lengths(items, np.bincount(users)),
        timestamps=timestamps,
        item_texts=None if item_texts is None else [item_texts.get(item, "") for item in item_ids],
        notes=notes,
    )


def by_rank(ids: pl.Series, more: pl.Series | None = None) -> pl.Series:
    """Ids as an Enum, whose physical value is the id's rank: 4 bytes instead of a string.

    Args:
      ids, more: strings without nulls. The categories are the distinct ids of both.
    """
    distinct = ids.unique() if more is None else pl.concat([ids.unique(), more]).unique()
    return ids.cast(pl.Enum(distinct.sort()))


def tie_order(users: pl.Series, items: pl.Series) -> UInt64[np.ndarray, " E"]:
    """A number of each interaction, by which a user's interactions at the same time are sorted.

    It is a hash of the two ids, the same on every machine. A rule that models can learn, such as the order of the
    items' ids, would make evaluation on tied interactions too easy. The hash mixes the ids' 8-byte BLAKE2b digests by
    SplitMix64 (Steele et al., OOPSLA 2014), so two items of a user tie only if their digests are equal.

    Args:
      users, items: ids, as `by_rank` returns them.
    """
    mixed = _digests(items)
    mixed *= np.uint64(0x9E3779B97F4A7C15)
    mixed ^= _digests(users)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed ^= mixed >> np.uint64(shift)
        mixed *= np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def _digests(ids: pl.Series) -> UInt64[np.ndarray, " E"]:
    distinct = (hashlib.blake2b(name.encode(), digest_size=8).digest() for name in ids.dtype.categories)
    return np.frombuffer(b"".join(distinct), "<u8").astype(np.uint64)[ids.to_physical().to_numpy()]


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
    before = len(dataset.user_ids), dataset.num_items, len(values)
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
        notes=dataset.notes + _k_core_note(k, before, (user_exists.sum(), item_exists.sum(), len(users))),
    )


def _k_core_or_error(users: np.ndarray, items: np.ndarray, k: int) -> np.ndarray:
    keep = k_core(users, items, k)
    if not keep.any():
        raise UserError(f"config.data.k_core: {k} leaves no interactions; use a smaller value")
    return keep


def _k_core_note(k: int, before: tuple[int, int, int], after: tuple[int, int, int]) -> tuple[str, ...]:
    """What k-core filtering left out, given the numbers of users, items and interactions; () if nothing."""
    if before == after:
        return ()
    users, items, interactions = (f"{old - new:,} of {old:,}" for old, new in zip(before, after, strict=True))
    return (f"config.data.k_core={k} leaves out {users} users, {items} items and {interactions} interactions",)


def _repeats_note(keep: np.ndarray) -> tuple[str, ...]:
    """keep: bool [E], whether each interaction is the first of its user, item and timestamp."""
    repeats = len(keep) - np.count_nonzero(keep)
    if not repeats:
        return ()
    return (f"{repeats:,} of {len(keep):,} interactions repeat another's user, item and timestamp, and are left out",)


def _differs_from_previous(*columns: np.ndarray) -> np.ndarray:
    """bool [E]: whether each row differs from the row before it. columns: [E] each."""
    differs = np.ones(len(columns[0]), dtype=bool)
    differs[1:] = np.logical_or.reduce([column[1:] != column[:-1] for column in columns])
    return differs


def _renumber(index: np.ndarray, size: int, keep: np.ndarray | bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Closes the gaps in `index`, int [E] below `size`, except those that `keep`, bool [size], names.

    Returns:
      int32 [E], the new indices in the same order, and bool [size], whether each old index has a new one.
    """
    exists = (np.bincount(index, minlength=size) > 0) | keep
    return (np.cumsum(exists, dtype=np.int32) - 1)[index].astype(np.int32), exists
