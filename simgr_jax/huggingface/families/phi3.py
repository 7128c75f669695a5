"""Phi-3, 3.5 and 4 (https://arxiv.org/abs/2404.14219): Llama with fused projections and, in some configs, rotary
positions on only part of each head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from simgr_jax.huggingface.families import llama
from simgr_jax.huggingface.families.source import Source
from simgr_jax.models.transformer_config import TransformerConfig

if TYPE_CHECKING:
    from transformers import Phi3Config


def phi3(config: Phi3Config, max_length: int) -> dict[str, Any]:
    return llama.decoder(config, max_length) | {"windows": (config.sliding_window or 0,) * config.num_hidden_layers}


def sources(config: TransformerConfig) -> dict[str, Source]:
    """qkv_proj stacks the outputs for queries, keys and values, in this order; gate_up_proj stacks gate and up."""
    queries, keys = config.heads * config.head_width, config.kv_heads * config.head_width
    table = llama.sources(config)
    for name, start, stop in (
        ("q_proj", 0, queries),
        ("k_proj", queries, queries + keys),
        ("v_proj", queries + keys, queries + 2 * keys),
    ):
        table[f"layers.self_attn.{name}.kernel"] = Source(
            "layers.{layer}.self_attn.qkv_proj.weight", transpose=True, part=(0, start, stop)
        )
    for name, start in (("gate_proj", 0), ("up_proj", config.mlp_width)):
        table[f"layers.mlp.{name}.kernel"] = Source(
            "layers.{layer}.mlp.gate_up_proj.weight", transpose=True, part=(0, start, start + config.mlp_width)
        )
    return table
