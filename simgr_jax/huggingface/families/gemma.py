"""Gemma 2 (https://arxiv.org/abs/2408.00118), and the language models of Gemma 3 (https://arxiv.org/abs/2503.19786) and
Gemma 4 (https://ai.google.dev/gemma/docs/core/model_card_4)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from simgr_jax.errors import UserError
from simgr_jax.huggingface.families import llama, rope
from simgr_jax.huggingface.families.source import Source, activation, layer_windows, linear, require_off, unsupported
from simgr_jax.models.transformer_config import TransformerConfig

if TYPE_CHECKING:
    from transformers import Gemma2Config, Gemma3TextConfig, Gemma4TextConfig


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


def gemma4_text(config: Gemma4TextConfig, max_length: int) -> dict[str, Any]:
    """Local and global layers, whose heads have different widths. In the small models, the upper layers take over keys
    and values, and all layers read the tokens anew; in the large ones, global layers' keys are also their values.

    Raises:
      UserError: the model has experts, reads text in both directions, or takes over another model's keys and values; or
        Transformers is too old.
    """
    if not hasattr(config, "per_layer_config"):
        raise UserError("config.backbone.checkpoint: Gemma 4 needs Transformers 5.15 or newer; upgrade it")
    require_off(config, "enable_moe_block")
    if config.use_bidirectional_attention == "all":  # "vision" concerns only images.
        raise unsupported('use_bidirectional_attention = "all"')
    kinds, owners = set(config.layer_types), config.layer_types[: _kv_owners(config)]
    if kinds != set(owners):  # There is nothing to take over, as in drafters, which take it from another model.
        raise unsupported(f"num_kv_shared_layers = {config.num_kv_shared_layers}")
    of_kind = {kind: config.per_layer_config[kind] for kind in sorted(kinds)}
    ropes = {kind: rope.rope(one, config.rope_parameters[kind], max_length) for kind, one in of_kind.items()}
    return llama.shape(config.per_layer_config[0]) | {
        "rope": tuple(ropes[kind] for kind in config.layer_types),
        "windows": layer_windows(config),
        "post_norms": True,
        "qk_norm": "head",
        "value_norm": True,
        "attention_bias": config.attention_bias,
        "attention_output_bias": config.attention_bias,
        "activation": activation(config.hidden_activation),
        "attention_scale": 1.0,
        "embedding_scale": math.sqrt(config.hidden_size),
        "per_layer_width": config.hidden_size_per_layer_input,
        "per_layer_count": config.num_hidden_layers,
        "layer_scale": True,
        "layer_fields": tuple(tuple(_gemma4_layer(config, layer).items()) for layer in range(config.num_hidden_layers)),
    }


def _kv_owners(config: Gemma4TextConfig) -> int:
    """The number of layers that have keys and values of their own; the layers after these take them over."""
    return max(config.num_hidden_layers - config.num_kv_shared_layers, 0)


def _gemma4_layer(config: Gemma4TextConfig, layer: int) -> dict[str, Any]:
    """A layer's own fields."""
    kind, own = config.layer_types[layer], config.per_layer_config[layer]
    takes_kv = layer >= _kv_owners(config)
    return {
        "head_width": own.head_dim,
        "kv_heads": own.num_key_value_heads,
        "values_are_keys": config.attention_k_eq_v and kind == "full_attention",
        "takes_kv": takes_kv,
        "kv_group": kind if config.num_kv_shared_layers else "",
        "mlp_width": config.intermediate_size * (2 if takes_kv and config.use_double_wide_mlp else 1),
    }


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


def gemma4_sources(config: TransformerConfig) -> dict[str, Source]:
    table = sources(config) | {"layers.scale": Source("layers.{layer}.layer_scalar")}
    if config.takes_kv or config.values_are_keys:
        left_out = ["v_proj"] + ["k_proj", "k_norm"] * config.takes_kv
        table = {path: one for path, one in table.items() if not any(f".{name}." in path for name in left_out)}
    if config.per_layer_width:
        inputs, layer = "per_layer_inputs", "layers.per_layer_input"
        table[f"{inputs}.projection"] = Source("per_layer_model_projection.weight", transpose=True)
        table |= linear(f"{layer}.per_layer_gate", "layers.{layer}.per_layer_input_gate")
        table |= linear(f"{layer}.per_layer_proj", "layers.{layer}.per_layer_projection")
        table[f"{inputs}.norm.scale"] = Source("per_layer_projection_norm.weight")
        table[f"{layer}.norm.scale"] = Source("layers.{layer}.post_per_layer_input_norm.weight")
    return table


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
