import json

import pytest

from simgr_jax.data.item_text import clean, join_fields


@pytest.mark.parametrize(
    ("messy", "expected"),
    [
        ("T&uuml;rlen 1&ndash;2&quot;", 'Türlen 1–2"'),
        ("salt &amp;amp; pepper", "salt & pepper"),
        ("<b>Bold</b><br/>next <a href='x'>link</a>", "Bold next link"),
        ("cut in a tag <br class=", "cut in a tag"),
        ("width < 5 mm and > 3 mm", "width < 5 mm and > 3 mm"),
        ("before <script>var a = '<b>';</script> after<style>p {}</style>", "before after"),
        ("one\n two\t\x00three\u200b", "one two three"),
        ("&lt;li&gt;item", "item"),
    ],
)
def test_clean_gives_plain_text_on_one_line(messy, expected):
    assert clean(messy) == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (["Title", None, "", "Brand"], "Title. Brand"),
        (["A title.", "['First sentence.', 'Second &amp; last']"], "A title. First sentence. Second & last"),
        (["x", ["a", ["b", 3]]], "x. a. b. 3"),
        (["['it's broken', 'here']"], "it's broken. here"),
        ([r"['a \d b']"], r"a \d b"),
        ([None, "[]"], ""),
        (["x", json.loads("[" * 900 + "3, 4" + "]" * 900)], "x. 3. 4"),
        (["x", "[0x" + "f" * 4_000 + "]"], "x"),
        (["NaN", float("nan"), "None", " null ", "nan", "NULL"], ""),
        (["Naan", "None of the above", "['null', 'Null Bock']", "<td>NaN</td>"], "Naan. None of the above. Null Bock"),
    ],
)
def test_fields_become_one_text(fields, expected):
    assert join_fields(fields) == expected
