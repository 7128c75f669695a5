"""How each family of Hugging Face decoders maps to ours: its config to `TransformerConfig`, and each parameter to its
place in the checkpoint.

Configs are read through Transformers' config classes, which also normalise the spellings of older checkpoints (separate
`rope_theta` and `rope_scaling`, `sliding_window_pattern`). Language-model heads are not mapped.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simgr_jax.errors import UserError, first_line
from simgr_jax.huggingface.families import gemma, gpt2, lfm2, llama, olmo, phi3, qwen3_5, qwen3_moe
from simgr_jax.huggingface.families.source import Source
from simgr_jax.models.transformer_config import TransformerConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = [
    "EMBEDDING",
    "Source",
    "prefix",
    "require_supported",
    "sources",
    "text_config",
    "transformer_config",
]

# From a Hugging Face config and the maximum sequence length to TransformerConfig's fields, by the decoder's model type.
_FIELDS: dict[str, Callable[[Any, int], dict[str, Any]]] = {
    "gemma2": gemma.gemma2,
    "gemma3_text": gemma.gemma3_text,
    "gemma4_text": gemma.gemma4_text,
    "gpt2": gpt2.gpt2,
    "granite": llama.granite,
    "lfm2": lfm2.lfm2,
    "llama": llama.llama,
    "ministral3": llama.ministral3,
    "mistral": llama.mistral,
    "olmo2": olmo.olmo2,
    "olmo3": olmo.olmo3,
    "phi3": phi3.phi3,
    "qwen2": llama.qwen2,
    "qwen3": llama.qwen3,
    "qwen3_5_text": qwen3_5.qwen3_5,
    "qwen3_moe": qwen3_moe.qwen3_moe,
    "smollm3": llama.smollm3,
}

# Models of text and images or sound, whose `text_config` is that of one of the decoders above.
_MULTIMODAL = ("gemma3", "gemma4", "mistral3", "qwen3_5")

# Families whose tensors are not named like Llama's.
_SOURCES: dict[str, Callable[[TransformerConfig], dict[str, Source]]] = {
    "gemma2": gemma.sources,
    "gemma3_text": gemma.sources,
    "gemma4_text": gemma.gemma4_sources,
    "gpt2": gpt2.sources,
    "lfm2": lfm2.sources,
    "olmo2": olmo.sources,
    "olmo3": olmo.sources,
    "phi3": phi3.sources,
    "qwen3_5_text": qwen3_5.sources,
}

# The model types that can be read.
_SUPPORTED = tuple(sorted((*_FIELDS, *_MULTIMODAL)))

# The name of the token embedding, [V, D], without the checkpoint's prefix.
EMBEDDING: dict[str, str] = dict.fromkeys(_SUPPORTED, "embed_tokens.weight") | {"gpt2": "wte.weight"}


def require_supported(model_type: Any, where: Path | str, architectures: Any = None) -> None:
    """
    Args:
      where: the file that contains `model_type`.
      architectures: what the file gives as the model's classes.

    Raises:
      UserError: models of this type are not supported. It says which supported types have similar names.
    """
    if isinstance(model_type, str) and model_type in _SUPPORTED:
        return
    near = _near(model_type, architectures)
    raise UserError(
        f"{where}:model_type: {model_type!r} is not supported; use a checkpoint of one of {', '.join(_SUPPORTED)}"
        + (f" (nearest: {', '.join(near)})" if near else "")
    )


def _near(model_type: Any, architectures: Any) -> list[str]:
    """The supported types whose names are nearest to the model's type or to its class ("LlamaForCausalLM": llama)."""
    classes = architectures if isinstance(architectures, list) else []
    names = [re.sub("(?<=[a-z0-9])(?=[A-Z])", "_", str(name).split("For")[0]).lower() for name in classes]
    found = [near for name in (str(model_type), *names) for near in difflib.get_close_matches(name, _SUPPORTED, n=4)]
    return list(dict.fromkeys(found))


def text_config(hf_config: PretrainedConfig) -> PretrainedConfig:
    """The config of a multimodal model's language model; for any other model, its own config."""
    return hf_config.get_text_config(decoder=True)


def transformer_config(hf_config: PretrainedConfig, *, max_length: int, **computation: Any) -> TransformerConfig:
    """The config of a checkpoint's decoder for `models.transformer`.

    Args:
      max_length: the longest sequence, in positions (Phi-3's rotary positions depend on it).
      computation: fields of `TransformerConfig` that the user chooses (dropout, dtype, remat, attention). The
        checkpoint's own dropout rates are ignored.

    Raises:
      UserError: the model's type, or an option of its config, is not supported.
    """
    text = text_config(hf_config)
    require_supported(text.model_type, "config.backbone.checkpoint: config.json", hf_config.architectures)
    try:
        fields = _FIELDS[text.model_type](text, max_length)
        _require_positive(fields)
    # Transformers lets values pass that mean nothing, like a width of 0 or a word for a number.
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            "config.backbone.checkpoint: its config does not describe a "
            f"{text.model_type} model ({type(error).__name__}: {first_line(error)}); copy the model's config again"
        ) from error
    return TransformerConfig(**fields, **computation)


def _require_positive(fields: dict[str, Any]) -> None:
    """
    Raises:
      ValueError: a size, the norms' epsilon or a scale is not a finite number above 0.
    """
    sizes = ("width", "layers", "heads", "kv_heads", "head_width", "mlp_width")
    for name in (*sizes, "norm_epsilon", "attention_scale", "embedding_scale", "residual_scale"):
        value = fields.get(name)
        if name in fields and value is not None and not (isinstance(value, int | float) and 0 < value < math.inf):
            raise ValueError(f"{name} = {value}")
    if fields["heads"] % fields["kv_heads"]:
        raise ValueError(f"heads = {fields['heads']}, kv_heads = {fields['kv_heads']}")


def sources(
    hf_config: PretrainedConfig, names: Collection[str] = (), config: TransformerConfig | None = None
) -> dict[str, Source]:
    """Each `Transformer` parameter's place in the checkpoint, by its path ("layers.0.self_attn.q_proj.kernel").

    Args:
      names: the checkpoint's tensors, which show how it stores a mixture's experts. Without them, the layout that
        `save_pretrained` writes is assumed.
      config: the decoder's, which may have only the first layers; None is the whole decoder.

    Raises:
      UserError: as for `transformer_config`.
    """
    # The tensors do not depend on the length.
    config, table = config or transformer_config(hf_config, max_length=1), {}
    for stack, layers in enumerate(config.stacks):
        for path, source in _layer_sources(hf_config, config.of_layer(layers[0]), names).items():
            if path.startswith("layers."):
                path = f"layers.{stack}.{path.removeprefix('layers.')}"
                source = dataclasses.replace(source, layers=tuple(layers))
            table[path] = source
    return table


def _layer_sources(hf_config: PretrainedConfig, config: TransformerConfig, names: Collection[str]) -> dict[str, Source]:
    """The sources if all layers were of one shape, that of `config`; "layers." begins a path within a layer."""
    if config.experts:
        return qwen3_moe.sources(config, names)
    return _SOURCES.get(text_config(hf_config).model_type, llama.sources)(config)


def prefix(hf_config: PretrainedConfig, names: Collection[str]) -> str:
    """The prefix of the decoder's tensor names in a checkpoint.

    "" if the bare model was saved, usually "model." or "transformer.", and "language_model.model." or
    "model.language_model." in a multimodal model.

    Args:
      names: the checkpoint's tensors.

    Raises:
      UserError: `names` has no token embedding, or more than one.
    """
    embedding = EMBEDDING[hf_config.model_type]
    found = [name.removesuffix(embedding) for name in names if f".{name}".endswith(f".{embedding}")]
    if len(found) != 1:
        raise UserError(
            f'config.backbone.checkpoint: has {len(found)} tensors named "{embedding}", the token embedding of '
            f"{hf_config.model_type}, instead of one; use a checkpoint with all weights of one model"
        )
    return found[0]
