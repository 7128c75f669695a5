"""Gemma 2 (https://arxiv.org/abs/2408.00118) and the text part of Gemma 3 (https://arxiv.org/abs/2503.19786)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from simgr_jax.huggingface.families import llama, rope
from simgr_jax.huggingface.families.source import Source, activation, layer_windows, require_off
from simgr_jax.models.transformer_config import TransformerConfig

if TYPE_CHECKING:
    from transformers import Gemma2Config, Gemma3TextConfig


def gemma2(config: Gemma2Config, max_length: int) -> dict[str, Any]:
    return _gemma(config) | {
        "rope": rope.uniform(config, max_length),
        "attention_softcap": config.attn_logit_softcapping or 0.0,
    }


def gemma3_text(config: Gemma3TextConfig, max_length: int) -> dict[str, Any]:
    """Local and global layers have different rotary positions."""
    # Transformers' Gemma 3 reads this option but ignores it, so its meaning in a checkpoint is unclear.
    require_off(config, "attn_logit_softcapping")
    return _gemma(config) | {"rope": rope.by_layer_type(config, max_length), "qk_norm": "head"}


def _gemma(config: Gemma2Config | Gemma3TextConfig) -> dict[str, Any]:
    require_off(config, "use_bidirectional_attention")
    return llama.shape(config) | {
        "windows": layer_windows(config),
        "norm_offset": 1.0,
        "post_norms": True,
        "attention_bias": config.attention_bias,
        "attention_output_bias": config.attention_bias,
        "activation": activation(config.hidden_activation),
        "attention_scale": config.query_pre_attn_scalar**-0.5,
        "embedding_scale": math.sqrt(config.hidden_size),
    }


def sources(config: TransformerConfig) -> dict[str, Source]:
    """Llama's tensors plus two norms. Llama's name for the MLP's norm means the norm after attention here."""
    norms = {
        f"layers.{ours}.scale": Source(f"layers.{{layer}}.{theirs}.weight")
        for ours, theirs in (
            ("pre_attention_norm", "input_layernorm"),
            ("post_attention_norm", "post_attention_layernorm"),
            ("pre_mlp_norm", "pre_feedforward_layernorm"),
            ("post_mlp_norm", "post_feedforward_layernorm"),
        )
    }
    return llama.sources(config) | norms
