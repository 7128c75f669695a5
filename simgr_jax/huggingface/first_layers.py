"""Cuts a checkpoint's config to its first layers."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from simgr_jax.errors import UserError
from simgr_jax.huggingface import families

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_KEY = "config.backbone.first_layers"
# What Transformers calls the layers of gated delta nets and of short convolutions.
_WITHOUT_ATTENTION = {"linear_attention", "conv"}


def cut(config: PretrainedConfig, values: dict[str, Any], layers: int) -> tuple[PretrainedConfig, dict[str, Any]]:
    """The config and the values of its config.json, of a decoder that has only the first layers.

    Args:
      layers: 0 leaves them as they are.

    Raises:
      UserError: there are fewer layers, or the decoder's layers depend on their number.
    """
    if not layers:
        return config, values
    config, values = copy.deepcopy((config, values))
    text = families.text_config(config)
    count = text.num_hidden_layers
    if not 0 < layers <= count:
        raise UserError(f"{_KEY}: can't be {layers}; the LLM has {count} layers, give up to as many, or 0 for all")
    if getattr(text, "hidden_size_per_layer_input", 0) or getattr(text, "num_kv_shared_layers", 0):
        raise UserError(f"{_KEY}: a {text.model_type} model can't be cut, as its last layers share keys; give 0")
    kinds = getattr(text, "layer_types", None) or ["full_attention"]
    if set(kinds[:layers]) <= _WITHOUT_ATTENTION:
        first = next(number for number, kind in enumerate(kinds, 1) if kind not in _WITHOUT_ATTENTION)
        raise UserError(
            f"{_KEY}: can't be {layers}; the LLM's first attention is in layer {first}, and Transformers can't run "
            "an export that has none; give at least as many, or 0 for all"
        )
    if text.model_type == "gemma4_text" and layers not in (ends := _gemma4_ends(text)):
        raise UserError(
            f"{_KEY}: can't be {layers}; the last layer of a gemma4_text model must have full attention, which "
            f"Transformers would give it; give one of {', '.join(map(str, ends))}, or 0 for all"
        )
    of_text = values if text is config else values["text_config"]
    if of_layers := of_text.get("per_layer_config"):  # By the layers' numbers.
        of_text["per_layer_config"] = {key: value for key, value in of_layers.items() if int(key) < layers}
    for place in (text.__dict__, of_text):
        for key, value in place.items():
            # What each layer has of its own.
            if isinstance(value, list) and len(value) == count:
                place[key] = value[:layers]
    text.num_hidden_layers = layers
    of_text[text.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = layers
    return config, values


def _gemma4_ends(config: PretrainedConfig) -> list[int]:
    """The numbers of layers that end with full attention."""
    return [number for number, kind in enumerate(config.layer_types, 1) if kind == "full_attention"]
