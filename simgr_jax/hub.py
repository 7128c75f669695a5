"""Finds a Hugging Face model: a local folder, or an id on the hub, which is downloaded."""

from __future__ import annotations

import os
from pathlib import Path

from simgr_jax.errors import UserError


def local_folder(name: str, key: str, *, weights: bool = True) -> Path:
    """Returns the local folder of a model. Downloads it from the Hugging Face hub unless `name` is a folder.

    Only JSON, text, sentencepiece models and safetensors are downloaded: never pickles, never code.

    Args:
      name: a folder, or an id on the hub.
      key: the config key of `name`, for the error message.
      weights: whether to download the weights as well.

    Raises:
      UserError: `name` is neither a folder nor a model that can be downloaded.
    """
    if (folder := Path(os.path.expanduser(name))).is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                name,
                allow_patterns=["*.json", "*.txt", "*.model", *["*.safetensors"] * weights],
                ignore_patterns=["consolidated*"],  # Mistral's second copy of the weights.
            )
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{key}: {name} is not a folder, and can't be downloaded from the Hugging Face hub; "
            "check the name (a gated model needs `hf auth login`), or give a folder"
        ) from error
