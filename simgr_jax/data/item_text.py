"""Turns the messy fields of a product's metadata into one clean text."""

from __future__ import annotations

import ast
import html
import re
import warnings
from collections.abc import Iterable
from typing import Any

# A tag begins with "<" and a letter, so "< 5 mm" stays. Texts may be cut inside a tag, so the last one may be open.
_INVISIBLE = re.compile(r"<(script|style)\b.*?(?:</\1\s*>|$)", re.DOTALL | re.IGNORECASE)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*(?:>|$)|<!--.*?(?:-->|$)", re.DOTALL)
# What programs write for a missing value.
_MISSING = frozenset(("NaN", "nan", "None", "null", "NULL"))
_BETWEEN_STRINGS = re.compile(r"""\.?['"], ['"]""")


def clean(text: str) -> str:
    """Returns plain text on one line: resolves HTML entities, even doubly escaped ones; removes tags and scripts."""
    text = html.unescape(html.unescape(text))
    text = _TAG.sub(" ", _INVISIBLE.sub(" ", text))
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def join_fields(fields: Iterable[Any]) -> str:
    """Joins fields into one clean text. A field is a string, a number, None, or a list of these or its Python form.

    A field that says that its value is missing ("NaN", "None", "null") is left out.
    """
    texts = (clean(text) for field in fields for text in _flatten(field))
    return ". ".join(text.rstrip(".") for text in map(unless_missing, texts) if text)


def unless_missing(text: str) -> str:
    """The text, or "" for what programs write in place of a missing one."""
    return "" if text in _MISSING else text


def _flatten(field: Any) -> list[str]:
    texts, waiting = [], [field]  # Not by recursion, because JSON may be nested as deeply as Python's stack is.
    while waiting:
        field = waiting.pop()
        if isinstance(field, str) and field[:1] == "[" and field[-1:] == "]":
            field = _parse_list(field)
        if isinstance(field, list | tuple):
            waiting += reversed(field)
        elif field is not None:
            texts.append(_string(field))
    return texts


def _string(value: Any) -> str:
    """The value as a string; "" for an integer of thousands of digits or an object nested very deeply, which Python
    refuses to convert."""
    try:
        return str(value)
    except (ValueError, RecursionError):
        return ""


def _parse_list(text: str) -> Any:
    """Parses a list in Python syntax. If its quotes are broken, returns its strings joined as sentences."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # "\d" and the like in a description
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return ". ".join(_BETWEEN_STRINGS.split(text[1:-1].strip("'\" ")))
