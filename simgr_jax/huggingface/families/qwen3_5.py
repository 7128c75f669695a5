"""The language model of Qwen3.5 (https://huggingface.co/Qwen): most layers have a gated delta net in place of
attention, which has a gate and rotates a part of each head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from simgr_jax.huggingface.families import llama
from simgr_jax.huggingface.families.source import Source, layer_fields, layer_windows, linear, unsupported
from simgr_jax.models.transformer_config import DeltaNetShape, TransformerConfig

if TYPE_CHECKING:
    from transformers import Qwen3_5TextConfig


def qwen3_5(config: Qwen3_5TextConfig, max_length: int) -> dict[str, Any]:
    """
    Raises:
      UserError: an activation other than SiLU, which the delta nets use, too.
    """
    if config.hidden_act != "silu":
        raise unsupported(f'the activation "{config.hidden_act}"')
    return llama.decoder(config, max_length) | {
        "norm_offset": 1.0,
        "attention_bias": config.attention_bias,
        "attention_output_bias": config.attention_bias,
        "attention_gate": True,
        "qk_norm": "head",
        "windows": layer_windows(config, "linear_attention"),
        "convolution_width": config.linear_conv_kernel_dim,
        "delta_net": DeltaNetShape(
            key_heads=config.linear_num_key_heads,
            value_heads=config.linear_num_value_heads,
            key_width=config.linear_key_head_dim,
            value_width=config.linear_value_head_dim,
        ),
        "layer_fields": layer_fields(config, {"linear_attention": {"mixer": "gated_delta_net"}}),
    }


def sources(config: TransformerConfig) -> dict[str, Source]:
    if config.mixer == "attention":
        return llama.sources(config)
    return _delta_net(config) | llama.mlp(config) | llama.NORMS


def _delta_net(config: TransformerConfig) -> dict[str, Source]:
    """in_proj_qkv and conv1d stack queries, keys and values, in this order."""
    ours, theirs, shape = "layers.delta_net", "layers.{layer}.linear_attn", config.delta_net
    table = {
        f"{ours}.log_decay_scale": Source(f"{theirs}.A_log"),
        f"{ours}.step_bias": Source(f"{theirs}.dt_bias"),
        f"{ours}.norm.scale": Source(f"{theirs}.norm.weight"),
    }
    for name in ("a", "b", "z"):
        table |= linear(f"{ours}.{name}_proj", f"{theirs}.in_proj_{name}")
    table |= linear(f"{ours}.o_proj", f"{theirs}.out_proj")
    keys, values, start = shape.key_heads * shape.key_width, shape.value_heads * shape.value_width, 0
    for name, width in (("q", keys), ("k", keys), ("v", values)):
        part = (0, start, start + width)
        table[f"{ours}.{name}_proj.kernel"] = Source(f"{theirs}.in_proj_qkv.weight", transpose=True, part=part)
        table[f"{ours}.{name}_conv"] = Source(f"{theirs}.conv1d.weight", part=part)
        start += width
    return table
