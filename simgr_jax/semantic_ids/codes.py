"""Semantic IDs as tokens of one flat vocabulary."""

from __future__ import annotations

import dataclasses

import numpy as np

from simgr_jax.data.code_tokens import token_string


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
        """The number of tokens of all levels together."""
        return sum(self.codebook_sizes)

    @property
    def offsets(self) -> np.ndarray:
        """int32 [L], the token of each level's code 0."""
        return np.cumsum([0, *self.codebook_sizes[:-1]], dtype=np.int32)

    @property
    def tokens(self) -> np.ndarray:
        """int32 [N, L], tokens in [0, vocab_size). No two levels share a token."""
        return self.codes + self.offsets

    def token_strings(self) -> list[str]:
        """[vocab_size], each token as LC-Rec writes it: `<a_0>`, ..., `<b_0>`, ...; see `token_string`."""
        return [token_string(level, code) for level, size in enumerate(self.codebook_sizes) for code in range(size)]
