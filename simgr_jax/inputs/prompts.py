"""Prompts: how a history becomes the backbone's inputs, assembled on the host from one piece per item."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import ml_collections
import numpy as np
from jaxtyping import Bool, Int

from simgr_jax.data.dataset import Sequences, gather
from simgr_jax.errors import UserError
from simgr_jax.inputs import item_texts
from simgr_jax.inputs.item_texts import CODES, ItemTexts
from simgr_jax.semantic_ids.codes import SemanticIds

if TYPE_CHECKING:  # It takes a second to import, and only text prompts need it.
    from transformers import PreTrainedTokenizerFast


@dataclasses.dataclass(frozen=True)
class Prompt:
    """How a history is rendered as inputs of the backbone.

    The history (i, j, ...) is `prefix + pieces[i][merged:] + pieces[j] + ...`, and the user's state after an item is
    read at the last input of its piece.

    Inputs are item indices or tokens. Semantic-ID tokens come first (`SemanticIds.tokens`, below V_s), then the LLM's
    own tokens that occur in any prompt. So a model needs only these rows of the LLM's embedding table, which is often
    the largest part of an LLM.

    Attributes:
      prefix: int32 [P], the inputs that every sequence begins with.
      pieces: the inputs of each of the N items, never empty.
      merged: how many inputs of a sequence's first piece are already in the prefix, because the tokenizer merges the
        prefix's end with the piece's beginning.
      text_tokens: int [W], input V_s + w is token `text_tokens[w]` of the LLM's tokenizer.
    """

    prefix: Int[np.ndarray, " P"]
    pieces: Sequences
    merged: int = 0
    text_tokens: Int[np.ndarray, " W"] = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))

    def __post_init__(self):
        if self.merged >= self.pieces.lengths.min():
            raise ValueError("every piece has to have an input that is not merged into the prefix")

    @property
    def overhead(self) -> int:
        """The number of inputs besides the pieces; negative if the prefix is shorter than `merged`."""
        return len(self.prefix) - self.merged

    def longest(self, num_items: int) -> int:
        """The number of inputs of the longest possible prompt with this many items."""
        return self.overhead + num_items * int(self.pieces.lengths.max())

    def most_items(self, row_length: int) -> int:
        """The most items that a row can hold, in any number of prompts."""
        # With merged inputs a prompt may be shorter than its pieces.
        longer, shorter = max(self.overhead, 0), min(self.overhead, 0)
        return (row_length - longer) // (int(self.pieces.lengths.min()) + shorter)

    def check_fits(self, row_length: int, num_items: int = 1) -> None:
        """Raises UserError if a row can't hold every prompt of this many items."""
        if self.longest(num_items) > row_length:
            items = "the item with the longest prompt" if num_items == 1 else f"{num_items} items"
            raise UserError(
                f"config.training.row_length: {row_length} is too short for {items}, {self.longest(num_items)} tokens; "
                "give at least that"
            )

    def render(
        self, items: Int[np.ndarray, " M"], is_first: Bool[np.ndarray, " M"]
    ) -> tuple[Int[np.ndarray, " E"], Int[np.ndarray, " M"]]:
        """The inputs of prompts without their prefix, one after the other, and where each item ends (the index after).

        Args:
          items: the histories, one after the other.
          is_first: whether an item is the first of its history.
        """
        values, offsets = self.pieces.values, self.pieces.offsets
        return gather(values, offsets[items] + self.merged * is_first, offsets[items + 1])


# The shortest rows that a run chooses by itself. Short histories are packed; longer rows would only cost attention.
_SHORTEST_ROW = 64


class ItemContents(NamedTuple):
    """What a prompt can say about the N items of the catalog.

    Attributes:
      num_items: N.
      semantic_ids: the catalog's, for token prompts.
      texts: [N], for prompts with titles; None if there are none.
    """

    num_items: int
    semantic_ids: SemanticIds | None = None
    texts: Sequence[str] | None = None


def create(
    history: str,
    config: ml_collections.ConfigDict,
    items: ItemContents,
    tokenizer: PreTrainedTokenizerFast | None,
    cache_dir: Path | None = None,
) -> Prompt:
    """The prompt of a model.

    Args:
      history: "item" or "tokens" (see `models.options.ModelOptions`).
      config: `config.prompt`.
      tokenizer: the LLM's with the semantic-ID tokens; None without an LLM, when the prompt has no text.
      cache_dir: where titles' tokens are kept; None keeps none.

    Raises:
      UserError: see `item_texts.read`.
    """
    if history == "item":
        return item_prompt(items.num_items)
    if tokenizer is None and not has_text(config):
        return token_prompt(items.semantic_ids.tokens)
    strings = items.semantic_ids.token_strings()
    return text_prompt(items.semantic_ids, item_texts.read(tokenizer, strings, items.texts, cache_dir, **config))


def choose_row_length(asked: int, prompt: Prompt, max_items: int, windows: str) -> int:
    """The length of the rows that prompts are packed into: `config.training.row_length`, or enough for the longest
    prompt if that is 0.

    Args:
      asked: `config.training.row_length`.
      windows: the training windows (see `training_windows.WINDOWS`).

    Raises:
      UserError: an item's prompt is longer than a row.
    """
    if not asked:
        return max(_SHORTEST_ROW, prompt.longest(max_items + int(windows == "with_target")))
    prompt.check_fits(asked)
    seen = int((asked - prompt.overhead) / prompt.pieces.lengths.mean())
    if seen < max_items:
        logging.getLogger(__name__).warning(
            "config.training.row_length: %d holds about %d items of a history, fewer than config.data.max_items = %d; "
            "give 0 to make rows long enough",
            *(asked, seen, max_items),
        )
    return asked


def check(config: ml_collections.ConfigDict, history: str, has_tokenizer: bool) -> None:
    """Checks the prompt's texts before any work is done.

    Args:
      config: `config.prompt`.
      history: "item" or "tokens".

    Raises:
      UserError: see `item_texts.check_template`; or there is text, but no tokenizer.
    """
    item_texts.check_template(config.item)
    if has_text(config) and history == "tokens" and not has_tokenizer:
        key = "config.prompt.item" if config.item != CODES else "config.prompt.prefix"
        raise UserError(
            f"{key}: has text, but the backbone has no tokenizer; set config.backbone.checkpoint, or leave out the text"
        )


def has_text(config: ml_collections.ConfigDict) -> bool:
    """Whether prompts have more than codes. config: `config.prompt`."""
    return bool(config.prefix) or config.item != CODES


def item_prompt(num_items: int) -> Prompt:
    """Inputs are the history's item indices themselves."""
    return _without_prefix(np.arange(num_items)[:, None])


def token_prompt(tokens: Int[np.ndarray, "N L"]) -> Prompt:
    """Inputs are the items' semantic-ID tokens and nothing else."""
    return _without_prefix(tokens)


def _without_prefix(inputs: Int[np.ndarray, "N L"]) -> Prompt:
    pieces = Sequences.from_lengths(inputs.reshape(-1), np.full(len(inputs), inputs.shape[1]))
    return Prompt(np.zeros(0, np.int32), pieces)


def text_prompt(semantic_ids: SemanticIds, texts: ItemTexts) -> Prompt:
    """Inputs are the tokens of the prefix, then of each item's filled-in template."""
    inside = texts.inside
    if len(inside) == 1:
        inside = Sequences.from_lengths(
            np.tile(inside.values, semantic_ids.num_items), np.repeat(inside.lengths, semantic_ids.num_items)
        )
    pieces = _append(inside, semantic_ids.tokens)
    inputs, text_tokens = _renumber(np.concatenate([texts.start, pieces.values]), semantic_ids.vocab_size)
    size = len(texts.start)
    return Prompt(inputs[:size], Sequences(inputs[size:], pieces.offsets), texts.merged, text_tokens)


def _renumber(inputs: Int[np.ndarray, " E"], vocab_size: int) -> tuple[Int[np.ndarray, " E"], Int[np.ndarray, " W"]]:
    """Renumbers text tokens, given as `vocab_size + t`, without gaps. Returns the new inputs, and the token t of each
    new number."""
    is_text = inputs >= vocab_size
    text_tokens, numbers = np.unique(inputs[is_text] - vocab_size, return_inverse=True)
    inputs = inputs.copy()
    inputs[is_text] = vocab_size + numbers
    return inputs, text_tokens


def _append(texts: Sequences, tokens: Int[np.ndarray, "N L"]) -> Sequences:
    """Appends each item's codes to its text."""
    levels = tokens.shape[1]
    lengths = texts.lengths + levels
    is_code = np.zeros(lengths.sum(), bool)
    is_code[np.cumsum(lengths)[:, None] - levels + np.arange(levels)] = True
    values = np.empty(len(is_code), np.int32)
    values[is_code], values[~is_code] = tokens.reshape(-1), texts.values
    return Sequences.from_lengths(values, lengths)
