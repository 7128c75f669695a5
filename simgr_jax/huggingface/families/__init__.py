"""What is particular to each family of Hugging Face decoders: its config in our `TransformerConfig`'s words, and where
its checkpoints have each parameter.

Configs are read as Transformers' config classes hold them, which also bring older checkpoints' spellings (`rope_theta`
and `rope_scaling` beside each other, `sliding_window_pattern`) to one form. Language-model heads are not mapped.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simgr_jax.errors import UserError
from simgr_jax.huggingface.families import gemma, gpt2, llama, phi3, qwen3_moe
from simgr_jax.huggingface.families.source import Source
from simgr_jax.models.transformer import TransformerConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["EMBEDDING", "Source", "prefix", "require_supported", "sources", "text_config", "transformer_config"]

# From a Hugging Face config and the sequences' greatest length to TransformerConfig's fields.
_FIELDS: dict[str, Callable[[Any, int], dict[str, Any]]] = {
    "gemma2": gemma.gemma2,
    "gemma3": gemma.gemma3_text,
    "gemma3_text": gemma.gemma3_text,
    "gpt2": gpt2.gpt2,
    "llama": llama.llama,
    "mistral": llama.mistral,
    "phi3": phi3.phi3,
    "qwen2": llama.qwen2,
    "qwen3": llama.qwen3,
    "qwen3_moe": qwen3_moe.qwen3_moe,
    "smollm3": llama.smollm3,
}

# The families whose tensors are not named as Llama's.
_SOURCES: dict[str, Callable[[TransformerConfig], dict[str, Source]]] = {
    "gemma2": gemma.sources,
    "gemma3": gemma.sources,
    "gemma3_text": gemma.sources,
    "gpt2": gpt2.sources,
    "phi3": phi3.sources,
}

# The token embeddings' tensor, [V, D], after the checkpoint's prefix.
EMBEDDING: dict[str, str] = dict.fromkeys(_FIELDS, "embed_tokens.weight") | {"gpt2": "wte.weight"}


def require_supported(model_type: Any, where: Path | str) -> None:
    """
    Args:
      where: the file that has the `model_type`.

    Raises:
      UserError: models of this type are not computed here.
    """
    if not isinstance(model_type, str) or model_type not in _FIELDS:
        raise UserError(
            f"{where}:model_type: {model_type!r} is not supported; use a checkpoint of one of: {', '.join(_FIELDS)}"
        )


def text_config(hf_config: PretrainedConfig) -> PretrainedConfig:
    """The config of a multimodal model's language model, and that of any other model itself."""
    return hf_config.get_text_config(decoder=True)


def transformer_config(hf_config: PretrainedConfig, *, max_length: int, **computation: Any) -> TransformerConfig:
    """A checkpoint's decoder, as `models.transformer` computes it.

    Args:
      max_length: of the sequences it will see, in positions (Phi-3's rotary positions depend on it).
      computation: fields of `TransformerConfig` that are the user's choice (dropout, dtype, remat, attention); the
        checkpoint's own dropout rates are not used.

    Raises:
      UserError: the model's type, or an option of its config, is not computed here.
    """
    require_supported(hf_config.model_type, "config.backbone.checkpoint: config.json")
    fields = _FIELDS[hf_config.model_type](text_config(hf_config), max_length)
    return TransformerConfig(**fields, **computation)


def sources(hf_config: PretrainedConfig, names: Collection[str] = ()) -> dict[str, Source]:
    """Where each parameter of `Transformer` is in the checkpoint, by its path ("layers.self_attn.q_proj.kernel").

    Args:
      names: the checkpoint's tensors, which tell how a mixture's experts lie in it; without them, they are taken to lie
        as `save_pretrained` writes them.

    Raises:
      UserError: as `transformer_config`.
    """
    # Which tensors there are depends on no length.
    config = transformer_config(hf_config, max_length=1)
    if config.experts:
        return qwen3_moe.sources(config, names)
    return _SOURCES.get(hf_config.model_type, llama.sources)(config)


def prefix(hf_config: PretrainedConfig, names: Collection[str]) -> str:
    """What stands before the decoder's names in a checkpoint.

    "" where the bare model was saved, "model." or "transformer." before most, "language_model.model." or
    "model.language_model." where the decoder is a part of a multimodal model.

    Args:
      names: the checkpoint's tensors.

    Raises:
      UserError: there is no table of token embeddings among them, or more than one.
    """
    embedding = EMBEDDING[hf_config.model_type]
    found = [name.removesuffix(embedding) for name in names if f".{name}".endswith(f".{embedding}")]
    if len(found) != 1:
        raise UserError(
            f'config.backbone.checkpoint: {len(found)} tensors are named "{embedding}", the token embeddings of '
            f"{hf_config.model_type}; use a checkpoint with all weights of one model"
        )
    return found[0]
