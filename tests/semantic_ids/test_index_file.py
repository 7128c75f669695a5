import json

import numpy as np
import pytest

from simgr_jax.errors import UserError
from simgr_jax.semantic_ids.index_file import read_index_json


def write(folder, content):
    path = folder / "x.index.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_rows_follow_the_catalog(tmp_path):
    path = write(tmp_path, {"a": ["<a_1>", "<b_0>"], "b": ["<a_0>", "<b_7>"], "other": ["<a_9>", "<b_2>"]})
    codes, sizes = read_index_json(path, ["b", "a"])
    np.testing.assert_array_equal(codes, [[0, 7], [1, 0]])
    assert codes.dtype == np.int32
    assert sizes == (10, 8)  # of the whole file: item "other" has the largest code


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": ["<a_1>", "<b_0>"]}, "x.index.json:b: the item has no semantic ID"),
        ({"a": ["<a_1>", "<b_0>"], "b": ["<a_1>"]}, "x.index.json:b: 1 codes where item a has 2"),
        ({"a": ["<a_1>"], "b": ["<a_x>"]}, "x.index.json:b: the token '<a_x>'"),
        ({"a": ["<a_1>"], "b": ["<a_-1>"]}, "x.index.json:b: the token '<a_-1>'"),
        ({"a": ["<a_1>", "<a_2>"]}, "x.index.json:a: the token '<a_2>' is not of the form <b_NUMBER>"),
        ({"a": [3], "b": ["<a_1>"]}, "x.index.json:a: the token 3"),
        ({"a": "<a_1>"}, "x.index.json:a: '<a_1>' is not a list"),
        ({"a": []}, "x.index.json:a: .* is not a list"),
        ({}, "x.index.json: has no items"),
        ("[1, 2]", "x.index.json: has a JSON list"),
        ('{"a": ["<a_1>"],\n "b": [}', "x.index.json:2: not JSON"),
        ('{"a": ["<a_1>"], "a": ["<a_2>"]}', "x.index.json:a: the key comes more than once"),
    ],
)
def test_bad_index_files(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        read_index_json(write(tmp_path, content), ["a", "b"])
