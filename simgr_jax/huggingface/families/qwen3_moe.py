"""Qwen3's mixture of experts (https://arxiv.org/abs/2505.09388)."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from simgr_jax.huggingface.families import llama
from simgr_jax.huggingface.families.source import Source, linear, require_off, unsupported
from simgr_jax.models.transformer_config import TransformerConfig

if TYPE_CHECKING:
    from transformers import Qwen3MoeConfig


def qwen3_moe(config: Qwen3MoeConfig, max_length: int) -> dict[str, Any]:
    """Every layer must have experts, as in all published checkpoints.

    Raises:
      UserError: some layer has a plain MLP.
    """
    require_off(config, "mlp_only_layers")
    if config.decoder_sparse_step != 1 or not config.num_experts:
        raise unsupported(f"decoder_sparse_step = {config.decoder_sparse_step} with {config.num_experts} experts")
    return llama.decoder(config, max_length) | {
        "attention_bias": config.attention_bias,
        "attention_output_bias": config.attention_bias,
        "qk_norm": "head",
        "windows": (config.sliding_window or 0,) * config.num_hidden_layers,
        "mlp_width": config.moe_intermediate_size,
        "experts": config.num_experts,
        "experts_per_token": config.num_experts_per_tok,
        "normalize_expert_weights": config.norm_topk_prob,
    }


def sources(config: TransformerConfig, names: Collection[str]) -> dict[str, Source]:
    """One tensor per expert, as in published checkpoints and by `save_pretrained`. If `names` has fused tensors, one
    per layer (`save_pretrained(..., save_original_format=False)`)."""
    fused = any(name.endswith(".mlp.experts.gate_up_proj") for name in names)
    experts = _fused_experts(config) if fused else _experts()
    router = linear("layers.mlp.router", "layers.{layer}.mlp.gate")
    return llama.attention(config) | router | experts | llama.NORMS


def _experts() -> dict[str, Source]:
    table = {}
    for name in ("gate_proj", "up_proj", "down_proj"):
        table |= linear(f"layers.mlp.{name}", f"layers.{{layer}}.mlp.experts.{{expert}}.{name}")
    return table


def _fused_experts(config: TransformerConfig) -> dict[str, Source]:
    """gate_up_proj is [experts, 2 * mlp_width, D], down_proj [experts, D, mlp_width]."""
    gate_up, inner = "layers.{layer}.mlp.experts.gate_up_proj", config.mlp_width
    return {
        "layers.mlp.gate_proj.kernel": Source(gate_up, transpose=True, part=(1, 0, inner)),
        "layers.mlp.up_proj.kernel": Source(gate_up, transpose=True, part=(1, inner, 2 * inner)),
        "layers.mlp.down_proj.kernel": Source("layers.{layer}.mlp.experts.down_proj", transpose=True),
    }


def fused(name: str) -> str:
    """The name of the fused tensor that has an expert's tensor `name` as a part."""
    name = re.sub(r"\.experts\.\d+\.(gate|up)_proj\.weight$", ".experts.gate_up_proj", name)
    return re.sub(r"\.experts\.\d+\.down_proj\.weight$", ".experts.down_proj", name)
