"""From a checkpoint and the config to what a recommender takes over from an LLM."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import ml_collections
import numpy as np
from jaxtyping import Array, Float, Int
from transformers import PreTrainedTokenizerBase

from simgr_jax import default_config, sharding
from simgr_jax.data.prompts import Prompt
from simgr_jax.errors import UserError
from simgr_jax.huggingface import families, token_embeddings
from simgr_jax.huggingface.checkpoint import Checkpoint, local_folder
from simgr_jax.huggingface.load import load_transformer, read_embedding_rows
from simgr_jax.models.create import COMPUTATION_KEYS, SHAPE_KEYS, Pretrained
from simgr_jax.models.transformer import TransformerConfig
from simgr_jax.semantic_ids.tokenizer import SemanticIds


def open_checkpoint(config: ml_collections.ConfigDict) -> Checkpoint:
    """The checkpoint of `config.backbone.checkpoint`; no weights are read.

    Raises:
      UserError: it can't be used, or the config asks for a shape although the checkpoint has one.
    """
    default = default_config.get_config().backbone
    for key in SHAPE_KEYS:
        if config.backbone[key] != default[key]:
            raise UserError(f"config.backbone.{key}: is decided by config.backbone.checkpoint; leave it out")
    checkpoint = Checkpoint(local_folder(config.backbone.checkpoint, "config.backbone.checkpoint"))
    # What is wrong whatever the length is better told before the data are prepared.
    _backbone_config(checkpoint, config, max_length=1)
    return checkpoint


def _backbone_config(checkpoint: Checkpoint, config: ml_collections.ConfigDict, max_length: int) -> TransformerConfig:
    computation = {key: config.backbone[key] for key in COMPUTATION_KEYS}
    return families.transformer_config(checkpoint.config, max_length=max_length, **computation)


def load_pretrained(
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    config: ml_collections.ConfigDict,
    semantic_ids: SemanticIds,
    item_texts: Sequence[str] | None,
    prompt: Prompt,
) -> Pretrained:
    """The weights, on the devices.

    Raises:
      UserError: the checkpoint is not whole, can't read prompts so long, or the tokens can't begin as asked.
    """
    # What is trained is kept in float32.
    dtype = config.lora.base_dtype if config.lora.rank else "float32"
    max_length = min(prompt.longest(config.data.max_items), config.training.row_length)
    return Pretrained(
        load_transformer(
            checkpoint, _backbone_config(checkpoint, config, max_length), dtype, sharding.parameter_sharding
        ),
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
