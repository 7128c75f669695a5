"""Makes tiny random checkpoints of every family with Transformers, and the outputs that torch computes from them.

    python tests/huggingface/make_golden.py [NAME ...]

writes `golden/NAME/` for each of CASES, or for those named: a checkpoint in `save_pretrained`'s layout, and
`expected.safetensors` with the inputs, hidden states and gradients of `expected`. The tests compare with these files;
if torch is installed, they also make and compare new checkpoints in the same way.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parent / "golden"

# Three sequences, each longer than every window and rope length below. They are padded to the first one's length; the
# other two also fill one packed row.
LENGTHS = (24, 14, 10)
VOCABULARY = 1 + sum(LENGTHS)
PADDING = 0

_NO_SPECIAL_TOKENS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
SMALL = {
    **_NO_SPECIAL_TOKENS,
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_SMALL_GPT2 = {
    **_NO_SPECIAL_TOKENS,
    "vocab_size": VOCABULARY,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": LENGTHS[0],
}
_TINY_VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 4,
    "intermediate_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 4,
    "patch_size": 2,
}
_TINY_PIXTRAL = {
    "model_type": "pixtral",
    "hidden_size": 4,
    "intermediate_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "head_dim": 4,
    "image_size": 4,
    "patch_size": 2,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A checkpoint: its model class, its config in addition to `small`, and the options for saving it."""

    architecture: str
    config: dict[str, Any]
    small: dict[str, Any] = dataclasses.field(default_factory=lambda: SMALL)
    save: dict[str, Any] = dataclasses.field(default_factory=dict)


def _longrope(original: int) -> dict[str, Any]:
    return {
        "max_position_embeddings": 4 * original,
        "original_max_position_embeddings": original,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 100.0,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.5, 3.0],
            "long_factor": [1.2, 4.0, 7.0],
        },
    }


_GEMMA3 = {
    "num_hidden_layers": 7,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "sliding_window": 5,
    "query_pre_attn_scalar": 5,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
    },
}

# Queries grow three times within a sequence.
_MINISTRAL3 = {
    "head_dim": 8,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 100.0,
        "factor": 4.0,
        "beta_fast": 2.0,
        "beta_slow": 1.0,
        "original_max_position_embeddings": 6,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.3,
    },
}

_GEMMA4 = {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "global_head_dim": 8,
    "sliding_window": 5,
    "rope_parameters": {
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 500.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
    },
}
_TINY_GEMMA4_VISION = {
    "hidden_size": 4,
    "intermediate_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "patch_size": 2,
    "position_embedding_size": 4,
}
_QWEN3_5 = {
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_conv_kernel_dim": 3,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 5,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 50.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [1, 1, 0],
    },
}
_TINY_QWEN3_5_VISION = {
    "depth": 1,
    "hidden_size": 4,
    "intermediate_size": 4,
    "num_heads": 1,
    "out_hidden_size": 16,
    "patch_size": 2,
    "num_position_embeddings": 4,
}

CASES = {
    "llama": Case("LlamaForCausalLM", {"head_dim": 6, "rms_norm_eps": 1e-2}),
    # One of its eight frequencies is kept, two are interpolated and five are divided.
    "llama_llama3_rope": Case(
        "LlamaForCausalLM",
        {
            "head_dim": 16,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 100.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 2.5,
                "original_max_position_embeddings": 20,
            },
        },
    ),
    "llama_biases_linear_rope": Case(
        "LlamaModel",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "hidden_act": "gelu",
            "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 100.0},
        },
    ),
    "llama_proportional_rope": Case(
        "LlamaModel",
        {
            "head_dim": 12,
            "rope_parameters": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 50.0},
        },
    ),
    "mistral": Case("MistralForCausalLM", {"sliding_window": 5, "head_dim": 6}),
    "mistral_no_window": Case("MistralForCausalLM", {"sliding_window": None}),
    "ministral3": Case("Ministral3ForCausalLM", _MINISTRAL3 | {"sliding_window": 7}),
    "mistral3": Case(
        "Mistral3ForConditionalGeneration",
        {
            "text_config": SMALL | _MINISTRAL3 | {"model_type": "ministral3", "sliding_window": None},
            "vision_config": _TINY_PIXTRAL,
            "tie_word_embeddings": False,
        },
        small={},
    ),
    "granite": Case(
        "GraniteForCausalLM",
        {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.3,
            "residual_multiplier": 0.4,
            "logits_scaling": 4.0,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    # Its layers make two segments: one of short convolutions, and "full_attention", "conv" twice.
    "lfm2": Case(
        "Lfm2ForCausalLM",
        {
            "num_hidden_layers": 5,
            "layer_types": ["conv", "full_attention", "conv", "full_attention", "conv"],
            "block_auto_adjust_ff_dim": False,
        },
    ),
    "lfm2_biases": Case(
        "Lfm2Model",
        {
            "num_hidden_layers": 3,
            "layer_types": ["conv", "conv", "full_attention"],
            "conv_bias": True,
            "conv_L_cache": 4,
            "norm_eps": 1e-2,
            "intermediate_size": 25,
            "block_multiple_of": 4,
            "block_ffn_dim_multiplier": 1.3,
        },
    ),
    "olmo2": Case("Olmo2ForCausalLM", {"attention_bias": True, "rms_norm_eps": 1e-2}),
    "olmo3": Case(
        "Olmo3ForCausalLM",
        {
            "num_hidden_layers": 4,
            "sliding_window": 5,
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "yarn",
                    "rope_theta": 100.0,
                    "factor": 4.0,
                    "beta_fast": 2.0,
                    "original_max_position_embeddings": 20,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            },
        },
    ),
    "qwen2": Case("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen2_window_yarn": Case(
        "Qwen2Model",
        {
            "num_attention_heads": 2,
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 1,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 100.0,
                "factor": 4.0,
                "beta_fast": 2.0,
                "original_max_position_embeddings": 20,
            },
        },
    ),
    "qwen3": Case("Qwen3ForCausalLM", {"head_dim": 8}),
    "qwen3_biases_window": Case(
        "Qwen3Model",
        {
            "head_dim": 4,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "qwen3_moe": Case(
        "Qwen3MoeForCausalLM",
        {
            "head_dim": 4,
            "moe_intermediate_size": 8,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
        },
    ),
    "qwen3_moe_fused_window": Case(
        "Qwen3MoeModel",
        {
            "head_dim": 4,
            "moe_intermediate_size": 8,
            "num_experts": 4,
            "num_experts_per_tok": 3,
            "norm_topk_prob": False,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 5,
        },
        save={"save_original_format": False},
    ),
    "qwen3_5_text": Case("Qwen3_5ForCausalLM", _QWEN3_5 | {"attention_bias": True}),
    # The last layer has a delta net.
    "qwen3_5": Case(
        "Qwen3_5ForConditionalGeneration",
        {
            "text_config": SMALL
            | _QWEN3_5
            | {"num_hidden_layers": 3, "layer_types": ["full_attention", "linear_attention", "linear_attention"]},
            "vision_config": _TINY_QWEN3_5_VISION,
        },
        small={},
    ),
    "gemma2": Case(
        "Gemma2ForCausalLM",
        {"head_dim": 6, "sliding_window": 5, "query_pre_attn_scalar": 3, "attn_logit_softcapping": 2.0},
    ),
    "gemma3_text": Case("Gemma3ForCausalLM", _GEMMA3),
    "gemma3": Case(
        "Gemma3ForConditionalGeneration",
        {
            "text_config": SMALL | _GEMMA3 | {"num_hidden_layers": 2, "attention_bias": True},
            "vision_config": _TINY_VISION,
            "mm_tokens_per_image": 1,
        },
        small={},
    ),
    # Like the small models: the last two layers take over keys and values, and layers read the tokens anew.
    "gemma4_text": Case(
        "Gemma4ForCausalLM",
        _GEMMA4
        | {
            "num_hidden_layers": 6,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            # With few, all may be almost 0 after the activation, and their norm would magnify rounding.
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCABULARY,
        },
    ),
    # Like the large ones.
    "gemma4": Case(
        "Gemma4ForConditionalGeneration",
        {
            "text_config": SMALL
            | _GEMMA4
            | {
                "num_hidden_layers": 3,
                "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "num_global_key_value_heads": 2,
                "attention_k_eq_v": True,
                "hidden_size_per_layer_input": 0,
                "use_bidirectional_attention": "vision",
                "pad_token_id": PADDING,
            },
            "vision_config": _TINY_GEMMA4_VISION,
            "audio_config": None,
        },
        small={},
    ),
    "phi3": Case("Phi3ForCausalLM", {"sliding_window": 7}),
    "phi3_partial_rotary": Case(
        "Phi3ForCausalLM",
        {
            "num_attention_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 0.5},
        },
    ),
    "phi3_longrope_short": Case("Phi3ForCausalLM", {"num_attention_heads": 2} | _longrope(original=24)),
    "phi3_longrope_long": Case("Phi3Model", {"num_attention_heads": 2} | _longrope(original=9)),
    "smollm3": Case("SmolLM3ForCausalLM", {"no_rope_layers": [0, 1]}),
    "smollm3_biases_window": Case(
        "SmolLM3Model",
        {
            "no_rope_layer_interval": 2,
            "attention_bias": True,
            "mlp_bias": True,
            "use_sliding_window": True,
            "sliding_window": 5,
        },
    ),
    "gpt2": Case("GPT2LMHeadModel", {}, small=_SMALL_GPT2),
    "gpt2_unscaled": Case(
        "GPT2Model",
        {"n_inner": 24, "activation_function": "gelu", "scale_attn_weights": False, "layer_norm_epsilon": 1e-2},
        small=_SMALL_GPT2,
    ),
}


def make_model(case: Case, seed: int):
    """The torch model, with weights large enough that every part affects the output."""
    import torch
    import transformers

    torch.manual_seed(seed)  # For what is drawn when a model is made.
    architecture = getattr(transformers, case.architecture)
    config = architecture.config_class(**case.small | case.config)
    model = architecture._from_config(config, attn_implementation="eager").eval()
    spread = 1.5 / config.get_text_config().hidden_size ** 0.5
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                # Add noise to norm scales, because the value that means 1 is 0 in some families.
                parameter += 0.3 * noise
            elif name.endswith(("embed_tokens.weight", "per_layer.weight", "wte.weight", "wpe.weight")):
                parameter.copy_(noise)
            else:
                parameter.copy_(spread * noise)
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer += 0.3 * torch.randn(buffer.shape, generator=generator)
    return model


def expected(model, seed: int) -> dict[str, np.ndarray]:
    """Torch's outputs for sequences of distinct tokens: three padded rows, and one row that packs two of the sequences,
    whose states are those of each sequence alone.

    The gradient is that of sum(hidden * cotangent) with respect to each position's embedding in the table, followed by
    its embeddings for each layer if there are such.
    """
    import torch

    width = model.config.get_text_config().hidden_size
    by_token = np.random.default_rng(seed).normal(size=(VOCABULARY, width)).astype(np.float32)
    by_token[PADDING] = 0
    sequences = np.split(np.arange(1, VOCABULARY), np.cumsum(LENGTHS)[:-1])

    def run(ids):
        model.zero_grad()
        mask = torch.tensor(ids != PADDING)
        hidden = model.base_model(input_ids=torch.tensor(ids), attention_mask=mask).last_hidden_state
        (hidden * torch.tensor(by_token[ids])).sum().backward()
        tables = [p for name, p in model.named_parameters() if name.endswith("embed_tokens_per_layer.weight")]
        gradients = [table.grad.numpy()[ids] for table in (model.get_input_embeddings().weight, *tables)]
        return hidden.detach().numpy(), np.concatenate(gradients, axis=-1)

    padded = np.stack([np.pad(ids, (0, LENGTHS[0] - len(ids)), constant_values=PADDING) for ids in sequences])
    packed = np.concatenate(sequences[1:])[None]
    alone = [np.concatenate(parts, axis=1) for parts in zip(*(run(ids[None]) for ids in sequences[1:]), strict=True)]
    hidden, gradient = (np.concatenate(rows) for rows in zip(run(padded), alone, strict=True))
    input_ids = np.concatenate([padded, packed])
    segments = np.repeat([1, 2], LENGTHS[1:])[None]
    starts = np.where(segments == 1, 0, LENGTHS[1])
    return {
        "input_ids": input_ids.astype(np.int32),
        "segment_ids": np.concatenate([padded != PADDING, segments]).astype(np.int32),
        "positions": (np.arange(LENGTHS[0]) - np.concatenate([np.zeros_like(padded), starts])).astype(np.int32),
        "cotangent": by_token[input_ids],
        "hidden": hidden,
        "gradient": gradient,
    }


def write(name: str, folder: Path, seed: int) -> None:
    """Writes the checkpoint of CASES[name] and its expected outputs."""
    from safetensors.numpy import save_file

    model = make_model(CASES[name], seed)
    model.save_pretrained(folder, **CASES[name].save)
    (folder / "generation_config.json").unlink(missing_ok=True)
    save_file(expected(model, seed), folder / "expected.safetensors")


def main():
    from transformers.utils import logging

    logging.disable_progress_bar()
    for name in sys.argv[1:] or CASES:
        write(name, GOLDEN / name, seed=1)


if __name__ == "__main__":
    main()
