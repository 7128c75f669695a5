"""Item texts that spell a control token of the LLM, like `<|im_end|>`, are read as text."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # Importing it takes seconds.
    from tokenizers import Encoding
    from transformers import BatchEncoding, PreTrainedTokenizerFast

# How tokenizers spell control tokens that are not marked as special, such as <think>, and semantic-ID tokens.
_IN_BRACKETS = re.compile(r"<.*>|\[.*\]", re.DOTALL)


def control_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[int, str]:
    """The tokens that no item text may have, by id: control tokens and semantic-ID tokens."""
    added = {number: (token.content.strip(), token.special) for number, token in tokenizer.added_tokens_decoder.items()}
    return {
        number: content
        for number, (content, is_special) in added.items()
        if len(content) > 1 and (is_special or _IN_BRACKETS.fullmatch(content))
    }


def encode_as_text(
    texts: list[str], tokenizer: PreTrainedTokenizerFast, control: dict[int, str]
) -> tuple[list[str], BatchEncoding]:
    """Tokenizes texts so that nothing in them is read as a control token.

    A control token in a text gets a blank after its first character: `<|im_end|>` becomes `< |im_end|>`. So whoever
    tokenizes the returned text reads the same, also with an exported tokenizer.

    Args:
      control: from `control_tokens`.

    Returns:
      The texts with these blanks, and their tokens, without those that the tokenizer adds around a text.
    """
    while True:
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        changed = [_broken(text, one, control) for text, one in zip(texts, encoded.encodings or (), strict=True)]
        if changed == texts:
            return texts, encoded
        texts = changed


def _broken(text: str, encoding: Encoding, control: dict[int, str]) -> str:
    """The text with a blank in each of its control tokens."""
    if control.keys().isdisjoint(encoding.ids):
        return text
    # From the end, so that earlier places stay valid.
    for token, (start, end) in zip(reversed(encoding.ids), reversed(encoding.offsets), strict=True):
        content, found = control.get(token), text[start:end]
        if found.strip() == content:  # An unknown character is read as a control token, too, but is none.
            text = text[:start] + found.replace(content, f"{content[0]} {content[1:]}") + text[end:]
    return text
