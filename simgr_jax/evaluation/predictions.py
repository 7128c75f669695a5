"""Recommendations as a file of JSON lines, `{"user": "A1", "items": ["B7", "B2", ...]}`, best item first.

Through such files, the same code judges any system's output. A user with several evaluation cases (temporal split) has
one line per case, in the order of the cases; other users' lines may come between them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from simgr_jax.data.dataset import Dataset, EvaluationCases
from simgr_jax.errors import UserError
from simgr_jax.evaluation.protocols import FILTERED, LEFT_IN
from simgr_jax.ops.top_k import Ranking
from simgr_jax.workdir.atomic_write import atomic_path


def read(path: Path, dataset: Dataset, cases: EvaluationCases, k: int) -> dict[str, Ranking]:
    """Reads a predictions file and matches it with the evaluation cases.

    A list shorter than k is allowed, with a warning: a target that it doesn't name counts as missed. A list may also
    become too short when history items are taken out of it, so lists that contain history items should be longer.

    Args:
      k: only the first k items of a list count.

    Returns:
      The lists' Ranking by protocol: items int32 [C, K], K the longest list and at least k, -1 in empty slots; ranks
      float32 [C] from 1, inf where the target is not in its list.

    Raises:
      UserError: the file can't be read or is empty; a line is not of the form above; a line names an unknown user or
        item, a user without an open case, or an item twice; or a case has no line.
    """
    known_users = set(dataset.user_ids)
    open_cases: dict[str, list[int]] = {}
    for case in reversed(range(len(cases))):  # A user's first case ends up last, for pop().
        open_cases.setdefault(dataset.user_ids[cases.users[case]], []).append(case)

    lists: dict[int, list[int]] = {}
    for where, user, items in _lines(path):
        if user not in known_users:
            raise UserError(f"{where}: unknown user {user!r}; use the user ids of dataset {dataset.name!r}")
        if user not in open_cases:
            raise UserError(f"{where}: user {user!r} has no case in this split; remove the line")
        if not open_cases[user]:
            raise UserError(f"{where}: user {user!r} has more lines than evaluation cases; keep one line per case")
        lists[open_cases[user].pop()] = _item_indices(where, items, dataset.item_index)
    if not lists:
        raise UserError(f'{path}: is empty; write a line {{"user": ..., "items": [...]}} for each evaluation case')
    if len(lists) < len(cases):
        missing = len(cases) - len(lists)
        user = next(user for user, unanswered in open_cases.items() if unanswered)
        raise UserError(
            f"{path}: {missing} of {len(cases)} evaluation cases have no line, among them user {user!r}; "
            "write a line for each"
        )
    return _rankings(path, lists, cases, k)


def write(path: Path, dataset: Dataset, cases: EvaluationCases, items: Int[np.ndarray, "C K"]) -> None:
    """Writes recommendations in the form that `read` takes, without empty slots (-1)."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        for user, row in zip(cases.users, np.asarray(items), strict=True):
            line = {"user": dataset.user_ids[user], "items": [dataset.item_ids[i] for i in row if i >= 0]}
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")


def _lines(path: Path) -> Iterator[tuple[str, str, list[str]]]:
    """Yields (FILE:LINE, user, items) with ids as strings; blank lines are skipped."""
    try:
        with path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield f"{path}:{number}", *_parse(f"{path}:{number}", line)
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); give a file of JSON lines") from error


def _parse(where: str, line: bytes) -> tuple[str, list[str]]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is not valid JSON in UTF-8 ({error}); write one JSON object per line") from error
    if not isinstance(record, dict):
        raise UserError(f'{where}: is not a JSON object; write {{"user": ..., "items": [...]}}')
    for key in ("user", "items"):
        if key not in record:
            raise UserError(f'{where}: has no {key!r}; write {{"user": ..., "items": [...]}}')
    if not isinstance(record["items"], list):
        raise UserError(f"{where}: 'items' is not a list; list item ids, the best first")
    return _id(where, record["user"]), [_id(where, item) for item in record["items"]]


def _id(where: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise UserError(f"{where}: {value!r} is not an id; write ids as strings")
    return str(value)


def _item_indices(where: str, items: list[str], item_index: dict[str, int]) -> list[int]:
    seen = set()
    for item in items:
        if item not in item_index:
            raise UserError(f"{where}: unknown item {item!r}; recommend items of the catalog only")
        if item in seen:
            raise UserError(f"{where}: item {item!r} is listed twice; list an item once")
        seen.add(item)
    return [item_index[item] for item in items]


def _rankings(path: Path, lists: dict[int, list[int]], cases: EvaluationCases, k: int) -> dict[str, Ranking]:
    every = [lists[case] for case in range(len(cases))]
    histories = (set(history.tolist()) for history in cases.histories)
    without = [[item for item in row if item not in history] for row, history in zip(every, histories, strict=True)]
    for what, rows in (("", every), (" without their history items", without)):
        if short := sum(len(row) < k for row in rows):
            logging.getLogger(__name__).warning(
                "%s: %d of %d lists%s have fewer than %d items; targets that they don't name count as missed",
                *(path, short, len(rows), what, k),
            )
    return {LEFT_IN: _ranking(every, cases, k), FILTERED: _ranking(without, cases, k)}


def _ranking(lists: list[list[int]], cases: EvaluationCases, k: int) -> Ranking:
    items = np.full((len(cases), max(k, *map(len, lists))), -1, dtype=np.int32)
    for case, row in enumerate(lists):
        items[case, : len(row)] = row
    is_target = items == cases.targets[:, None]
    ranks = np.where(is_target.any(axis=1), is_target.argmax(axis=1) + 1, np.inf)
    return Ranking(items, np.zeros(items.shape, np.float32), ranks.astype(np.float32))
