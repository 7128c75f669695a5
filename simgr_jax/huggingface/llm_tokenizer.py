"""The LLM's tokenizer with the semantic-ID tokens added."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from simgr_jax.errors import UserError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# One of these holds the vocabulary.
_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_tokenizer(folder: Path, new_tokens: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """The tokenizer in a model's folder. Never runs code that comes with a model.

    Args:
      new_tokens: added in this order unless the tokenizer has them already. Each is one token anywhere in a text.

    Raises:
      UserError: there is no tokenizer, or it cannot be read.
    """
    from transformers import AddedToken, AutoTokenizer  # Takes seconds, which runs without an LLM are spared.

    if not any((folder / name).is_file() for name in _FILES):
        # Transformers would silently create an empty tokenizer.
        raise UserError(f"{folder}: has none of {', '.join(_FILES)}; copy the model's tokenizer files there")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    # Transformers and Tokenizers raise many kinds of exceptions for missing or damaged files.
    except Exception as error:
        raise UserError(
            f"{folder}: its tokenizer can't be read ({first_line(error)[:150]}); "
            "copy the model's tokenizer files there again"
        ) from error
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in new_tokens])
    return tokenizer
