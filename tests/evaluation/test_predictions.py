import dataclasses
import json
import logging

import numpy as np
import pytest

from simgr_jax.data.dataset import Dataset, EvaluationCases, Sequences
from simgr_jax.errors import UserError
from simgr_jax.evaluation import predictions
from simgr_jax.evaluation.protocols import FILTERED, LEFT_IN

DATASET = Dataset(
    name="tiny",
    user_ids=["ann", "bob", "cyd", "7"],
    item_ids=[f"i{n}" for n in range(20)],
    sequences=Sequences.from_lists([[0, 1, 2]] * 4),
)
CASES = EvaluationCases(
    users=np.array([0, 1, 3], np.int32),
    histories=Sequences.from_lists([[0, 1]] * 3),
    targets=np.array([2, 5, 9], np.int32),
)
# All cases have the history i0, i1.
TEN = [f"i{n}" for n in range(10)]


def line(user, items=TEN):
    return json.dumps({"user": user, "items": items})


def write_lines(folder, *lines):
    path = folder / "predictions.jsonl"
    path.write_bytes(b"".join(one.encode() + b"\n" if isinstance(one, str) else one + b"\n" for one in lines))
    return path


def test_lines_in_any_order_are_lined_up_with_the_cases(tmp_path):
    path = write_lines(tmp_path, line(7, TEN[::-1]), "", line("bob", TEN[:3]), line("ann", [*TEN, "i10", "i11"]))
    items, _, ranks = predictions.read(path, DATASET, CASES, 10)[LEFT_IN]
    assert items.dtype == np.int32 and ranks.dtype == np.float32
    np.testing.assert_array_equal(items[0], range(12))
    np.testing.assert_array_equal(items[1], [0, 1, 2] + [-1] * 9)
    np.testing.assert_array_equal(items[2], [*range(9, -1, -1), -1, -1])
    np.testing.assert_array_equal(ranks, [3, np.inf, 1])


def test_filtered_lists_are_those_without_the_history_items(tmp_path):
    # The second target is in its history.
    cases = dataclasses.replace(CASES, targets=np.array([2, 1, 9], np.int32))
    path = write_lines(tmp_path, line("ann", [*TEN, "i10"]), line("bob", ["i1", "i5"]), line(7, TEN[::-1]))
    items, _, ranks = predictions.read(path, DATASET, cases, 10)[FILTERED]
    np.testing.assert_array_equal(items[0], [*range(2, 11), -1])
    np.testing.assert_array_equal(items[1], [5] + [-1] * 9)
    np.testing.assert_array_equal(items[2], [*range(9, 1, -1), -1, -1])
    np.testing.assert_array_equal(ranks, [1, np.inf, 1])


def test_what_is_written_is_read_back(tmp_path):
    generator = np.random.default_rng(0)
    items = np.stack([generator.permutation(20)[:12] for _ in range(3)]).astype(np.int32)
    items[1, 4:] = -1
    path = tmp_path / "new folder" / "predictions.jsonl"
    predictions.write(path, DATASET, CASES, items)
    read_items, _, ranks = predictions.read(path, DATASET, CASES, 10)[LEFT_IN]
    np.testing.assert_array_equal(read_items, items)
    for rank, row, target in zip(ranks, items.tolist(), CASES.targets, strict=True):
        assert rank == (row.index(target) + 1 if target in row else np.inf)
    assert [p.name for p in path.parent.iterdir()] == ["predictions.jsonl"]


def test_a_users_lines_answer_its_cases_in_their_order(tmp_path):
    """In a temporal split a user may have several cases."""
    cases = EvaluationCases(
        np.array([1, 0, 1], np.int32), Sequences.from_lists([[0]] * 3), np.array([4, 5, 6], np.int32)
    )
    path = write_lines(tmp_path, line("bob", ["i4"]), line("bob", ["i1", "i6"]), line("ann", ["i5"]))
    _, _, ranks = predictions.read(path, DATASET, cases, 10)[LEFT_IN]
    np.testing.assert_array_equal(ranks, [1, 1, 2])


TWELVE = [f"i{n}" for n in range(12)]


def test_short_lists_give_a_warning(tmp_path, caplog):
    path = write_lines(tmp_path, line("ann", TWELVE), line("bob", TWELVE[:9]), line("7", []))
    with caplog.at_level(logging.WARNING):
        predictions.read(path, DATASET, CASES, 10)
    rest = "have fewer than 10 items; targets that they don't name count as missed"
    assert caplog.messages == [
        f"{path}: 2 of 3 lists {rest}",
        f"{path}: 2 of 3 lists without their history items {rest}",
    ]


def test_lists_that_are_short_only_without_their_history_give_a_warning(tmp_path, caplog):
    path = write_lines(tmp_path, line("ann"), line("bob", TWELVE), line("7", TWELVE))
    with caplog.at_level(logging.WARNING):
        predictions.read(path, DATASET, CASES, 10)
    (message,) = caplog.messages
    assert "1 of 3 lists without their history items have fewer than 10" in message


def test_full_lists_give_no_warning(tmp_path, caplog):
    predictions.read(write_lines(tmp_path, *(line(user, TWELVE) for user in ("ann", "bob", "7"))), DATASET, CASES, 10)
    assert not caplog.messages


def test_lists_are_as_long_as_is_asked_for(tmp_path):
    path = write_lines(tmp_path, *(line(user, TEN[:3]) for user in ("ann", "bob", "7")))
    for ranking in predictions.read(path, DATASET, CASES, 15).values():
        assert ranking.items.shape == (3, 15)


@pytest.mark.parametrize(
    ("second_line", "message"),
    [
        ('{"user": "bob", "items": [', "is not valid JSON in UTF-8"),
        (b'{"user": "b\xffb", "items": []}', "is not valid JSON in UTF-8"),
        ("[" * 100_000, "is not valid JSON in UTF-8"),
        ('{"user": 1' + "0" * 5_000 + "}", "is not valid JSON in UTF-8"),
        ('["bob"]', "is not a JSON object"),
        ('{"items": []}', "has no 'user'"),
        ('{"user": "bob"}', "has no 'items'"),
        ('{"user": "bob", "items": "i1"}', "'items' is not a list"),
        ('{"user": null, "items": ["i1"]}', "None is not an id"),
        ('{"user": "bob", "items": [["i1"]]}', "['i1'] is not an id"),
        (line("dan"), "unknown user 'dan'"),
        (line("cyd"), "user 'cyd' has no case in this split"),
        (line("ann"), "user 'ann' has more lines than evaluation cases"),
        (line("bob", ["i1", "i99"]), "unknown item 'i99'"),
        (line("bob", ["i1", "i2", "i1"]), "item 'i1' is listed twice"),
    ],
)
def test_a_bad_line_is_named(tmp_path, second_line, message):
    path = write_lines(tmp_path, line("ann"), second_line, line("7"))
    with pytest.raises(UserError) as caught:
        predictions.read(path, DATASET, CASES, 10)
    assert str(caught.value).startswith(f"{path}:2: {message}")
    assert "; " in str(caught.value) and "\n" not in str(caught.value)


def test_a_case_without_a_line_is_an_error(tmp_path):
    path = write_lines(tmp_path, line("ann"))
    with pytest.raises(UserError, match=r"2 of 3 evaluation cases have no line, among them user '(bob|7)'"):
        predictions.read(path, DATASET, CASES, 10)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_an_error(tmp_path, content):
    with pytest.raises(UserError, match=r"predictions\.jsonl: is empty"):
        predictions.read(write_lines(tmp_path, content), DATASET, CASES, 10)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(UserError, match="can't be read"):
        predictions.read(tmp_path / "none.jsonl", DATASET, CASES, 10)
