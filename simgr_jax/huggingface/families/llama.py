"""Llama and the families that differ from it in an option or two: Granite, Mistral, Ministral 3, Qwen2, Qwen3 and
SmolLM3."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from simgr_jax.huggingface.families import rope
from simgr_jax.huggingface.families.source import Source, activation, head_width, layer_windows, linear
from simgr_jax.models.transformer_config import Rope, TransformerConfig

if TYPE_CHECKING:
    from transformers import (
        GraniteConfig,
        LlamaConfig,
        Ministral3Config,
        MistralConfig,
        PretrainedConfig,
        Qwen2Config,
        Qwen3Config,
        SmolLM3Config,
    )


def shape(config: PretrainedConfig) -> dict[str, Any]:
    """The fields that all configs but GPT-2's share."""
    return {
        "width": config.hidden_size,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_width": head_width(config),
        "mlp_width": config.intermediate_size,
        "norm_epsilon": config.rms_norm_eps,
    }


def decoder(config: PretrainedConfig, max_length: int) -> dict[str, Any]:
    """A Llama-like decoder without biases or windows."""
    return shape(config) | {
        "activation": activation(config.hidden_act),
        "rope": rope.uniform(config, max_length),
        "windows": (0,) * config.num_hidden_layers,
    }


def llama(config: LlamaConfig, max_length: int) -> dict[str, Any]:
    """Llama 2 and 3 (https://arxiv.org/abs/2407.21783). SmolLM 1 and 2 are also Llamas."""
    return decoder(config, max_length) | {
        "attention_bias": config.attention_bias,
        "attention_output_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
    }


def granite(config: GraniteConfig, max_length: int) -> dict[str, Any]:
    """Granite 3 (https://huggingface.co/ibm-granite): scaled embeddings, residual branches and attention scores. The
    scale of the logits concerns only the language-model head."""
    return llama(config, max_length) | {
        "attention_scale": config.attention_multiplier,
        "embedding_scale": config.embedding_multiplier,
        "residual_scale": config.residual_multiplier,
    }


def mistral(config: MistralConfig, max_length: int) -> dict[str, Any]:
    """Mistral (https://arxiv.org/abs/2310.06825): the same window in every layer."""
    return decoder(config, max_length) | {"windows": (config.sliding_window or 0,) * config.num_hidden_layers}


def ministral3(config: Ministral3Config, max_length: int) -> dict[str, Any]:
    """Ministral 3 (https://arxiv.org/abs/2601.08584): queries that grow at far positions."""
    rope = config.rope_parameters
    fields = mistral(config, max_length)
    if growth := rope.get("llama_4_scaling_beta"):
        fields["query_growth"] = float(growth), float(rope["original_max_position_embeddings"])
    return fields


def qwen2(config: Qwen2Config, max_length: int) -> dict[str, Any]:
    """Qwen2 and 2.5 (https://arxiv.org/abs/2407.10671): biases on q, k and v; upper layers may have a window."""
    return decoder(config, max_length) | {"attention_bias": True, "windows": layer_windows(config)}


def qwen3(config: Qwen3Config, max_length: int) -> dict[str, Any]:
    """Qwen3 (https://arxiv.org/abs/2505.09388): normalised queries and keys."""
    return decoder(config, max_length) | {
        "attention_bias": config.attention_bias,
        "attention_output_bias": config.attention_bias,
        "qk_norm": "head",
        "windows": layer_windows(config),
    }


def smollm3(config: SmolLM3Config, max_length: int) -> dict[str, Any]:
    """SmolLM3: one of every few layers has no positions (https://arxiv.org/abs/2501.18795)."""
    fields = llama(config, max_length)
    # The list may be longer than the number of layers.
    ropes = zip(fields["rope"], config.no_rope_layers, strict=False)
    return fields | {
        "rope": tuple(rotary if rotates else Rope(()) for rotary, rotates in ropes),
        "windows": layer_windows(config),
    }


def sources(config: TransformerConfig) -> dict[str, Source]:
    """The tensors of a Llama-like decoder."""
    return attention(config) | mlp(config) | NORMS


NORMS = {
    "layers.pre_attention_norm.scale": Source("layers.{layer}.input_layernorm.weight"),
    "layers.pre_mlp_norm.scale": Source("layers.{layer}.post_attention_layernorm.weight"),
    "final_norm.scale": Source("norm.weight"),
}


def attention(config: TransformerConfig) -> dict[str, Source]:
    ours, theirs = "layers.self_attn", "layers.{layer}.self_attn"
    table = {}
    for name in ("q_proj", "k_proj", "v_proj"):
        table |= linear(f"{ours}.{name}", f"{theirs}.{name}", config.attention_bias)
    table |= linear(f"{ours}.o_proj", f"{theirs}.o_proj", config.attention_output_bias)
    if config.qk_norm != "none":
        table |= {f"{ours}.{name}.scale": Source(f"{theirs}.{name}.weight") for name in ("q_norm", "k_norm")}
    return table


def mlp(config: TransformerConfig) -> dict[str, Source]:
    table = {}
    for name in ("gate_proj", "up_proj", "down_proj"):
        table |= linear(f"layers.mlp.{name}", f"layers.{{layer}}.mlp.{name}", config.mlp_bias)
    return table
