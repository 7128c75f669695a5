"""GPT-2: learned positions, LayerNorm, biases everywhere, and projections stored as [in, out]."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from simgr_jax.errors import UserError
from simgr_jax.huggingface.families.source import Source, activation, require_off
from simgr_jax.models.transformer_config import TransformerConfig

if TYPE_CHECKING:
    from transformers import GPT2Config


def gpt2(config: GPT2Config, max_length: int) -> dict[str, Any]:
    """
    Raises:
      UserError: `max_length` exceeds the table of positions, or the config has an unsupported option.
    """
    require_off(config, "scale_attn_by_inverse_layer_idx", "add_cross_attention")
    if max_length > config.n_positions:
        raise UserError(
            f"config.backbone.checkpoint: GPT-2 has {config.n_positions} learned positions, but sequences may have "
            f"{max_length}; shorten them (config.training.row_length, or config.item_reader.max_tokens for item texts)"
        )
    return {
        "width": config.n_embd,
        "layers": config.n_layer,
        "heads": config.n_head,
        "kv_heads": config.n_head,
        "head_width": config.n_embd // config.n_head,
        "mlp_width": config.n_inner or 4 * config.n_embd,
        "rope": (),
        "windows": (0,) * config.n_layer,
        "max_positions": config.n_positions,
        "norm": "layer",
        "norm_epsilon": config.layer_norm_epsilon,
        "attention_bias": True,
        "attention_output_bias": True,
        "mlp_bias": True,
        "gated_mlp": False,
        "activation": activation(config.activation_function),
        "attention_scale": None if config.scale_attn_weights else 1.0,
    }


def sources(config: TransformerConfig) -> dict[str, Source]:
    """c_attn stacks the outputs for queries, keys and values."""
    table = {"position_embedding": Source("wpe.weight")}
    for number, name in enumerate(("q_proj", "k_proj", "v_proj")):
        columns = number * config.width, (number + 1) * config.width
        table |= {
            f"layers.self_attn.{name}.kernel": Source("h.{layer}.attn.c_attn.weight", part=(1, *columns)),
            f"layers.self_attn.{name}.bias": Source("h.{layer}.attn.c_attn.bias", part=(0, *columns)),
        }
    for ours, theirs in (
        ("self_attn.o_proj", "attn.c_proj"),
        ("mlp.up_proj", "mlp.c_fc"),
        ("mlp.down_proj", "mlp.c_proj"),
    ):
        table |= {
            f"layers.{ours}.kernel": Source(f"h.{{layer}}.{theirs}.weight"),
            f"layers.{ours}.bias": Source(f"h.{{layer}}.{theirs}.bias"),
        }
    for ours, theirs in (
        ("layers.pre_attention_norm", "h.{layer}.ln_1"),
        ("layers.pre_mlp_norm", "h.{layer}.ln_2"),
        ("final_norm", "ln_f"),
    ):
        table |= {f"{ours}.scale": Source(f"{theirs}.weight"), f"{ours}.bias": Source(f"{theirs}.bias")}
    return table
