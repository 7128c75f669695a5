"""The items' texts in an LLM's prompts: the template with each item's title, and what the tokenizer makes of it.

A run tokenizes each title once and keeps the result in its cache.
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from absl import logging
from jaxtyping import Int

from simgr_jax.data.dataset import Sequences, gather
from simgr_jax.errors import UserError
from simgr_jax.inputs.control_tokens import CHUNK, ControlTokens, encode, token_ids
from simgr_jax.workdir.atomic_write import atomic_path
from simgr_jax.workdir.cache import fingerprint, load_arrays

if TYPE_CHECKING:  # It takes a second to import, and only prompts with text need it.
    from transformers import PreTrainedTokenizerFast

# Part of every fingerprint: increment it when the same inputs give other texts, tokens, or files of another form.
VERSION = 1
CODES = "{codes}"


class ItemTexts(NamedTuple):
    """The items' texts before their codes, each of which is followed by the item's codes.

    Tokens are inputs: a semantic-ID token is its number below V_s, and the LLM's token t is V_s + t.

    Attributes:
      texts: [N], each item's filled-in template up to its codes; a single one for all items if it has no `{title}`.
        Tokenized as they are, they give the tokens below, with an exported tokenizer, too.
      start: int32, what every prompt begins with: the tokenizer's own beginning, the prefix, and what all texts share.
      inside: the tokens of each text after another item's codes.
      merged: how many tokens of the first item's text are in `start` already.
    """

    texts: list[str]
    start: Int[np.ndarray, " P"]
    inside: Sequences
    merged: int


def read(
    tokenizer: PreTrainedTokenizerFast,
    code_strings: Sequence[str],
    item_texts: Sequence[str] | None,
    cache_dir: Path | None = None,
    *,
    prefix: str,
    item: str,
    max_title_tokens: int,
) -> ItemTexts:
    """Fills in the template and tokenizes the result.

    A prompt's tokens are `start`, the first item's `inside[merged:]`, its codes, the next item's `inside`, and so on.
    They equal the tokens of the whole string, except for tokens that the tokenizer adds at its end. Texts can be
    tokenized one by one because each ends with an added token, at which every tokenizer splits its input.

    Args:
      tokenizer: the one that is exported; it has the semantic-ID tokens.
      code_strings: [V_s], these tokens (`SemanticIds.token_strings`).
      item_texts: [N], needed if the template has `{title}`.
      cache_dir: where titles' tokens are kept; None keeps none.
      prefix: text before the first item.
      item: text that ends with `{codes}` and may have `{title}` before it.
      max_title_tokens: the number of tokens that a title is cut to.

    Raises:
      UserError: see `check_template` and `ControlTokens.broken`; there are no titles; or, at the beginning of a prompt,
        the tokenizer merges the prefix with some items' texts in another way than with others'.
    """
    check_template(item)
    reader, literals = _Reader(tokenizer, code_strings, prefix), _literals(item.removesuffix(CODES))
    if len(literals) == 1:
        return reader.read(literals, reader.between_codes(literals))
    if item_texts is None:
        raise UserError("config.prompt.item: has {title}, but the dataset has no item texts; leave {title} out")
    if cache_dir is None:
        return reader.read(*_with_titles(reader, literals, item_texts, max_title_tokens))
    tokenizer_hash = fingerprint(tokenizer.backend_tokenizer.to_str())
    depends_on = VERSION, tokenizer_hash, code_strings, item_texts, prefix, item, max_title_tokens
    path = cache_dir / f"item_texts-{fingerprint(*depends_on)}.npz"
    if not path.exists():
        logging.info("Tokenizing the titles of %d items", len(item_texts))
        _write(reader.read(*_with_titles(reader, literals, item_texts, max_title_tokens)), path)
    return _load(path)


def _write(made: ItemTexts, path: Path) -> None:
    texts = np.frombuffer(json.dumps(made.texts).encode(), np.uint8)
    inside = {"values": made.inside.values, "offsets": made.inside.offsets}
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, texts=texts, start=made.start, merged=made.merged, **inside)


def _load(path: Path) -> ItemTexts:
    arrays = load_arrays(path)
    inside = Sequences(arrays["values"], arrays["offsets"])
    return ItemTexts(json.loads(arrays["texts"].tobytes()), arrays["start"], inside, int(arrays["merged"]))


def tokens_around_text(tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """The tokens that the tokenizer adds before and after a text: a BOS token, an EOS token, or none."""
    whole, text = (tokenizer("x", add_special_tokens=special)["input_ids"] for special in (True, False))
    start = whole.index(text[0])
    return whole[:start], whole[start + len(text) :]


def check_template(item: str) -> None:
    """Raises UserError unless `item` is text that ends with `{codes}` and has no other placeholder than `{title}`."""
    key = "config.prompt.item"
    try:
        names = _placeholders(item)
    except ValueError as error:
        raise UserError(
            f"{key}: {item!r} is not a template ({error}); write {{{{ and }}}} for braces in the text"
        ) from None
    for name in names:
        if name not in ("title", "codes"):
            raise UserError(f"{key}: the placeholder {{{name}}} is unknown; use {{title}} and {{codes}}")
    if names.count("codes") != 1 or names[-1] != "codes" or not item.endswith(CODES):
        raise UserError(f"{key}: {item!r} has to end with {{codes}} and have it once; the user's state is read there")


def has_title(item: str) -> bool:
    """Whether an item's template has a {title}. The template need not be valid."""
    try:
        return "title" in _placeholders(item)
    except ValueError:
        return False


def _placeholders(template: str) -> list[str]:
    """The placeholders of a template for `str.format`. Raises ValueError if braces don't match."""
    parts = string.Formatter().parse(template)
    return [
        name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
        for _, name, spec, conversion in parts
        if name is not None
    ]


def _literals(template: str) -> list[str]:
    """What stands before, between and after the titles of a template. Joined by a title, it is the filled-in text."""
    literals = [""]
    for literal, name, *_ in string.Formatter().parse(template):
        literals[-1] += literal
        if name is not None:
            literals.append("")
    return literals


class _Reader:
    """Tokenizes texts that stand before semantic-ID tokens.

    Args: see `read`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, code_strings: Sequence[str], prefix: str):
        vocabulary = tokenizer.get_vocab()
        if missing := [token for token in code_strings if token not in vocabulary]:
            raise ValueError(f"the tokenizer lacks {len(missing)} semantic-ID tokens, among them {missing[0]}")
        self.tokenizer, self.code, self._prefix = tokenizer, code_strings[0], prefix
        # The input of each of the tokenizer's tokens.
        self._inputs = len(code_strings) + np.arange(max(vocabulary.values()) + 1, dtype=np.int32)
        self._inputs[[vocabulary[token] for token in code_strings]] = np.arange(len(code_strings))

    def between_codes(self, texts: Sequence[str]) -> Sequences:
        """The tokenizer's tokens of texts that stand between two codes."""
        return self._tokens(self.code, texts, left_out=1)

    def read(self, texts: list[str], between_codes: Sequences) -> ItemTexts:
        """
        Raises:
          UserError: see `_start`.
        """
        at_start = self._tokens(self._prefix, texts)
        start, merged = _start(at_start, between_codes, texts)
        begin = np.array(tokens_around_text(self.tokenizer)[0], np.int32)
        inside = Sequences(self._inputs[between_codes.values], between_codes.offsets)
        return ItemTexts(texts, self._inputs[np.concatenate([begin, start])], inside, merged)

    def _tokens(self, before: str, texts: Sequence[str], left_out: int = 0) -> Sequences:
        """The tokens of `before` and each text when a code follows, but for the first `left_out`."""
        parts = []
        for first in range(0, len(texts), CHUNK):
            chunk = [f"{before}{text}{self.code}" for text in texts[first : first + CHUNK]]
            tokens = token_ids(encode(self.tokenizer, chunk))
            begins, ends = tokens.offsets[:-1] + left_out, tokens.offsets[1:] - 1
            parts.append((gather(tokens.values, begins, ends)[0], ends - begins))
        values, lengths = (np.concatenate(part) for part in zip(*parts, strict=True))
        return Sequences.from_lengths(values, lengths)


def _with_titles(
    reader: _Reader, literals: Sequence[str], item_texts: Sequence[str], max_title_tokens: int
) -> tuple[list[str], Sequences]:
    """The filled-in templates, and their tokens between codes.

    Args:
      literals: the template's (see `_literals`).
    """
    control, code = ControlTokens(reader.tokenizer), reader.code
    titles = list(_cut_titles(item_texts, control, max_title_tokens))
    if len(literals) > 2 or control.can_span(code + literals[0], literals[1] + code):
        titles = [_broken_in_place(title, literals, code, control) for title in titles]
    texts = [title.join(literals) for title in titles]
    return texts, reader.between_codes(texts)


def _broken_in_place(title: str, literals: Sequence[str], code: str, control: ControlTokens) -> str:
    """The title with a blank in each control token that it spells together with what stands beside it."""
    for place in range(1, len(literals)):
        title = control.broken(title, code + title.join(literals[:place]), title.join(literals[place:]) + code)
    return title


def _cut_titles(item_texts: Sequence[str], control: ControlTokens, max_tokens: int) -> Iterator[str]:
    """Each title as the LLM reads it: on one line, without control tokens, and cut after `max_tokens` tokens."""
    for title, tokens in control.encode_as_text([" ".join(text.split()) for text in item_texts]):
        yield title[: tokens.token_to_chars(max_tokens - 1)[1]].rstrip() if len(tokens) > max_tokens else title


def _start(at_start: Sequences, inside: Sequences, texts: Sequence[str]) -> tuple[np.ndarray, int]:
    """Finds `(start, merged)` such that `start + inside[merged:]` are every text's tokens at the start of a prompt.

    Args:
      at_start: the tokens of each text with the prefix's text before it.
      inside: the tokens of each text after another item.

    Raises:
      UserError: there is no such pair.
    """
    whole, piece = at_start[0], inside[0]
    shared = min(len(whole), len(piece))
    differs = np.flatnonzero(whole[len(whole) - shared :][::-1] != piece[len(piece) - shared :][::-1])
    shared = int(differs[0]) if len(differs) else shared
    start, merged = whole[: len(whole) - shared], len(piece) - shared
    is_wrong = (inside.lengths < merged) | (at_start.lengths != inside.lengths - merged + len(start))
    if not is_wrong.any():
        begins, size = at_start.offsets[:-1], len(start)
        is_wrong = (at_start.values[begins[:, None] + np.arange(size)] != start).any(axis=1)
        rest, ends = gather(at_start.values, begins + size, at_start.offsets[1:])
        of_inside, _ = gather(inside.values, inside.offsets[:-1] + merged, inside.offsets[1:])
        is_wrong[np.searchsorted(ends, np.flatnonzero(rest != of_inside), side="right")] = True
    if is_wrong.any():
        raise UserError(
            f"config.prompt.item: the tokenizer joins the beginning of {texts[int(is_wrong.argmax())][:40]!r} to the "
            'text before it, but not that of other items; begin the template with "\\n", or end config.prompt.prefix '
            "with another character"
        )
    return start, merged
