"""Rotary positions as described by Transformers' configs (`transformers.modeling_rope_utils`).

Frequencies are computed in float32 and in Transformers' order of operations, because at far positions one extra
rounding would be visible.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float32

from simgr_jax.huggingface.families.source import head_width, unsupported
from simgr_jax.models.transformer_config import Rope

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Frequencies = Float32[np.ndarray, " F"]
Parameters = dict[str, Any]


def uniform(config: PretrainedConfig, max_length: int) -> tuple[Rope, ...]:
    """The same rotary positions in every layer."""
    return (rope(config, config.rope_parameters, max_length),) * config.num_hidden_layers


def by_layer_type(config: PretrainedConfig, max_length: int) -> tuple[Rope, ...]:
    """Rotary positions of their own for each of the config's `layer_types`."""
    ropes = {kind: rope(config, config.rope_parameters[kind], max_length) for kind in sorted(set(config.layer_types))}
    return tuple(ropes[kind] for kind in config.layer_types)


def rope(config: PretrainedConfig, parameters: Parameters, max_length: int) -> Rope:
    """The rotary positions for one entry of `rope_parameters`.

    Args:
      max_length: the longest sequence, in positions. longrope has one set of frequencies for sequences within the
        model's original length and another for longer ones.

    Raises:
      UserError: the rope type is not supported.
    """
    kind = parameters.get("rope_type")
    if kind not in _KINDS:
        raise unsupported(f'the rope type "{kind}" (supported: {", ".join(_KINDS)})')
    share = parameters.get("partial_rotary_factor") or 1.0
    # For the other families, Transformers rotates whole heads whatever the config says.
    if share != 1.0 and kind != "proportional" and config.model_type not in ("phi3", "qwen3_5_text"):
        raise unsupported(f"partial_rotary_factor = {share}")
    with np.errstate(all="ignore"):
        frequencies, scale = _KINDS[kind](config, parameters, max_length)
    # Only "proportional" has pairs that do not rotate.
    rotated = frequencies[frequencies != 0] if kind == "proportional" else frequencies
    if not (len(rotated) and (rotated > 0).all() and np.isfinite(rotated).all() and 0 < scale < math.inf):
        raise unsupported(f'the rope type "{kind}" with parameters that give no finite frequencies above 0')
    return Rope(tuple(frequencies.tolist()), float(scale))


def _default(config: PretrainedConfig, parameters: Parameters, max_length: int) -> tuple[Frequencies, float]:
    return 1 / _periods(config, parameters), 1.0


def _linear(config: PretrainedConfig, parameters: Parameters, max_length: int) -> tuple[Frequencies, float]:
    """Positions are divided by a factor (https://arxiv.org/abs/2306.15595)."""
    return 1 / _periods(config, parameters) / np.float32(parameters["factor"]), 1.0


def _llama3(config: PretrainedConfig, parameters: Parameters, max_length: int) -> tuple[Frequencies, float]:
    """Low frequencies are divided by a factor, high ones kept, and those between interpolated (Llama 3.1)."""
    factor, low, high = (np.float32(parameters[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    original = np.float32(parameters["original_max_position_embeddings"])
    frequencies = 1 / _periods(config, parameters)
    turns = original * frequencies / np.float32(2 * math.pi)
    smooth = (turns - low) / (high - low)
    between = (1 - smooth) * frequencies / factor + smooth * frequencies
    return np.where(turns < low, frequencies / factor, np.where(turns > high, frequencies, between)), 1.0


def _longrope(config: PretrainedConfig, parameters: Parameters, max_length: int) -> tuple[Frequencies, float]:
    """Each frequency is divided by its own factor (https://arxiv.org/abs/2402.13753)."""
    original = parameters["original_max_position_embeddings"]
    factors = parameters["long_factor" if max_length > original else "short_factor"]
    frequencies = 1 / (np.float32(factors) * _periods(config, parameters))
    factor = parameters.get("factor") or config.max_position_embeddings / original
    scale = parameters.get("attention_factor")
    if scale is None:
        scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return frequencies, scale


def _yarn(config: PretrainedConfig, parameters: Parameters, max_length: int) -> tuple[Frequencies, float]:
    """Low frequencies are divided by a factor, high ones kept, with a ramp between (https://arxiv.org/abs/2309.00071)."""
    original = parameters["original_max_position_embeddings"]
    factor = parameters["factor"] or config.max_position_embeddings / original
    periods = _periods(config, parameters)
    width = 2 * len(periods)

    def pair_with(turns: float) -> float:
        """The pair that makes this many turns within the original length."""
        return width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(parameters["rope_theta"]))

    first, last = pair_with(parameters.get("beta_fast") or 32), pair_with(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    ramp = (np.arange(len(periods), dtype=np.float32) - first) / (last - first or 0.001)
    interpolated = np.clip(ramp, 0, 1).astype(np.float32)
    frequencies = 1 / (np.float32(factor) * periods) * interpolated + 1 / periods * (1 - interpolated)
    return frequencies, _yarn_scale(parameters, factor)


def _yarn_scale(parameters: Parameters, factor: float) -> float:
    """YaRN's attention factor, 0.1 ln(factor) + 1, or a ratio of two such values as in DeepSeek."""
    if parameters.get("attention_factor") is not None:
        return parameters["attention_factor"]
    scale = lambda weight: 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0  # noqa: E731
    weights = parameters.get("mscale"), parameters.get("mscale_all_dim")
    return scale(weights[0]) / scale(weights[1]) if all(weights) else scale(1)


def _proportional(config: PretrainedConfig, parameters: Parameters, max_length: int) -> tuple[Frequencies, float]:
    """Only the first share of the pairs rotates, with the same frequencies as if all did."""
    pairs = head_width(config) // 2
    rotated = int((parameters.get("partial_rotary_factor") or 1.0) * head_width(config) // 2)
    frequencies = np.zeros(pairs, np.float32)
    whole = parameters | {"partial_rotary_factor": 1.0}
    frequencies[:rotated] = 1 / _periods(config, whole)[:rotated] / np.float32(parameters.get("factor", 1.0))
    return frequencies, 1.0


def _periods(config: PretrainedConfig, parameters: Parameters) -> Frequencies:
    """theta^(2i / rotated width), the inverse of RoFormer's frequencies."""
    rotated = int(head_width(config) * (parameters.get("partial_rotary_factor") or 1.0))
    exponents = np.arange(0, rotated, 2, dtype=np.float32) / np.float32(rotated)
    return np.float32(parameters["rope_theta"]) ** exponents


_KINDS: dict[str, Callable[[Any, Parameters, int], tuple[Frequencies, float]]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "longrope": _longrope,
    "yarn": _yarn,
    "proportional": _proportional,
}
