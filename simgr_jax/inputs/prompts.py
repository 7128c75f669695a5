"""Prompts: how a history becomes the backbone's inputs, assembled on the host from one piece per item."""

from __future__ import annotations

import dataclasses
import logging
import string
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import ml_collections
import numpy as np
from jaxtyping import Bool, Int

from simgr_jax.data.dataset import Sequences
from simgr_jax.errors import UserError
from simgr_jax.inputs.control_tokens import control_tokens, encode_as_text
from simgr_jax.semantic_ids.codes import SemanticIds

if TYPE_CHECKING:  # It takes a second to import, and only text prompts need it.
    from transformers import PreTrainedTokenizerFast

CODES = "{codes}"
_CHUNK = 4096  # Texts tokenized at once: enough for all threads, few enough to hold as Python lists.


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


def gather(
    values: Int[np.ndarray, " E"], begins: Int[np.ndarray, " S"], ends: Int[np.ndarray, " S"]
) -> tuple[Int[np.ndarray, " F"], Int[np.ndarray, " S"]]:
    """The slices `values[begin:end]`, one after the other, and where each ends in the result (the index after)."""
    new_ends = np.cumsum(ends - begins)
    index = np.repeat(ends - new_ends, ends - begins)
    index += np.arange(len(index))
    return values[index], new_ends


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
) -> Prompt:
    """The prompt of a model.

    Args:
      history: "item" or "tokens" (see `models.options.ModelOptions`).
      config: `config.prompt`.
      tokenizer: the LLM's, see `text_prompt`; None without an LLM, when the prompt has no text.

    Raises:
      UserError: see `text_prompt`.
    """
    if history == "item":
        return item_prompt(items.num_items)
    if tokenizer is None and not has_text(config):
        return token_prompt(items.semantic_ids.tokens)
    return text_prompt(items.semantic_ids, tokenizer, items.texts, **config)


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
      UserError: see `check_item_template`; or there is text, but no tokenizer.
    """
    check_item_template(config.item)
    if has_text(config) and history == "tokens" and not has_tokenizer:
        key = "config.prompt.item" if config.item != CODES else "config.prompt.prefix"
        raise UserError(
            f"{key}: has text, but the backbone has no tokenizer; set config.backbone.checkpoint, or leave out the text"
        )


def has_text(config: ml_collections.ConfigDict) -> bool:
    """Whether prompts have more than codes. config: `config.prompt`."""
    return bool(config.prefix) or config.item != CODES


def has_title(item: str) -> bool:
    """Whether an item's template has a {title}. The template need not be valid."""
    return "{title}" in item


def item_prompt(num_items: int) -> Prompt:
    """Inputs are the history's item indices themselves."""
    return _without_prefix(np.arange(num_items)[:, None])


def token_prompt(tokens: Int[np.ndarray, "N L"]) -> Prompt:
    """Inputs are the items' semantic-ID tokens and nothing else."""
    return _without_prefix(tokens)


def _without_prefix(inputs: Int[np.ndarray, "N L"]) -> Prompt:
    pieces = Sequences.from_lengths(inputs.reshape(-1), np.full(len(inputs), inputs.shape[1]))
    return Prompt(np.zeros(0, np.int32), pieces)


def text_prompt(
    semantic_ids: SemanticIds,
    tokenizer: PreTrainedTokenizerFast,
    item_texts: Sequence[str] | None,
    *,
    prefix: str,
    item: str,
    max_title_tokens: int,
) -> Prompt:
    """Inputs are the tokens of the prefix, then of each item's filled-in template.

    They equal the tokens of the whole string, except for tokens that the tokenizer adds at its end. Pieces can be
    tokenized one by one because each ends with an added token, at which every tokenizer splits its input.

    Args:
      tokenizer: the one that is exported; it has the semantic-ID tokens (`SemanticIds.token_strings`).
      item_texts: [N], needed if the template has `{title}`.
      prefix: text before the first item.
      item: text that ends with `{codes}` and may have `{title}` before it.
      max_title_tokens: the number of tokens that a title is cut to.

    Raises:
      UserError: see `texts_before_codes`; or, at the beginning of a prompt, the tokenizer merges the prefix with some
        items' texts in another way than with others'.
    """
    texts = texts_before_codes(item, tokenizer, item_texts, max_title_tokens)
    encode = _Encoder(tokenizer, semantic_ids)
    inside = Sequences.from_lists(encode(texts, after_codes=True))
    at_start = encode([prefix + text for text in texts], after_codes=False)
    start, merged = _start(at_start, inside, texts)
    if len(inside) == 1:
        inside = Sequences.from_lengths(
            np.tile(inside.values, semantic_ids.num_items), np.repeat(inside.lengths, semantic_ids.num_items)
        )
    start, pieces = np.concatenate([encode.begin, start]), _append(inside, semantic_ids.tokens)
    inputs, text_tokens = _renumber(np.concatenate([start, pieces.values]), semantic_ids.vocab_size)
    return Prompt(inputs[: len(start)], Sequences(inputs[len(start) :], pieces.offsets), merged, text_tokens)


def _renumber(inputs: Int[np.ndarray, " E"], vocab_size: int) -> tuple[Int[np.ndarray, " E"], Int[np.ndarray, " W"]]:
    """Renumbers text tokens, given as `vocab_size + t`, without gaps. Returns the new inputs, and the token t of each
    new number."""
    is_text = inputs >= vocab_size
    text_tokens, numbers = np.unique(inputs[is_text] - vocab_size, return_inverse=True)
    inputs = inputs.copy()
    inputs[is_text] = vocab_size + numbers
    return inputs, text_tokens


def texts_before_codes(
    item: str, tokenizer: PreTrainedTokenizerFast, item_texts: Sequence[str] | None, max_title_tokens: int
) -> list[str]:
    """Each item's filled-in template up to its codes; a single one for all items if it has no `{title}`.

    A title that spells a control token of the LLM is changed so that it is text (see `encode_as_text`).

    Args: see `text_prompt`.

    Raises:
      UserError: see `check_item_template`; or there are no titles.
    """
    check_item_template(item)
    template = item.removesuffix(CODES)
    if "title" not in _placeholders(item):
        return [template.format()]
    if item_texts is None:
        raise UserError("config.prompt.item: has {title}, but the dataset has no item texts; leave {title} out")
    titles = _cut_titles([" ".join(text.split()) for text in item_texts], tokenizer, max_title_tokens)
    return [template.format(title=title) for title in titles]


def tokens_around_text(tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """The tokens that the tokenizer adds before and after a text: a BOS token, an EOS token, or none."""
    whole, text = (tokenizer("x", add_special_tokens=special)["input_ids"] for special in (True, False))
    start = whole.index(text[0])
    return whole[:start], whole[start + len(text) :]


def check_item_template(item: str) -> None:
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


def _placeholders(template: str) -> list[str]:
    """The placeholders of a template for `str.format`. Raises ValueError if braces don't match."""
    parts = string.Formatter().parse(template)
    return [
        name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
        for _, name, spec, conversion in parts
        if name is not None
    ]


def _cut_titles(titles: list[str], tokenizer: PreTrainedTokenizerFast, max_tokens: int) -> Iterator[str]:
    """Each title as the LLM reads it: without control tokens, and cut after `max_tokens` tokens."""
    control = control_tokens(tokenizer)
    for first in range(0, len(titles), _CHUNK):
        chunk, encoded = encode_as_text(titles[first : first + _CHUNK], tokenizer, control)
        for index, title in enumerate(chunk):
            longer = len(encoded["input_ids"][index]) > max_tokens
            yield title[: encoded.token_to_chars(index, max_tokens - 1).end].rstrip() if longer else title


class _Encoder:
    """Encodes texts that precede semantic-ID tokens as inputs, where the tokenizer's token t is V_s + t.

    Attributes:
      begin: int32, the inputs that the tokenizer adds before a text: a BOS token, or none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, semantic_ids: SemanticIds):
        strings, vocabulary = semantic_ids.token_strings(), tokenizer.get_vocab()
        if missing := [token for token in strings if token not in vocabulary]:
            raise ValueError(f"the tokenizer lacks {len(missing)} semantic-ID tokens, among them {missing[0]}")
        self._tokenizer, self._code = tokenizer, strings[0]
        self._inputs = semantic_ids.vocab_size + np.arange(max(vocabulary.values()) + 1, dtype=np.int32)
        self._inputs[[vocabulary[token] for token in strings]] = np.arange(len(strings))
        self.begin = self._inputs[tokens_around_text(tokenizer)[0]]

    def __call__(self, texts: list[str], after_codes: bool) -> Iterator[np.ndarray]:
        """int32 inputs of each text, either `after_codes` or at the beginning of a prompt."""
        before = self._code if after_codes else ""
        for first in range(0, len(texts), _CHUNK):
            chunk = [f"{before}{text}{self._code}" for text in texts[first : first + _CHUNK]]
            encoded = self._tokenizer(chunk, add_special_tokens=False, return_attention_mask=False, verbose=False)
            for tokens in encoded["input_ids"]:
                yield self._inputs[tokens[int(after_codes) : -1]]


def _start(at_start: Iterator[np.ndarray], inside: Sequences, texts: list[str]) -> tuple[np.ndarray, int]:
    """Finds `(prefix, merged)` such that `prefix + piece[merged:]` are every text's inputs at the start of a prompt.

    Args:
      at_start: inputs of each text with the prefix's text before it.
      inside: inputs of each text after another item.
    """
    prefix, merged = None, 0
    for whole, piece, text in zip(at_start, inside, texts, strict=True):
        if prefix is None:
            shared = min(len(whole), len(piece))
            differs = np.flatnonzero(whole[len(whole) - shared :][::-1] != piece[len(piece) - shared :][::-1])
            shared = int(differs[0]) if len(differs) else shared
            prefix, merged = whole[: len(whole) - shared], len(piece) - shared
        if len(piece) < merged or not np.array_equal(whole, np.concatenate([prefix, piece[merged:]])):
            raise UserError(
                f"config.prompt.item: the tokenizer joins the beginning of {text[:40]!r} to the text before it, but "
                'not that of other items; begin the template with "\\n", or end config.prompt.prefix with another '
                "character"
            )
    return prefix, merged


def _append(texts: Sequences, tokens: Int[np.ndarray, "N L"]) -> Sequences:
    """Appends each item's codes to its text."""
    levels = tokens.shape[1]
    lengths = texts.lengths + levels
    is_code = np.zeros(lengths.sum(), bool)
    is_code[np.cumsum(lengths)[:, None] - levels + np.arange(levels)] = True
    values = np.empty(len(is_code), np.int32)
    values[is_code], values[~is_code] = tokens.reshape(-1), texts.values
    return Sequences.from_lengths(values, lengths)
