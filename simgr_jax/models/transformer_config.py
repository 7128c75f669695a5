"""The shape of a decoder, and everything that differs between the families of decoders."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from simgr_jax.devices import sharding
from simgr_jax.errors import UserError
from simgr_jax.models.layer_order import Segment, segments
from simgr_jax.ops.attention import IMPLEMENTATIONS

# Which of a layer's activations are kept for the backward pass; the others are recomputed.
REMAT_POLICIES = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names("projection"),
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions (RoFormer, https://arxiv.org/abs/2104.09864) of one layer.

    Attributes:
      frequencies: radians per position, one for each rotated pair of a head's dimensions. The head's other dimensions
        are not rotated. Empty if the layer has no positions.
      scale: multiplies the rotated query and key (YaRN's attention factor, https://arxiv.org/abs/2309.00071).
    """

    frequencies: tuple[float, ...]
    scale: float = 1.0


def plain_rope(theta: float, rotated_width: int) -> Rope:
    """Frequencies theta^(-2i / rotated_width)."""
    return Rope(tuple((theta ** (-np.arange(0, rotated_width, 2) / rotated_width)).tolist()))


@dataclasses.dataclass(frozen=True)
class DeltaNetShape:
    """The heads of a `GatedDeltaNet`. key_heads divides value_heads."""

    key_heads: int
    value_heads: int
    key_width: int
    value_width: int


# What a layer mixes positions with.
MIXERS = ("attention", "short_convolution", "gated_delta_net")

# Each layer's own fields of `TransformerConfig`, as (name, value) pairs.
LayerFields = tuple[tuple[tuple[str, Any], ...], ...]


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """A decoder's shape, and everything that differs between families.

    Attributes:
      width: D, the hidden size.
      layers: number of blocks.
      heads: H, query heads.
      kv_heads: key and value heads; divides `heads`.
      head_width: size of a head.
      mlp_width: inner size of the MLP, or of each expert.
      mixer: one of MIXERS.
      convolution_width: K, the positions that a short convolution sees, itself included; also a gated delta net's.
      convolution_bias: whether a ShortConvolution has biases.
      delta_net: the heads of gated delta nets.
      rope: one per layer; () if positions are learned.
      windows: one per layer. A position sees itself and the `window - 1` positions before it; 0 means no limit.
      causal: whether a position sees only itself and earlier positions, not its whole sequence.
      max_positions: number of learned positions; 0 if positions are not learned.
      norm: "rms" (https://arxiv.org/abs/1910.07467) or "layer", which also subtracts the mean and has a bias.
      norm_epsilon: the norms' epsilon.
      norm_offset: added to the norms' scales (Gemma: 1).
      pre_norms: whether the inputs of attention and MLP are normalized (not in OLMo 2).
      post_norms: whether the outputs of attention and MLP are normalized (Gemma, OLMo 2).
      qk_norm: whether queries and keys are normalized: "none", "head", each head on its own (Qwen3, Gemma 3), or
        "all_heads", all heads together (OLMo 2).
      attention_gate: whether attention's outputs are multiplied by the sigmoid of a second half of each head of q_proj
        (Qwen3.5).
      value_norm: whether values are normalized, without a scale (Gemma 4).
      values_are_keys: whether there is no v_proj, and values are k_proj's outputs (Gemma 4).
      kv_group: layers of one group, by any name, share keys and values; "" if the layer does not share.
      takes_kv: whether the layer has no k_proj and v_proj, but attends to the keys and values of the last layer of its
        group that has them (Gemma 4).
      attention_bias: whether q_proj, k_proj and v_proj have a bias.
      attention_output_bias: whether o_proj has a bias.
      mlp_bias: whether the MLP's projections have biases.
      gated_mlp: whether the MLP computes activation(gate) * up (https://arxiv.org/abs/2002.05202), not activation(up).
      activation: one of `mlp.ACTIVATIONS`.
      experts: number of experts in each MLP; 0 makes it a single MLP.
      experts_per_token: number of experts that each position goes through.
      normalize_expert_weights: whether the chosen experts' weights are scaled to sum to 1.
      attention_scale: multiplies the attention scores; None is head_width ** -0.5.
      attention_softcap: c; if above 0, attention scores become c tanh(score / c) (Gemma 2).
      query_growth: (β, L); queries at position p are multiplied by 1 + β ln(1 + floor(p / L)), so that attention over
        more than L positions stays sharp (Llama 4, Ministral 3).
      embedding_scale: multiplies the input embeddings (Gemma: sqrt(D)).
      per_layer_width: P, the width of what each layer reads of the inputs in addition (see `PerLayerInputs`); 0 if
        nothing.
      per_layer_count: the layers that have such inputs; more than `layers` if these are only the first ones of a model.
      layer_scale: whether each layer's states are multiplied by a parameter (Gemma 4).
      residual_scale: multiplies the outputs of attention and MLP before they are added to the residual (Granite).
      layer_fields: for each layer, the fields above that it has other values for; () if all layers have the same.
      dropout: rate on each residual branch and on the input.
      dtype: "float32" or "bfloat16", for computation; norms, the attention softmax and routing stay float32.
      remat: one of REMAT_POLICIES.
      attention: one of `ops.attention.IMPLEMENTATIONS`.
    """

    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    rope: tuple[Rope, ...]
    windows: tuple[int, ...]
    mixer: str = "attention"
    convolution_width: int = 0
    convolution_bias: bool = False
    delta_net: DeltaNetShape | None = None
    causal: bool = True
    max_positions: int = 0
    norm: str = "rms"
    norm_epsilon: float = 1e-6
    norm_offset: float = 0.0
    pre_norms: bool = True
    post_norms: bool = False
    qk_norm: str = "none"
    attention_gate: bool = False
    value_norm: bool = False
    values_are_keys: bool = False
    kv_group: str = ""
    takes_kv: bool = False
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    gated_mlp: bool = True
    activation: str = "silu"
    experts: int = 0
    experts_per_token: int = 0
    normalize_expert_weights: bool = True
    attention_scale: float | None = None
    attention_softcap: float = 0.0
    query_growth: tuple[float, float] = (0.0, 1.0)
    embedding_scale: float = 1.0
    per_layer_width: int = 0
    per_layer_count: int = 0
    layer_scale: bool = False
    residual_scale: float = 1.0
    layer_fields: LayerFields = ()
    dropout: float = 0.0
    dtype: str = "float32"
    remat: str = "none"
    attention: str = "auto"

    def __post_init__(self):
        for key in ("width", "layers", "heads", "kv_heads", "head_width", "mlp_width"):
            if getattr(self, key) < 1:
                raise UserError(f"config.backbone.{key}: {getattr(self, key)} is not positive; give at least 1")
        if self.heads % self.kv_heads:
            raise UserError(
                f"config.backbone.kv_heads: {self.kv_heads} does not divide the {self.heads} heads; choose a divisor"
            )
        if self.rope and self.head_width % 2:
            raise UserError(
                f"config.backbone.head_width: {self.head_width} is odd, but rotary positions rotate pairs; make it even"
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f"config.backbone.dropout: {self.dropout} is not a rate; give a number in [0, 1)")
        for key, choices in (
            ("dtype", ("float32", "bfloat16")),
            ("remat", tuple(REMAT_POLICIES)),
            ("attention", IMPLEMENTATIONS),
        ):
            if getattr(self, key) not in choices:
                raise UserError(
                    f'config.backbone.{key}: "{getattr(self, key)}" is unknown; choose one of {", ".join(choices)}'
                )
        if self.attention == "cudnn" and (self.dtype != "bfloat16" or sharding.platform() != "gpu"):
            raise UserError(
                'config.backbone.attention: "cudnn" computes in bfloat16 on NVIDIA GPUs only; set '
                'config.backbone.dtype or choose "auto"'
            )

    @property
    def input_width(self) -> int:
        """The width of a known token's input: its embedding, and its embeddings for each layer."""
        return self.width + self.per_layer_count * self.per_layer_width

    def first_layers(self, layers: int) -> TransformerConfig:
        """The config of the decoder's first layers alone."""
        cut = {name: getattr(self, name)[:layers] for name in ("rope", "windows", "layer_fields")}
        return dataclasses.replace(self, layers=layers, **cut)

    def of_layer(self, layer: int) -> TransformerConfig:
        """The config with the fields of one layer."""
        return (
            dataclasses.replace(self, layer_fields=(), **dict(self.layer_fields[layer])) if self.layer_fields else self
        )

    @property
    def segments(self) -> tuple[Segment, ...]:
        """How the layers are scanned."""
        return segments(self.layer_fields or ((),) * self.layers)

    @property
    def stacks(self) -> list[range]:
        """The layers of each stack of layers, one stack for each place of each segment's period."""
        return [layers for segment in self.segments for layers in segment.stacks()]


def from_scratch_config(*, layers: int, head_width: int, rope_theta: float = 10_000.0, **rest) -> TransformerConfig:
    """A decoder like Llama's: every layer has the same rotary positions and no window."""
    # At least one, so that an invalid `layers` reaches TransformerConfig, whose error names the key.
    repeats = max(layers, 1)
    rope = (plain_rope(rope_theta, head_width),) * repeats
    return TransformerConfig(layers=layers, head_width=head_width, rope=rope, windows=(0,) * repeats, **rest)
