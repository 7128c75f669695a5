"""Three ways to split a dataset's interactions into train, validation and test."""

from __future__ import annotations

import logging

import numpy as np
from jaxtyping import Int, UInt8

from simgr_jax.data.dataset import Dataset, EvaluationCases, Sequences, Split
from simgr_jax.errors import UserError

TRAIN, VALIDATION, TEST = 0, 1, 2  # as in Dataset.parts


def leave_one_out(dataset: Dataset) -> Split:
    """Each user's last item is for test, the one before it for validation, and the rest for training.

    A user with fewer than 3 items has no case; the items are for training. A warning says how many these are.

    Raises:
      UserError: no user has 3 items, or no two items of a user are left to train on.
    """
    lengths, ends = dataset.sequences.lengths, dataset.sequences.offsets[1:]
    is_long = lengths >= 3
    parts = np.zeros(len(dataset.sequences.values), dtype=np.uint8)
    parts[ends[is_long] - 2], parts[ends[is_long] - 1] = VALIDATION, TEST
    split = _split(dataset, parts, "give users with 4 interactions or more")
    if not is_long.all():
        logging.getLogger(__name__).warning(
            "config.data.split: leave_one_out needs 3 items per user; %s of %s users have fewer and are left out of "
            "validation and test, and the %s among them with one item train nothing",
            *(f"{count:,}" for count in (np.count_nonzero(~is_long), len(lengths), np.count_nonzero(lengths == 1))),
        )
    return split


def temporal(dataset: Dataset, validation_fraction: float, test_fraction: float) -> Split:
    """The newest interactions of all users are for test, the ones just before for validation, the rest for training.

    The two cuts are points in time: `test_fraction` of all interactions are at or after the second, and
    `validation_fraction` are between the two. Interactions at the very time of a cut all fall on its later side. Each
    interaction after a cut is one case, with all earlier items of its user as the history. A user's first interaction
    has no history, so it is not a case.

    Raises:
      UserError: the dataset has no timestamps, the fractions leave nothing to train on, or a part is empty.
    """
    if dataset.timestamps is None:
        raise UserError("config.data.split: temporal needs timestamps, but this format has none; use leave_one_out")
    for key, fraction in (("validation_fraction", validation_fraction), ("test_fraction", test_fraction)):
        if not 0 < fraction < 1:
            raise UserError(f"config.data.{key}: {fraction} is not between 0 and 1; use e.g. 0.1")
    if validation_fraction + test_fraction >= 1:
        raise UserError(
            f"config.data.test_fraction: with validation_fraction it adds up to "
            f"{validation_fraction + test_fraction:g}, which leaves nothing to train on; use e.g. 0.1 for each"
        )
    in_order = np.sort(dataset.timestamps)
    num_train = round(len(in_order) * (1 - validation_fraction - test_fraction))
    num_before_test = round(len(in_order) * (1 - test_fraction))
    cuts = in_order[np.minimum([num_train, num_before_test], len(in_order) - 1)]
    parts = np.searchsorted(cuts, dataset.timestamps, side="right").astype(np.uint8)
    return _split(dataset, parts, "change config.data.validation_fraction and config.data.test_fraction")


def given(dataset: Dataset) -> Split:
    """The split that the data was published with. As in `temporal`, each interaction is one case.

    Raises:
      UserError: the dataset has no split of its own, or a part of it is empty.
    """
    if dataset.parts is None:
        raise UserError("config.data.split: this data has no split of its own; use leave_one_out or temporal")
    return _split(dataset, dataset.parts, "use another config.data.split")


def _split(dataset: Dataset, parts: UInt8[np.ndarray, " E"], remedy: str) -> Split:
    """parts: aligned with `dataset.sequences.values`, never decreasing within a user's sequence."""
    sequences = dataset.sequences
    users = np.repeat(np.arange(len(sequences), dtype=np.int32), sequences.lengths)
    train_lengths = np.bincount(users[parts == TRAIN], minlength=len(sequences))
    trains = train_lengths >= 2
    train = Sequences.from_lengths(sequences.values[(parts == TRAIN) & trains[users]], train_lengths[trains])
    has_history = np.ones(len(parts), dtype=bool)
    has_history[sequences.offsets[:-1]] = False

    def cases(part: int) -> EvaluationCases:
        positions = np.flatnonzero((parts == part) & has_history)
        starts = sequences.offsets[users[positions]]
        histories = _slices(sequences.values, starts, positions - starts)
        times = dataset.timestamps
        tied = None if times is None else times[positions] == times[positions - 1]
        return EvaluationCases(users[positions], histories, sequences.values[positions], tied)

    split = Split(train, cases(VALIDATION), cases(TEST))
    for name, part in (("train on", split.train), ("validate on", split.validation), ("test on", split.test)):
        if len(part) == 0:
            raise UserError(f"config.data.split: leaves nothing to {name}; {remedy}")
    return split


def _slices(values: Int[np.ndarray, " E"], starts: Int[np.ndarray, " S"], lengths: Int[np.ndarray, " S"]) -> Sequences:
    """Sequence s is `values[starts[s] : starts[s] + lengths[s]]`."""
    offsets = np.cumsum(lengths) - lengths
    return Sequences.from_lengths(values[np.repeat(starts - offsets, lengths) + np.arange(lengths.sum())], lengths)
