"""LFM2 (https://arxiv.org/abs/2511.23404): most layers have a gated short convolution in attention's place."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from simgr_jax.huggingface.families import rope
from simgr_jax.huggingface.families.source import Source, head_width, layer_fields, layer_windows, linear
from simgr_jax.models.transformer_config import TransformerConfig

if TYPE_CHECKING:
    from transformers import Lfm2Config


def lfm2(config: Lfm2Config, max_length: int) -> dict[str, Any]:
    return {
        "width": config.hidden_size,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_width": head_width(config),
        "mlp_width": _mlp_width(config),
        "norm_epsilon": config.norm_eps,
        "qk_norm": "head",
        "rope": rope.uniform(config, max_length),
        "windows": layer_windows(config, "conv"),
        "convolution_width": config.conv_L_cache,
        "convolution_bias": config.conv_bias,
        "layer_fields": layer_fields(config, {"conv": {"mixer": "short_convolution"}}),
    }


def _mlp_width(config: Lfm2Config) -> int:
    """`intermediate_size` may be meant for an MLP without a gate; with one, two thirds of it have as many weights."""
    width = config.intermediate_size
    if config.block_auto_adjust_ff_dim:
        width = int(config.block_ffn_dim_multiplier * int(2 * width / 3))
        width = -(-width // config.block_multiple_of) * config.block_multiple_of
    return width


def sources(config: TransformerConfig) -> dict[str, Source]:
    table = {
        "layers.pre_attention_norm.scale": Source("layers.{layer}.operator_norm.weight"),
        "layers.pre_mlp_norm.scale": Source("layers.{layer}.ffn_norm.weight"),
        "final_norm.scale": Source("embedding_norm.weight"),
    }
    for ours, theirs in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
        table |= linear(f"layers.mlp.{ours}", f"layers.{{layer}}.feed_forward.{theirs}")
    return table | (_attention() if config.mixer == "attention" else _convolution(config))


def _attention() -> dict[str, Source]:
    table = {}
    for ours, theirs in (("q_proj", "q_proj"), ("k_proj", "k_proj"), ("v_proj", "v_proj"), ("o_proj", "out_proj")):
        table |= linear(f"layers.self_attn.{ours}", f"layers.{{layer}}.self_attn.{theirs}")
    for name in ("q", "k"):
        table[f"layers.self_attn.{name}_norm.scale"] = Source(f"layers.{{layer}}.self_attn.{name}_layernorm.weight")
    return table


def _convolution(config: TransformerConfig) -> dict[str, Source]:
    """in_proj stacks the outputs for the input gate, the output gate and x, in this order."""
    bias = config.convolution_bias
    table = {"layers.short_conv.kernel": Source("layers.{layer}.conv.conv.weight")}
    table |= linear("layers.short_conv.o_proj", "layers.{layer}.conv.out_proj", bias)
    table |= {"layers.short_conv.bias": Source("layers.{layer}.conv.conv.bias")} if bias else {}
    for number, name in enumerate(("in_gate_proj", "out_gate_proj", "x_proj")):
        part = (0, number * config.width, (number + 1) * config.width)
        for path, source in linear(f"layers.short_conv.{name}", "layers.{layer}.conv.in_proj", bias).items():
            table[path] = dataclasses.replace(source, part=part)
    return table
