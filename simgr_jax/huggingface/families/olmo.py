"""OLMo 2 (https://arxiv.org/abs/2501.00656) and OLMo 3 (https://arxiv.org/abs/2512.13961): attention and MLP have
normalized outputs instead of inputs, and queries and keys are normalized over all heads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from simgr_jax.huggingface.families import llama, rope
from simgr_jax.huggingface.families.source import Source, activation, layer_windows
from simgr_jax.models.transformer_config import TransformerConfig

if TYPE_CHECKING:
    from transformers import Olmo2Config, Olmo3Config


def olmo2(config: Olmo2Config, max_length: int) -> dict[str, Any]:
    return _olmo(config) | {
        "rope": rope.uniform(config, max_length),
        "windows": (0,) * config.num_hidden_layers,
    }


def olmo3(config: Olmo3Config, max_length: int) -> dict[str, Any]:
    """Local and global layers, whose rotary positions differ."""
    return _olmo(config) | {"rope": rope.by_layer_type(config, max_length), "windows": layer_windows(config)}


def _olmo(config: Olmo2Config | Olmo3Config) -> dict[str, Any]:
    return llama.shape(config) | {
        "activation": activation(config.hidden_act),
        "attention_bias": config.attention_bias,
        "attention_output_bias": config.attention_bias,
        "qk_norm": "all_heads",
        "pre_norms": False,
        "post_norms": True,
    }


def sources(config: TransformerConfig) -> dict[str, Source]:
    return (
        llama.attention(config)
        | llama.mlp(config)
        | {
            "layers.post_attention_norm.scale": Source("layers.{layer}.post_attention_layernorm.weight"),
            "layers.post_mlp_norm.scale": Source("layers.{layer}.post_feedforward_layernorm.weight"),
            "final_norm.scale": Source("norm.weight"),
        }
    )
