"""Item texts that spell a control token of the LLM, like `<|im_end|>`, are read as text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from simgr_jax.data.dataset import Sequences
from simgr_jax.errors import UserError

if TYPE_CHECKING:  # Importing it takes seconds.
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerFast

# How tokenizers spell control tokens that are not marked as special, such as <think>, and semantic-ID tokens.
_IN_BRACKETS = re.compile(r"<.*>|\[.*\]", re.DOTALL)
# Texts tokenized at once: enough for all threads, few enough to hold as Python objects.
CHUNK = 8192
# Each round breaks the control tokens that the blanks of the round before have left.
_MOST_ROUNDS = 100


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], offsets: bool = False) -> list[Encoding]:
    """The tokens of texts, without those that the tokenizer adds around a text.

    As `tokenizer(texts, add_special_tokens=False)`, which makes Python lists of all that is known of each token.

    Args:
      offsets: whether each token's place in its text is needed.
    """
    backend = tokenizer.backend_tokenizer
    # A tokenizer's file may ask for them.
    backend.no_truncation()
    backend.no_padding()
    return (backend.encode_batch if offsets else backend.encode_batch_fast)(texts, add_special_tokens=False)


def token_ids(encodings: Sequence[Encoding]) -> Sequences:
    """The numbers of each text's tokens."""
    lengths = np.fromiter(map(len, encodings), np.int64, len(encodings))
    values = np.empty(lengths.sum(), np.int32)
    for end, length, encoding in zip(np.cumsum(lengths), lengths, encodings, strict=True):
        values[end - length : end] = encoding.ids
    return Sequences.from_lengths(values, lengths)


class ControlTokens:
    """The tokens that no item text may have: control tokens and semantic-ID tokens.

    Attributes:
      spelling: each token's, by its number.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.items()
        spelled = {number: (token.content.strip(), token.special) for number, token in added}
        self._depends_on_neighbors = any(token.single_word for _, token in added)
        self.spelling = {
            number: content
            for number, (content, is_special) in spelled.items()
            if len(content) > 1 and (is_special or _IN_BRACKETS.fullmatch(content))
        }
        self._is_control = np.zeros(1 + max(tokenizer.get_vocab().values()), bool)
        self._is_control[list(self.spelling)] = True
        normalizer = tokenizer.backend_tokenizer.normalizer
        self._normalize = normalizer.normalize_str if normalizer else str

    def can_span(self, before: str, after: str) -> bool:
        """Whether a text between these two can be a part of a control token that it does not spell alone."""
        if self._depends_on_neighbors:
            return True
        before, after = _folded(before), _folded(after)
        return any(
            before.endswith(content[:size]) or after.startswith(content[size:])
            for content in map(_folded, self.spelling.values())
            for size in range(1, len(content))
        )

    def encode_as_text(self, texts: Sequence[str]) -> Iterator[tuple[str, Encoding]]:
        """Tokenizes texts so that nothing in them is read as a control token (see `broken`).

        Yields:
          Each text with blanks in what spells a control token, and its tokens, with offsets.

        Raises:
          UserError: see `broken`.
        """
        for first in range(0, len(texts), CHUNK):
            chunk = list(texts[first : first + CHUNK])
            encoded = encode(self._tokenizer, chunk, offsets=True)
            tokens = token_ids(encoded)
            places = np.flatnonzero(self._is_control[tokens.values])
            for number in np.unique(np.searchsorted(tokens.offsets, places, side="right") - 1):
                chunk[number] = self.broken(chunk[number])
                encoded[number] = encode(self._tokenizer, [chunk[number]], offsets=True)[0]
            yield from zip(chunk, encoded, strict=True)

    def broken(self, text: str, before: str = "", after: str = "") -> str:
        """The text with a blank after the first character of each control token that it has, or is a part of when it
        stands between `before` and `after`: `<|im_end|>` becomes `< |im_end|>`.

        So whoever tokenizes it, also with an exported tokenizer, reads text.

        Raises:
          UserError: the tokenizer reads a control token whatever blanks the text has.
        """
        given = text
        for _ in range(_MOST_ROUNDS):
            whole, begin, end = before + text + after, len(before), len(before) + len(text)
            spans = [span for span in self._spelled(whole) if span[0] < end and span[1] > begin]
            if not spans:
                return text
            for first, _ in reversed(spans):  # From the end, so that earlier places stay valid.
                place = max(first + 1 - begin, 0)
                text = f"{text[:place]} {text[place:]}"
        raise UserError(
            f"item text {given[:40]!r}: the tokenizer reads a control token in it, whatever blanks it has; change it"
        )

    def _spelled(self, text: str) -> list[tuple[int, int]]:
        """Where control tokens begin and end in a text."""
        (encoding,) = encode(self._tokenizer, [text], offsets=True)
        found = []
        for token, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token in self.spelling:
                spelled, content = text[begin:end].strip(), self.spelling[token]
                # An unknown character is read as a control token, too, but is none.
                if spelled == content or self._normalize(spelled) == self._normalize(content):
                    first = begin + text[begin:end].index(spelled)
                    found.append((first, first + len(spelled)))
        return found


def _folded(text: str) -> str:
    """The text in a form in which whatever tokenizers may take for one another is equal."""
    return unicodedata.normalize("NFKC", text).casefold()
