"""Codes of semantic IDs as text tokens in LC-Rec's notation, e.g. `<a_7>`."""

from __future__ import annotations

import re


def token_string(level: int, code: int) -> str:
    """Returns `<a_7>` for code 7 of level 0. Levels are named like spreadsheet columns: a to z, then aa, ab, ..."""
    name, rest = "", level + 1
    while rest:
        rest, letter = divmod(rest - 1, 26)
        name = chr(ord("a") + letter) + name
    return f"<{name}_{code}>"


def parse_token(string: str) -> tuple[int, int]:
    """Returns the (level, code) of a token that `token_string` wrote.

    Raises:
      ValueError: the string is not such a token.
    """
    match = re.fullmatch(r"<([a-z]+)_([0-9]+)>", string)
    if match is None:
        raise ValueError(f"{string!r} is not a semantic-ID token like <a_0>")
    level = 0
    for letter in match[1]:
        level = level * 26 + ord(letter) - ord("a") + 1
    return level - 1, int(match[2])
