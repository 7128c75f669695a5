"""The LLM's tokenizer, with the semantic-ID tokens added."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase

from simgr_jax.errors import UserError, first_line

# One of them holds the vocabulary.
_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_tokenizer(folder: Path, new_tokens: Sequence[str] = ()) -> PreTrainedTokenizerBase:
    """The tokenizer in a model's folder.

    Args:
      new_tokens: added in this order where the tokenizer doesn't have them yet; each is one token wherever it stands
        in a text.

    Raises:
      UserError: there is none, or it can't be read. Code that comes with a model is never run.
    """
    if not any((folder / name).is_file() for name in _FILES):
        # Transformers would make up an empty one.
        raise UserError(f"{folder}: has none of {', '.join(_FILES)}; copy the model's tokenizer files there")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    # Transformers and Tokenizers raise many kinds of exceptions for files that are missing or damaged.
    except Exception as error:
        raise UserError(
            f"{folder}: has no tokenizer that can be read ({first_line(error)[:150]}); "
            "copy the model's tokenizer files there"
        ) from error
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in new_tokens])
    return tokenizer
