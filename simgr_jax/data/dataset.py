"""The arrays that `data/` hands over: sequences, the dataset with its catalog, and its split."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Ragged int32 sequences stored flat: sequence s is `values[offsets[s]:offsets[s + 1]]`.

    Attributes:
      values: int32 [E], item indices of all sequences, one after the other.
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


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Everything a reader returns. Users and items are known by their index from here on.

    Attributes:
      name: what reports call this dataset.
      user_ids: [U], the users' ids as the files have them.
      item_ids: [N], the catalog: the items' ids as the files have them.
      sequences: a sequence a user, item indices from the oldest to the newest.
      timestamps: int64 [E] seconds, aligned with `sequences.values`, or None where the files have only an order.
      item_texts: [N], an item's text, or None.
      codes: int32 [N, L], ready-made semantic IDs, or None.
      codebook_sizes: [L], one more than the largest possible code of each level; empty without codes.
      parts: uint8 [E], aligned with `sequences.values`: 0 train, 1 validation, 2 test, for datasets published
        with their split; None otherwise.
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

    @property
    def num_items(self) -> int:
        return len(self.item_ids)


@dataclasses.dataclass(frozen=True)
class EvaluationCases:
    """C questions "what comes next?", with their answers.

    Attributes:
      users: int32 [C], whose history it is (an index into `Dataset.user_ids`).
      histories: C sequences, oldest item first, never empty.
      targets: int32 [C], the item that came next.
    """

    users: np.ndarray
    histories: Sequences
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, chosen: Sequence[int]) -> EvaluationCases:
        """The cases at these places, in this order."""
        histories = Sequences.from_lists(self.histories[case] for case in chosen)
        return EvaluationCases(self.users[chosen], histories, self.targets[chosen])


@dataclasses.dataclass(frozen=True)
class Split:
    """What trains, what selects the model, and what judges it once.

    Attributes:
      train: sequences of at least two items; nothing else may be seen in training (also by semantic IDs that are
        learned from interactions).
      validation: selects the model.
      test: is read once.
    """

    train: Sequences
    validation: EvaluationCases
    test: EvaluationCases
