"""Histories as callers give them, lists of ids or frames, and the recommendations that answer them."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

import ml_collections
import numpy as np
import polars as pl
from jaxtyping import Float, Int

from simgr_jax.data.dataset import Dataset, EvaluationCases, Sequences
from simgr_jax.data.interactions import by_rank, tie_order
from simgr_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Recommendations:
    """The top-K items of B histories. Indexing and iterating give a history's list of (item id, score).

    Attributes:
      items: B lists of item ids, best first; a list is shorter than K if nothing else may be recommended.
      scores: float32 [B, K]; NaN after the end of a shorter list, and for the popular items that a history without any
        known item gets.
      unknown: how many ids of the histories are not in the catalog.
      popular: the indices of the histories without any known item, whose lists are the most popular items.
    """

    items: list[list[str]]
    scores: Float[np.ndarray, "B K"]
    unknown: int
    popular: list[int]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> list[tuple[str, float]]:
        return list(zip(self.items[index], self.scores[index].tolist(), strict=False))

    def __iter__(self) -> Iterator[list[tuple[str, float]]]:
        return (self[index] for index in range(len(self)))


@dataclasses.dataclass(frozen=True)
class Histories:
    """B histories to continue.

    Attributes:
      item_ids: [N], the catalog.
      sequences: the known items of each history, as indices, oldest first.
      unknown: how many ids were left out.
      users: [B], the users of a frame; None for lists.
      columns: the frame's names for user and item.
      is_pandas: whether the frame was a pandas frame.
    """

    item_ids: Sequence[str]
    sequences: Sequences
    unknown: int
    users: Sequence[Any] | None = None
    columns: tuple[str, str] = ("user", "item")
    is_pandas: bool = False

    @classmethod
    def read(cls, histories: Any, dataset: Dataset, columns: ml_collections.ConfigDict) -> Histories:
        """
        Args:
          histories: lists of item ids, or a polars or pandas frame.
          columns: the names `user`, `item` and `timestamp` of a frame's columns.

        Raises:
          UserError: the frame lacks a column or a value, or the histories are not lists.
        """
        if isinstance(histories, pl.DataFrame):
            return cls._of_frame(histories, dataset, columns, is_pandas=False)
        kind = type(histories)
        if kind.__module__.partition(".")[0] == "pandas" and kind.__name__ == "DataFrame":
            return cls._of_frame(pl.from_pandas(histories), dataset, columns, is_pandas=True)
        if not isinstance(histories, Iterable) or isinstance(histories, str | bytes | Mapping):
            raise UserError(
                f"histories: a {kind.__name__} is not a list of histories; give lists of item ids, or a frame"
            )
        histories = list(histories)
        for history in histories:
            if not isinstance(history, Iterable) or isinstance(history, str | bytes | Mapping | Set):
                what = "string" if isinstance(history, str) else type(history).__name__
                raise UserError(f"histories: a {what} is not a history; give a list of lists of item ids")
        return cls.of_lists(histories, dataset)

    @classmethod
    def of_lists(cls, histories: Iterable[Iterable[Any]], dataset: Dataset) -> Histories:
        """histories: lists of item ids."""
        return cls(dataset.item_ids, *_known(histories, dataset.item_index))

    @classmethod
    def _of_frame(
        cls, frame: pl.DataFrame, dataset: Dataset, columns: ml_collections.ConfigDict, is_pandas: bool
    ) -> Histories:
        user, item, timestamp = columns.user, columns.item, columns.timestamp
        for name in (user, item):
            if name not in frame.columns:
                raise UserError(f"histories: the frame has no column {name!r}, only {', '.join(frame.columns)}")
        used = [name for name in (user, item, timestamp) if name in frame.columns]
        for name in used:
            kind = frame.schema[name]
            if nulls := frame[name].null_count():
                raise UserError(f"histories: {nulls} rows have no {name!r}; fill them in, or leave them out")
            if kind.is_nested() or (name == timestamp and not (kind.is_numeric() or kind.is_temporal())):
                raise UserError(f"histories: column {name!r} is of type {kind}; give ids and times as plain values")
        rows, items = frame.select(user=pl.col(user), item=pl.col(item).cast(pl.String)), pl.col("item")
        if timestamp in used:
            # Ties are broken as in training.
            tie = tie_order(by_rank(rows["user"].cast(pl.String)), by_rank(rows["item"]))
            rows = rows.with_columns(time=frame[timestamp], tie=tie).sort("time", maintain_order=True)
            items = items.sort_by("time", "tie")
        grouped = rows.group_by("user", maintain_order=True).agg(items)
        sequences, unknown = _known(grouped["item"].to_list(), dataset.item_index)
        return cls(dataset.item_ids, sequences, unknown, grouped["user"].to_list(), (user, item), is_pandas)

    def warn_of_unknown(self) -> None:
        """Warns if ids were left out."""
        if self.unknown:
            warnings.warn(f"{self.unknown} ids of the histories are not in the catalog and were left out", stacklevel=3)

    def cases(self) -> EvaluationCases:
        """A case for each history with a known item. `users` are the histories' indices; targets mean nothing."""
        chosen = np.flatnonzero(self.sequences.lengths > 0).astype(np.int32)
        known = Sequences.from_lengths(self.sequences.values, self.sequences.lengths[chosen])
        return EvaluationCases(chosen, known, np.zeros_like(chosen))

    def recommendations(
        self, items: Int[np.ndarray, "C K"], scores: Float[np.ndarray, "C K"], popular: Int[np.ndarray, " K"]
    ) -> Recommendations:
        """The recommendations for all histories.

        Args:
          items, scores: the lists of `cases`, -1 in empty slots.
          popular: the items for histories without a case.
        """
        has_case = self.sequences.lengths > 0
        every = np.tile(popular, (len(self.sequences), 1))
        every[has_case] = items
        all_scores = np.full(every.shape, np.nan, np.float32)
        all_scores[has_case] = np.where(items >= 0, scores, np.nan)
        ids = [[self.item_ids[item] for item in row if item >= 0] for row in every]
        return Recommendations(ids, all_scores, self.unknown, np.flatnonzero(~has_case).tolist())

    def answer(self, found: Recommendations) -> Any:
        """The recommendations, as a frame if the histories were one."""
        if self.users is None:
            return found
        user, item = self.columns
        lengths = [len(row) for row in found.items]
        frame = pl.DataFrame(
            {
                user: [one for one, length in zip(self.users, lengths, strict=True) for _ in range(length)],
                "rank": [rank for length in lengths for rank in range(1, length + 1)],
                item: [one for row in found.items for one in row],
                "score": [score for row in found for _, score in row],
            }
        )
        return frame.to_pandas() if self.is_pandas else frame


def _known(histories: Iterable[Iterable[Any]], index: Mapping[str, int]) -> tuple[Sequences, int]:
    """The histories as indices, without unknown ids; and the number of unknown ids."""
    found, unknown = [], 0
    for history in histories:
        numbers = [index.get(str(item), -1) for item in history]
        unknown += numbers.count(-1)
        found.append([number for number in numbers if number >= 0])
    return Sequences.from_lists(found), unknown
