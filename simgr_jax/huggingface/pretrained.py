"""Loads the parts of an LLM that a recommender uses: its decoder, and embeddings of the tokens in prompts."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import jax.numpy as jnp
import ml_collections
import numpy as np
from jaxtyping import Array, Float, Int

from simgr_jax.devices import sharding
from simgr_jax.errors import UserError
from simgr_jax.hub import local_folder
from simgr_jax.huggingface import families, token_init
from simgr_jax.huggingface.checkpoint import Checkpoint
from simgr_jax.huggingface.load_weights import load_transformer, read_input_rows
from simgr_jax.inputs.prompts import ItemContents, Prompt
from simgr_jax.models.model_inputs import Backbone
from simgr_jax.models.options import COMPUTATION_KEYS
from simgr_jax.models.transformer_config import TransformerConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

_KEY = "config.backbone.checkpoint"


def checkpoint_path(name: str, key: str = _KEY, *, weights: bool = True) -> Path:
    """A checkpoint's GGUF file or folder, downloaded if `name` is a hub id.

    Args:
      key: the config key that names it.

    Raises:
      UserError: there is no such file, or see `hub.local_folder`.
    """
    path = Path(os.path.expanduser(name))
    if path.is_file():
        return path
    if path.suffix == ".gguf" and not path.is_dir():
        raise UserError(f"{path}: no such file; check {key}")
    return local_folder(name, key, weights=weights)


def item_reader_path(config: ml_collections.ConfigDict, *, weights: bool = True) -> Path:
    """The LLM that reads the items' texts: that of `config.item_reader`, or the backbone's.

    Raises:
      UserError: there is neither, or see `checkpoint_path`.
    """
    for group in ("item_reader", "backbone"):
        if name := config[group].checkpoint:
            return checkpoint_path(name, f"config.{group}.checkpoint", weights=weights)
    raise UserError(
        "config.item_reader.checkpoint: is empty, as config.backbone.checkpoint is; name the LLM that reads the item "
        "texts"
    )


def open_checkpoint(config: ml_collections.ConfigDict) -> Checkpoint:
    """The checkpoint of `config.backbone.checkpoint`; no weights are read.

    Raises:
      UserError: the checkpoint can't be used.
    """
    checkpoint = Checkpoint(checkpoint_path(config.backbone.checkpoint), config.backbone.first_layers)
    # Find mistakes that do not depend on the length now, before the data are prepared.
    backbone_config(checkpoint.config, config, max_length=1)
    return checkpoint


def backbone_config(
    hf_config: PretrainedConfig, config: ml_collections.ConfigDict, max_length: int
) -> TransformerConfig:
    """The config of a checkpoint's decoder, with the computation options of `config.backbone`.

    Raises:
      UserError: see `families.transformer_config`.
    """
    computation = {key: config.backbone[key] for key in COMPUTATION_KEYS}
    return families.transformer_config(hf_config, max_length=max_length, **computation)


def base_dtype(config: ml_collections.ConfigDict) -> str:
    """The dtype of the checkpoint's weights. Trained parameters are float32."""
    return config.lora.base_dtype if config.lora.rank else "float32"


def load_pretrained(
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerFast,
    config: ml_collections.ConfigDict,
    items: ItemContents,
    prompt: Prompt,
    longest: int,
    item_readings: Callable[[], Float[np.ndarray, "N X"]] | None = None,
) -> Backbone:
    """The checkpoint's weights on the devices, and initial embeddings for the semantic-ID tokens.

    Args:
      longest: the longest sequence, in positions.
      item_readings: gives the readings of the items' texts, for the token_init "reading".

    Raises:
      UserError: the checkpoint is incomplete or can't read sequences this long, or `token_init` does not suit the data.
    """
    shape, dtype = backbone_config(checkpoint.config, config, longest), base_dtype(config)
    return Backbone(
        load_transformer(checkpoint, shape, dtype, sharding.variable_sharding),
        _token_embeddings(checkpoint, tokenizer, config, items, item_readings),
        _text_embedding(checkpoint, prompt.text_tokens, dtype),
    )


def _text_embedding(checkpoint: Checkpoint, text_tokens: Int[np.ndarray, " W"], dtype: str) -> Array | None:
    return jnp.asarray(read_input_rows(checkpoint, text_tokens), dtype) if len(text_tokens) else None


def _token_embeddings(
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerFast,
    config: ml_collections.ConfigDict,
    items: ItemContents,
    item_readings: Callable[[], Float[np.ndarray, "N X"]],
) -> Float[np.ndarray, "V D"]:
    ids = items.semantic_ids
    if config.backbone.token_init == "reading":
        return token_init.from_readings(checkpoint, item_readings(), ids.tokens, ids.vocab_size)
    if config.backbone.token_init == "mean":
        return token_init.from_mean(checkpoint, ids.vocab_size, config.seed)
    if items.texts is None:
        raise UserError('config.backbone.token_init: "words" needs item texts, and the dataset has none; use "mean"')
    return token_init.from_words(checkpoint, tokenizer, items.texts, ids.tokens, ids.vocab_size, config.seed)
