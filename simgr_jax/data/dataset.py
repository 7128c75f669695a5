"""A dataset, its interaction sequences and its split, as arrays."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Int


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Ragged int32 sequences stored flat: sequence s is `values[offsets[s]:offsets[s + 1]]`.

    Attributes:
      values: int32 [E], item indices of all sequences, concatenated.
      offsets: int64 [S + 1], where each sequence begins; `offsets[0] == 0`, `offsets[S] == E`.
    """

    values: np.ndarray
    offsets: np.ndarray

    @classmethod
    def from_lists(cls, sequences: Iterable[Iterable[int]]) -> Sequences:
        arrays = [np.asarray(sequence, dtype=np.int32) for sequence in sequences]
        lengths = np.array([len(a) for a in arrays], dtype=np.int64)
        return cls.from_lengths(np.concatenate(arrays) if arrays else np.zeros(0, np.int32), lengths)

    @classmethod
    def from_lengths(cls, values: np.ndarray, lengths: np.ndarray) -> Sequences:
        """values: int [E]; lengths: int [S] that sum to E."""
        offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        return cls(np.asarray(values, dtype=np.int32), offsets)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [S]."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[i] for i in range(len(self)))


def gather(
    values: Int[np.ndarray, " E"], begins: Int[np.ndarray, " S"], ends: Int[np.ndarray, " S"]
) -> tuple[Int[np.ndarray, " F"], Int[np.ndarray, " S"]]:
    """The slices `values[begin:end]`, one after the other, and where each ends in the result (the index after)."""
    new_ends = np.cumsum(ends - begins)
    index = np.repeat(ends - new_ends, ends - begins)
    index += np.arange(len(index))
    return values[index], new_ends


@dataclasses.dataclass(frozen=True)
class Dataset:
    """What a reader returns. From here on, users and items are known by their index.

    Attributes:
      name: shown in reports.
      user_ids: [U], the users' ids as in the files.
      item_ids: [N], the catalog: the items' ids as in the files.
      sequences: one sequence of item indices per user, oldest first.
      timestamps: int64 or float64 [E], aligned with `sequences.values`, in seconds (a log keeps its own unit); None if
        the files only give an order.
      item_texts: [N], one text per item, or None.
      codes: int32 [N, L], ready-made semantic IDs, or None.
      codebook_sizes: [L], the number of codes per level; empty without codes.
      parts: uint8 [E], aligned with `sequences.values`: 0 train, 1 validation, 2 test; None unless the dataset was
        published with a split.
      notes: what the reader left out, one sentence each. Every run that loads the data says it.
    """

    name: str
    user_ids: list[str]
    item_ids: list[str]
    sequences: Sequences
    timestamps: np.ndarray | None = None
    item_texts: list[str] | None = None
    codes: np.ndarray | None = None
    codebook_sizes: tuple[int, ...] = ()
    parts: np.ndarray | None = None
    notes: tuple[str, ...] = ()

    @property
    def num_items(self) -> int:
        return len(self.item_ids)

    @functools.cached_property
    def item_index(self) -> dict[str, int]:
        """Each item's place in `item_ids`."""
        return {item: place for place, item in enumerate(self.item_ids)}


@dataclasses.dataclass(frozen=True)
class EvaluationCases:
    """C evaluation cases: a user's history and the item that came next.

    Attributes:
      users: int32 [C], the user of each case (an index into `Dataset.user_ids`).
      histories: C sequences, oldest item first, never empty.
      targets: int32 [C], the item that came next.
      tied: bool [C], whether the target has the time of the item before it, so that their order is arbitrary; None if
        the data has no times.
    """

    users: np.ndarray
    histories: Sequences
    targets: np.ndarray
    tied: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, chosen: Sequence[int]) -> EvaluationCases:
        """The cases at the indices `chosen`, in that order."""
        histories = Sequences.from_lists(self.histories[case] for case in chosen)
        tied = None if self.tied is None else self.tied[chosen]
        return EvaluationCases(self.users[chosen], histories, self.targets[chosen], tied)


@dataclasses.dataclass(frozen=True)
class Split:
    """The training sequences and the evaluation cases of a dataset.

    Attributes:
      train: sequences of at least two items. Training sees nothing else, and neither do semantic IDs that are learned
        from interactions.
      validation: for selecting the model.
      test: for the final evaluation only.
    """

    train: Sequences
    validation: EvaluationCases
    test: EvaluationCases
