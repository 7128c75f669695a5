import json

import numpy as np
import pytest

from simgr_jax.data.code_tokens import token_string
from simgr_jax.data.readers.index_json import read_index_json
from simgr_jax.errors import UserError
from simgr_jax.semantic_ids.codes import SemanticIds


def write(folder, content):
    path = folder / "x.index.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_codes_follow_the_order_of_the_catalog(tmp_path):
    path = write(tmp_path, {"a": ["<a_1>", "<b_0>"], "b": ["<a_0>", "<b_7>"], "other": ["<a_9>", "<b_2>"]})
    codes, sizes = read_index_json(path, ["b", "a"])
    np.testing.assert_array_equal(codes, [[0, 7], [1, 0]])
    assert codes.dtype == np.int32
    assert sizes == (10, 8)  # from the whole file: item "other" has the largest code


def test_there_may_be_more_levels_than_letters(tmp_path):
    ids = SemanticIds(np.array([np.arange(30), np.arange(30)[::-1]], dtype=np.int32), (30,) * 30)
    rows = {
        item: [token_string(level, code) for level, code in enumerate(row)]
        for item, row in zip("ab", ids.codes, strict=True)
    }
    codes, sizes = read_index_json(write(tmp_path, rows), ["a", "b"])
    np.testing.assert_array_equal(codes, ids.codes)
    assert len(sizes) == 30


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": ["<a_1>", "<b_0>"]}, "x.index.json:b: the item has no semantic ID"),
        ({"a": ["<a_1>", "<b_0>"], "b": ["<a_1>"]}, "x.index.json:b: 1 codes where item a has 2"),
        ({"a": ["<a_1>"], "b": ["<a_x>"]}, "x.index.json:b: '<a_x>' is not a token of level 0"),
        ({"a": ["<a_1>"], "b": ["<a_-1>"]}, "x.index.json:b: '<a_-1>' is not a token"),
        ({"a": ["<a_1>", "<a_2>"]}, "x.index.json:a: '<a_2>' is not a token of level 1, like <b_7>"),
        ({"a": [3], "b": ["<a_1>"]}, "x.index.json:a: 3 is not a token"),
        ({"a": ["<a_9999999999>"], "b": ["<a_1>"]}, "x.index.json:a: '<a_9999999999>' is not a token"),
        ({"a": "<a_1>"}, "x.index.json:a: '<a_1>' is not a list"),
        ({"a": []}, "x.index.json:a: .* is not a list"),
        ({}, "x.index.json: has no items"),
        ("[1, 2]", "x.index.json: has a JSON list"),
        ('{"a": ["<a_1>"],\n "b": [}', "x.index.json:2: not JSON"),
        ('{"a": ["<a_1>"], "a": ["<a_2>"]}', "x.index.json:a: the key occurs more than once"),
    ],
)
def test_mistakes_in_an_index_file_are_named(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        read_index_json(write(tmp_path, content), ["a", "b"])
