"""From a checkpoint and the config to what a recommender takes over from an LLM."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jax.numpy as jnp
import ml_collections
import numpy as np
from jaxtyping import Array, Float, Int
from transformers import PreTrainedTokenizerBase

from simgr_jax import default_config, sharding
from simgr_jax.data.prompts import Prompt
from simgr_jax.errors import UserError
from simgr_jax.huggingface import families, token_embeddings
from simgr_jax.huggingface.checkpoint import Checkpoint, local_folder, read_config
from simgr_jax.huggingface.load import load_transformer, read_embedding_rows
from simgr_jax.models.create import COMPUTATION_KEYS, SHAPE_KEYS
from simgr_jax.models.inputs import Backbone
from simgr_jax.models.transformer import TransformerConfig
from simgr_jax.semantic_ids.tokenizer import SemanticIds

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_KEY = "config.backbone.checkpoint"


def open_checkpoint(config: ml_collections.ConfigDict) -> Checkpoint:
    """The checkpoint of `config.backbone.checkpoint`; no weights are read.

    Raises:
      UserError: it can't be used, or the config asks for a shape although the checkpoint has one.
    """
    _check_shape(config)
    checkpoint = Checkpoint(local_folder(config.backbone.checkpoint, _KEY))
    # What is wrong whatever the length is better told before the data are prepared.
    backbone_config(checkpoint.config, config, max_length=1)
    return checkpoint


def open_config(config: ml_collections.ConfigDict) -> tuple[Path, PretrainedConfig]:
    """As `open_checkpoint`, of a folder that needn't have the weights: itself, and the model's config."""
    _check_shape(config)
    folder = local_folder(config.backbone.checkpoint, _KEY, weights=False)
    return folder, read_config(folder)


def _check_shape(config: ml_collections.ConfigDict) -> None:
    default = default_config.get_config().backbone
    for key in SHAPE_KEYS:
        if config.backbone[key] != default[key]:
            raise UserError(f"config.backbone.{key}: is decided by {_KEY}; leave it out")


def backbone_config(
    hf_config: PretrainedConfig, config: ml_collections.ConfigDict, max_length: int
) -> TransformerConfig:
    """A checkpoint's decoder, computed as `config.backbone` says.

    Raises:
      UserError: see `families.transformer_config`.
    """
    computation = {key: config.backbone[key] for key in COMPUTATION_KEYS}
    return families.transformer_config(hf_config, max_length=max_length, **computation)


def longest_sequence(config: ml_collections.ConfigDict, prompt: Prompt) -> int:
    """The positions that the backbone has to know."""
    length = min(prompt.longest(config.data.max_items), config.training.row_length)
    # The autoregressive model reads one item more: the one that it spells.
    return length + int(prompt.pieces.lengths.max()) * (config.model.name == "autoregressive")


def base_dtype(config: ml_collections.ConfigDict) -> str:
    """Of the checkpoint's weights; what is trained is kept in float32."""
    return config.lora.base_dtype if config.lora.rank else "float32"


def load_pretrained(
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    config: ml_collections.ConfigDict,
    semantic_ids: SemanticIds,
    item_texts: Sequence[str] | None,
    prompt: Prompt,
) -> Backbone:
    """The weights, on the devices.

    Raises:
      UserError: the checkpoint is not whole, can't read prompts so long, or the tokens can't begin as asked.
    """
    decoder, dtype = backbone_config(checkpoint.config, config, longest_sequence(config, prompt)), base_dtype(config)
    return Backbone(
        load_transformer(checkpoint, decoder, dtype, sharding.parameter_sharding),
        _token_embeddings(checkpoint, tokenizer, config, semantic_ids, item_texts),
        _text_embedding(checkpoint, prompt.text_tokens, dtype),
    )


def _text_embedding(checkpoint: Checkpoint, text_tokens: Int[np.ndarray, " W"], dtype: str) -> Array | None:
    return jnp.asarray(read_embedding_rows(checkpoint, text_tokens), dtype) if len(text_tokens) else None


def _token_embeddings(checkpoint, tokenizer, config, semantic_ids, item_texts) -> Float[np.ndarray, "V D"]:
    if config.backbone.token_init == "mean":
        return token_embeddings.from_mean(checkpoint, semantic_ids.vocab_size, config.seed)
    if item_texts is None:
        raise UserError('config.backbone.token_init: "words" needs item texts, and the dataset has none; use "mean"')
    return token_embeddings.from_words(
        checkpoint, tokenizer, item_texts, semantic_ids.tokens, semantic_ids.vocab_size, config.seed
    )
