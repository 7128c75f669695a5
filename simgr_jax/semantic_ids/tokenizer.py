"""Semantic IDs as tokens of one flat vocabulary."""

from __future__ import annotations

import dataclasses
import re

import numpy as np


@dataclasses.dataclass(frozen=True)
class SemanticIds:
    """The catalog's semantic IDs.

    Attributes:
      codes: int32 [N, L], `0 <= codes[:, l] < codebook_sizes[l]`.
      codebook_sizes: L sizes.
    """

    codes: np.ndarray
    codebook_sizes: tuple[int, ...]

    @property
    def num_items(self) -> int:
        return self.codes.shape[0]

    @property
    def levels(self) -> int:
        return self.codes.shape[1]

    @property
    def vocab_size(self) -> int:
        """The tokens of all levels together."""
        return sum(self.codebook_sizes)

    @property
    def offsets(self) -> np.ndarray:
        """int32 [L], the token of each level's code 0."""
        return np.cumsum([0, *self.codebook_sizes[:-1]], dtype=np.int32)

    @property
    def tokens(self) -> np.ndarray:
        """int32 [N, L], tokens in [0, vocab_size): no two levels share one."""
        return self.codes + self.offsets

    def token_strings(self) -> list[str]:
        """[vocab_size], each token as LC-Rec writes it: `<a_0>`, ..., `<b_0>`, ...; see `token_string`."""
        return [token_string(level, code) for level, size in enumerate(self.codebook_sizes) for code in range(size)]


def token_string(level: int, code: int) -> str:
    """`<a_7>` for code 7 of level 0. Levels are a to z, then aa, ab, ..., as spreadsheets name their columns."""
    name, rest = "", level + 1
    while rest:
        rest, letter = divmod(rest - 1, 26)
        name = chr(ord("a") + letter) + name
    return f"<{name}_{code}>"


def parse_token(string: str) -> tuple[int, int]:
    """The (level, code) that `token_string` wrote.

    Raises:
      ValueError: the string is no such token.
    """
    match = re.fullmatch(r"<([a-z]+)_([0-9]+)>", string)
    if match is None:
        raise ValueError(f"{string!r} is not a semantic-ID token like <a_0>")
    level = 0
    for letter in match[1]:
        level = level * 26 + ord(letter) - ord("a") + 1
    return level - 1, int(match[2])
