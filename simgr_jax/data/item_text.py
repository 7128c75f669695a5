"""From the messy fields of a product's metadata to one clean text."""

from __future__ import annotations

import ast
import html
import re
import warnings
from collections.abc import Iterable
from typing import Any

# A tag begins with "<" and a letter, so that "< 5 mm" stays; texts are cut anywhere, so the last tag may be open.
_INVISIBLE = re.compile(r"<(script|style)\b.*?(?:</\1\s*>|$)", re.DOTALL | re.IGNORECASE)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*(?:>|$)|<!--.*?(?:-->|$)", re.DOTALL)
_BETWEEN_STRINGS = re.compile(r"""\.?['"], ['"]""")


def clean(text: str) -> str:
    """Plain text on one line: HTML entities resolved (also doubly escaped ones), tags and scripts removed."""
    text = html.unescape(html.unescape(text))
    text = _TAG.sub(" ", _INVISIBLE.sub(" ", text))
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def join_fields(fields: Iterable[Any]) -> str:
    """One clean text of several fields, each a string, a number, a list of them (also written as a string) or None."""
    texts = (clean(text) for field in fields for text in _flatten(field))
    return ". ".join(text.rstrip(".") for text in texts if text)


def _flatten(field: Any) -> Iterable[str]:
    if isinstance(field, str) and field[:1] == "[" and field[-1:] == "]":
        field = _parse_list(field)
    if isinstance(field, list | tuple):
        return [text for part in field for text in _flatten(part)]
    return [] if field is None else [str(field)]


def _parse_list(text: str) -> Any:
    """The list that `text` is the Python form of; its inside as sentences where quotes in it were lost."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # "\d" and the like in a description
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return ". ".join(_BETWEEN_STRINGS.split(text[1:-1].strip("'\" ")))
