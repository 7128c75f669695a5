"""Semantic IDs as tokens."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simgr_jax.data.code_tokens import parse_token, token_string
from simgr_jax.semantic_ids.codes import SemanticIds

IDS = SemanticIds(np.array([[0, 2, 1], [3, 0, 0]], np.int32), (4, 3, 2))


def test_levels_share_no_token():
    np.testing.assert_array_equal(IDS.tokens, [[0, 6, 8], [3, 4, 7]])
    assert IDS.tokens.dtype == np.int32
    assert IDS.vocab_size == 9
    assert (IDS.num_items, IDS.levels) == (2, 3)


def test_token_strings_are_in_token_order_and_parse_back():
    strings = IDS.token_strings()
    assert strings == ["<a_0>", "<a_1>", "<a_2>", "<a_3>", "<b_0>", "<b_1>", "<b_2>", "<c_0>", "<c_1>"]
    parsed = np.array([[parse_token(strings[token]) for token in row] for row in IDS.tokens])
    np.testing.assert_array_equal(parsed[..., 0], [[0, 1, 2]] * 2)
    np.testing.assert_array_equal(parsed[..., 1], IDS.codes)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2000), st.integers(0, 10**6))
def test_a_token_string_parses_back(level, code):
    assert parse_token(token_string(level, code)) == (level, code)


def test_levels_after_z_are_named_like_spreadsheet_columns():
    assert [token_string(level, 5) for level in (25, 26, 51, 52, 701, 702)] == [
        "<z_5>", "<aa_5>", "<az_5>", "<ba_5>", "<zz_5>", "<aaa_5>"
    ]  # fmt: skip


@pytest.mark.parametrize("string", ["", "a_0", "<a_>", "<_0>", "<A_0>", "<a_-1>", "<a_0> ", "<a_x>"])
def test_other_strings_are_refused(string):
    with pytest.raises(ValueError, match="not a semantic-ID token"):
        parse_token(string)
