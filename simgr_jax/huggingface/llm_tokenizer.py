"""The LLM's tokenizer with the semantic-ID tokens added."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from simgr_jax.errors import UserError, first_line
from simgr_jax.huggingface import gguf_file, gguf_tokenizer
from simgr_jax.workdir.read_files import read_json_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

# One of these holds the vocabulary.
_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_tokenizer(path: Path, new_tokens: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """The tokenizer in a model's folder or GGUF file. Never runs code that comes with a model.

    Args:
      new_tokens: added in this order unless the tokenizer has them already. Each is one token anywhere in a text.

    Raises:
      UserError: there is no tokenizer, or it cannot be read.
    """
    from transformers import AddedToken  # Takes seconds, which runs without an LLM are spared.

    tokenizer = gguf_tokenizer.build(gguf_file.read(path)) if path.is_file() else _from_folder(path)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in new_tokens])
    return tokenizer


def _from_folder(folder: Path) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in _FILES):
        # Transformers would silently create an empty tokenizer.
        raise UserError(f"{folder}: has none of {', '.join(_FILES)}; copy the model's tokenizer files there")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    # Transformers and Tokenizers raise many kinds of exceptions for missing or damaged files.
    except Exception as error:
        raise UserError(
            f"{folder}: its tokenizer can't be read ({first_line(error)[:150]}); "
            "copy the model's tokenizer files there again"
        ) from error


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes the tokenizer so that Transformers 4.57 and 5 read it alike: tokenizer.json says all, and the class is the
    one that adds nothing of its own to it."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = read_json_object(path)
    for key in ("backend", "is_local", "local_files_only"):
        config.pop(key, None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    # 4.57 calls a list of special tokens by this name, and wants a dictionary by the other.
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    config["clean_up_tokenization_spaces"] = tokenizer.clean_up_tokenization_spaces
    # 4.57 changes the pre-tokenizer to what the config says of it.
    pre_tokenizer = read_json_object(folder / "tokenizer.json")["pre_tokenizer"] or {}
    config["add_prefix_space"] = pre_tokenizer.get("add_prefix_space", False)
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
