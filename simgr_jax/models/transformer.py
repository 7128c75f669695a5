"""One transformer for every supported family of Hugging Face decoders, and for training from scratch.

It takes embeddings and returns hidden states; the recommender decides what the embeddings stand for. Every difference
between the families is a field of `TransformerConfig`. `huggingface/` knows where their checkpoints keep the weights.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Shaped

from simgr_jax.devices import sharding
from simgr_jax.errors import UserError
from simgr_jax.ops.attention import IMPLEMENTATIONS, attention, branch_attention

ACTIVATIONS = {
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}

# Which of a layer's activations are kept for the backward pass; the others are recomputed.
REMAT_POLICIES = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names("projection"),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def layers_a_turn(layers: int) -> int:
    """The number of layers in one iteration of the loop over layers.

    Each iteration copies what it passes on, so one layer per iteration is slow on a CPU (measure changes with
    benchmarks/llm_train_step.py). The compiled program grows with this number, not with the depth. Layers that are left
    over are compiled once more, so many layers are divided without a rest.
    """
    if sharding.platform() != "cpu":
        return 1
    return max(min(layers, 4), 1) if layers <= 8 else next((turn for turn in (4, 3, 2) if layers % turn == 0), 4)


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
class TransformerConfig:
    """A decoder's shape, and everything that differs between families.

    Attributes:
      width: D, the hidden size.
      layers: number of blocks.
      heads: H, query heads.
      kv_heads: key and value heads; divides `heads`.
      head_width: size of a head.
      mlp_width: inner size of the MLP, or of each expert.
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
      attention_bias: whether q_proj, k_proj and v_proj have a bias.
      attention_output_bias: whether o_proj has a bias.
      mlp_bias: whether the MLP's projections have biases.
      gated_mlp: whether the MLP computes activation(gate) * up (https://arxiv.org/abs/2002.05202), not activation(up).
      activation: one of ACTIVATIONS.
      experts: number of experts in each MLP; 0 makes it a single MLP.
      experts_per_token: number of experts that each position goes through.
      normalize_expert_weights: whether the chosen experts' weights are scaled to sum to 1.
      attention_scale: multiplies the attention scores; None is head_width ** -0.5.
      attention_softcap: c; if above 0, attention scores become c tanh(score / c) (Gemma 2).
      query_growth: (β, L); queries at position p are multiplied by 1 + β ln(1 + floor(p / L)), so that attention over
        more than L positions stays sharp (Llama 4, Ministral 3).
      embedding_scale: multiplies the input embeddings (Gemma: sqrt(D)).
      residual_scale: multiplies the outputs of attention and MLP before they are added to the residual (Granite).
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
    causal: bool = True
    max_positions: int = 0
    norm: str = "rms"
    norm_epsilon: float = 1e-6
    norm_offset: float = 0.0
    pre_norms: bool = True
    post_norms: bool = False
    qk_norm: str = "none"
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
    residual_scale: float = 1.0
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


def from_scratch_config(*, layers: int, head_width: int, rope_theta: float = 10_000.0, **rest) -> TransformerConfig:
    """A decoder like Llama's: every layer has the same rotary positions and no window."""
    # At least one, so that an invalid `layers` reaches TransformerConfig, whose error names the key.
    repeats = max(layers, 1)
    rope = (plain_rope(rope_theta, head_width),) * repeats
    return TransformerConfig(layers=layers, head_width=head_width, rope=rope, windows=(0,) * repeats, **rest)


class Norm(nnx.Module):
    """RMSNorm or LayerNorm, computed in float32."""

    def __init__(self, width: int, config: TransformerConfig):
        self.subtracts_mean = config.norm == "layer"
        self.epsilon, self.offset = config.norm_epsilon, config.norm_offset
        self.scale = nnx.Param(jnp.full(width, 1 - self.offset, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(width, jnp.float32)) if self.subtracts_mean else None

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        x32 = x.astype(jnp.float32)
        if self.subtracts_mean:
            x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + self.epsilon)
        x32 = x32 * (self.scale[...].astype(jnp.float32) + self.offset)
        return (x32 if self.bias is None else x32 + self.bias[...]).astype(x.dtype)


class Linear(nnx.Module):
    """x W + b, computed in `dtype`, plus the output of a low-rank adapter if `lora.add` has attached one.

    Args:
      axes: the kernel's logical axes (see `devices.sharding.RULES`).
    """

    def __init__(
        self,
        in_width: int,
        out_width: int,
        bias: bool,
        dtype: str,
        rngs: nnx.Rngs,
        axes: tuple[str | None, str | None] | tuple[()] = (),
    ):
        self.dtype = dtype
        kernel = nnx.initializers.normal(0.02)(rngs.params(), (in_width, out_width), jnp.float32)
        self.kernel = nnx.Param(kernel, axes=axes)
        self.bias = nnx.Param(jnp.zeros(out_width, jnp.float32)) if bias else None
        self.lora = nnx.data(None)

    def __call__(self, x: Float[Array, "*B in"], rngs: nnx.Rngs | None) -> Float[Array, "*B out"]:
        # As one matrix: with more axes, XLA would copy the transposed operands of the kernel's gradient on a CPU.
        rows = x.reshape(-1, x.shape[-1])
        y = rows @ self.kernel[...].astype(self.dtype)
        if self.bias is not None:
            y = y + self.bias[...].astype(self.dtype)
        y = y if self.lora is None else y + self.lora(rows, rngs)
        return checkpoint_name(y.reshape(*x.shape[:-1], -1), "projection")


def apply_rotary(
    x: Float[Array, "B T H head"],
    positions: Int[Array, "B T"],
    frequencies: Float[Array, " F"],
    scale: Float[Array, ""],
) -> Float[Array, "B T H head"]:
    """Rotates each pair (x[i], x[i + F]) by position * frequencies[i], as Hugging Face's decoders do.

    F <= head / 2; dimensions from 2F on are unchanged.
    """
    pairs = frequencies.shape[0]
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    # The barrier keeps XLA from computing them again for every head and for every use of the result.
    cos, sin = jax.lax.optimization_barrier((jnp.cos(angles) * scale, jnp.sin(angles) * scale))
    first, second, rest = jnp.split(x.astype(jnp.float32), [pairs, 2 * pairs], axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1).astype(x.dtype)


class _Positions:
    """The rotary frequencies and the attention window of each layer.

    One scanned body computes all layers, so whatever differs between them is an array with an axis for the layers.
    """

    def __init__(self, config: TransformerConfig):
        pairs = max((len(rope.frequencies) for rope in config.rope), default=0)
        self.rotates = pairs > 0
        # A frequency of 0 rotates nothing, so a layer without positions has zeros.
        self.frequencies = np.zeros((config.layers, pairs), np.float32)
        self.scales = np.ones(config.layers, np.float32)
        for layer, rope in enumerate(config.rope):
            self.frequencies[layer, : len(rope.frequencies)] = rope.frequencies
            self.scales[layer] = rope.scale
        self.windows = tuple(sorted(set(config.windows)))
        self.window_index = np.array([self.windows.index(window) for window in config.windows], np.int32)

    @property
    def per_layer(self) -> tuple[np.ndarray, ...]:
        return self.frequencies, self.scales, self.window_index


class Attention(nnx.Module):
    """Grouped-query self-attention (https://arxiv.org/abs/2305.13245)."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        self.config = config
        query_width, kv_width = config.heads * config.head_width, config.kv_heads * config.head_width
        bias, into_heads = config.attention_bias, ("embed", "heads")
        self.q_proj = Linear(config.width, query_width, bias, config.dtype, rngs, into_heads)
        self.k_proj = Linear(config.width, kv_width, bias, config.dtype, rngs, into_heads)
        self.v_proj = Linear(config.width, kv_width, bias, config.dtype, rngs, into_heads)
        self.o_proj = Linear(
            query_width, config.width, config.attention_output_bias, config.dtype, rngs, ("heads", "embed")
        )
        normed = {"none": (0, 0), "head": (config.head_width,) * 2, "all_heads": (query_width, kv_width)}
        query_normed, key_normed = normed[config.qk_norm]
        self.q_norm = Norm(query_normed, config) if query_normed else None
        self.k_norm = Norm(key_normed, config) if key_normed else None

    def __call__(self, x, positions, rope, attend, rngs, asking):
        """
        Args:
          rope: the layer's frequencies and scale.
          attend: (query, key, value) -> (the mixed values, what to keep for later).
          asking: int [B, Q], the positions to compute outputs for; None means all.
        """
        config = self.config
        asks, asking_positions = (x, positions) if asking is None else (_at(x, asking), _at(positions, asking))
        query, key, value = self.q_proj(asks, rngs), self.k_proj(x, rngs), self.v_proj(x, rngs)
        if config.qk_norm == "all_heads":
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (y.reshape(*y.shape[:2], -1, config.head_width) for y in (query, key, value))
        query, key, value = (sharding.constrain(y, "batch", None, "heads", None) for y in (query, key, value))
        if config.qk_norm == "head":
            query, key = self.q_norm(query), self.k_norm(key)
        if config.rope:
            query, key = apply_rotary(query, asking_positions, *rope), apply_rotary(key, positions, *rope)
        growth, length = config.query_growth
        if growth:
            scale = 1 + growth * jnp.log1p(jnp.floor(asking_positions.astype(jnp.float32) / length))
            query = (query * scale[..., None, None]).astype(query.dtype)
        mixed, kept = attend(query, key, value)
        return self.o_proj(mixed.reshape(*asks.shape[:2], -1), rngs), kept


def _at(x: Shaped[Array, "B T *D"], places: Int[Array, "B Q"]) -> Shaped[Array, "B Q *D"]:
    return jnp.take_along_axis(x, places.reshape(*places.shape, *(1,) * (x.ndim - 2)), axis=1)


class MLP(nnx.Module):
    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        self.activation = config.activation
        widths, bias, dtype = (config.width, config.mlp_width), config.mlp_bias, config.dtype
        self.gate_proj = Linear(*widths, bias, dtype, rngs, ("embed", "mlp")) if config.gated_mlp else None
        self.up_proj = Linear(*widths, bias, dtype, rngs, ("embed", "mlp"))
        self.down_proj = Linear(*widths[::-1], bias, dtype, rngs, ("mlp", "embed"))

    def __call__(self, x, rngs):
        activation = ACTIVATIONS[self.activation]
        up = self.up_proj(x, rngs)
        inner = activation(up) if self.gate_proj is None else activation(self.gate_proj(x, rngs)) * up
        return self.down_proj(sharding.constrain(inner, "batch", None, "mlp"), rngs)


class ExpertLinear(nnx.Module):
    """One projection of every expert; row i of the input goes through the expert of its group."""

    def __init__(self, in_width: int, out_width: int, config: TransformerConfig, rngs: nnx.Rngs, axes: tuple[str, str]):
        init = nnx.initializers.normal(0.02)
        self.dtype = config.dtype
        self.kernel = nnx.Param(init(rngs.params(), (config.experts, in_width, out_width), jnp.float32), axes=axes)

    def __call__(self, x: Float[Array, "M in"], group_sizes: Int[Array, " experts"]) -> Float[Array, "M out"]:
        return jax.lax.ragged_dot(x, self.kernel[...].astype(self.dtype), group_sizes)


class MixtureOfExperts(nnx.Module):
    """Each position goes through the `experts_per_token` experts that the router finds most probable; no position is
    dropped (Qwen3-MoE, https://arxiv.org/abs/2505.09388)."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        self.config = config
        self.router = Linear(config.width, config.experts, False, config.dtype, rngs)
        self.gate_proj = ExpertLinear(config.width, config.mlp_width, config, rngs, ("embed", "mlp"))
        self.up_proj = ExpertLinear(config.width, config.mlp_width, config, rngs, ("embed", "mlp"))
        self.down_proj = ExpertLinear(config.mlp_width, config.width, config, rngs, ("mlp", "embed"))

    def __call__(self, x: Float[Array, "B T D"], rngs: nnx.Rngs | None) -> Float[Array, "B T D"]:
        probabilities = jax.nn.softmax(self.router(x, rngs).astype(jnp.float32), axis=-1)
        weights, chosen = jax.lax.top_k(probabilities, self.config.experts_per_token)
        if self.config.normalize_expert_weights:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)

        # Each device sorts its own rows by expert.
        experts = {"gate_proj": self.gate_proj, "up_proj": self.up_proj, "down_proj": self.down_proj}
        graphdef, parameters = nnx.split(experts)
        mix = sharding.per_device(
            lambda parameters, *arrays: self._mix(nnx.merge(graphdef, parameters), *arrays),
            (sharding.gathered_specs(parameters), *(sharding.spec("batch", None, None),) * 3),
            sharding.spec("batch", None, None),
        )
        return mix(parameters, x, weights, chosen)

    def _mix(
        self,
        experts: dict[str, ExpertLinear],
        x: Float[Array, "B T D"],
        weights: Float[Array, "B T C"],
        chosen: Int[Array, "B T C"],
    ) -> Float[Array, "B T D"]:
        rows, chosen = x.reshape(-1, x.shape[-1]), chosen.reshape(-1)
        # Sorted by expert, each expert's rows are one block of a ragged matrix product.
        order = jnp.argsort(chosen)
        group_sizes = jnp.bincount(chosen, length=self.config.experts).astype(jnp.int32)
        owners = order // self.config.experts_per_token
        gate = ACTIVATIONS[self.config.activation](experts["gate_proj"](rows[owners], group_sizes))
        outputs = experts["down_proj"](gate * experts["up_proj"](rows[owners], group_sizes), group_sizes)
        outputs = outputs * weights.reshape(-1)[order, None].astype(outputs.dtype)
        # If the experts' inner width is split over devices, each device has a part of the sum.
        return sharding.psum(jnp.zeros_like(rows).at[owners].add(outputs), "mlp").reshape(x.shape)


class Block(nnx.Module):
    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        norm = lambda exists: Norm(config.width, config) if exists else None  # noqa: E731
        self.pre_attention_norm = norm(config.pre_norms)
        self.self_attn = Attention(config, rngs)
        self.post_attention_norm = norm(config.post_norms)
        self.pre_mlp_norm = norm(config.pre_norms)
        self.mlp = (MixtureOfExperts if config.experts else MLP)(config, rngs)
        self.post_mlp_norm = norm(config.post_norms)
        self.residual_scale = config.residual_scale
        self.dropout = nnx.Dropout(config.dropout)

    def __call__(self, x, positions, rope, attend, rngs, asking=None):
        """asking: as for `Attention`; states at other positions are not computed."""
        normed = lambda norm, y: y if norm is None else norm(y)  # noqa: E731
        branch, kept = self.self_attn(normed(self.pre_attention_norm, x), positions, rope, attend, rngs, asking)
        x = x if asking is None else _at(x, asking)
        x = self._add(x, normed(self.post_attention_norm, branch), rngs)
        branch = self.mlp(normed(self.pre_mlp_norm, x), rngs)
        return self._add(x, normed(self.post_mlp_norm, branch), rngs), kept

    def _add(self, x, branch, rngs):
        branch = branch if self.residual_scale == 1 else branch * self.residual_scale
        return x + self.dropout(branch, deterministic=rngs is None, rngs=rngs)


class HistoryCache(NamedTuple):
    """What `Transformer.prefill` keeps for `Transformer.extend`.

    Attributes:
      keys, values: of every layer.
      lengths: the length of each history; later positions are padding.
    """

    keys: Float[Array, "layers B T Hkv head"]
    values: Float[Array, "layers B T Hkv head"]
    lengths: Int[Array, " B"]


class BranchCache(NamedTuple):
    """Every layer's keys and values for the P positions read so far by each of the W branches of a history."""

    keys: Float[Array, "layers B W P Hkv head"]
    values: Float[Array, "layers B W P Hkv head"]


class Transformer(nnx.Module):
    """The decoder stack.

    `layers` is one Block whose arrays have a leading axis for the layers. Layers are scanned, so compile time does not
    grow with their number.
    """

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        self.config = config
        self.position_embedding = nnx.data(None)
        if config.max_positions:
            init = nnx.initializers.normal(0.02)
            positions = init(rngs.params(), (config.max_positions, config.width), jnp.float32)
            self.position_embedding = nnx.Param(positions, axes=(None, "embed"))
        blocks = nnx.vmap(lambda rngs: Block(config, rngs), in_axes=0, out_axes=0)
        self.layers = nnx.split_rngs(splits=config.layers)(blocks)(rngs)
        self.final_norm = Norm(config.width, config)
        self.dropout = nnx.Dropout(config.dropout)

    def __call__(
        self,
        embeddings: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B T D"]:
        """The hidden states. A position attends only to its own segment.

        Args:
          segment_ids: which sequence of a packed row a position belongs to; 0 is padding.
          positions: position within the segment.
          rngs: with a "dropout" stream in training; None switches dropout off.
        """

        def attend(query, key, value, window_index, _):
            return self._attention(query, key, value, segment_ids, window_index), None

        return self._states(embeddings, positions, attend, rngs=rngs)[0]

    def at_end(self, embeddings: Float[Array, "B T D"], lengths: Int[Array, " B"]) -> Float[Array, "B D"]:
        """The hidden state at the end of each history. Histories start at the beginning of their rows.

        It equals the state from `__call__`, but the last layer does not compute the other states.

        Args:
          lengths: the length of each history, at least 1; later positions are padding.

        Raises:
          ValueError: the decoder isn't causal.
        """
        return self._read(embeddings, lengths, keeps=False)[0]

    def prefill(
        self, embeddings: Float[Array, "B T D"], lengths: Int[Array, " B"]
    ) -> tuple[Float[Array, "B D"], HistoryCache]:
        """The states of `at_end`, and the cache that `extend` continues from."""
        state, kept = self._read(embeddings, lengths, keeps=True)
        return state, HistoryCache(*kept, lengths)

    def _read(
        self, embeddings: Float[Array, "B T D"], lengths: Int[Array, " B"], keeps: bool
    ) -> tuple[Float[Array, "B D"], tuple[Array, Array] | None]:
        """The state at the end of each history; with `keeps`, also the keys and values of every layer."""
        config = self.config
        if not config.causal:
            raise ValueError("only a causal decoder can stop at the end of a history")
        positions = jnp.broadcast_to(jnp.arange(embeddings.shape[1]), embeddings.shape[:2])
        segment_ids = (positions < lengths[:, None]).astype(jnp.int32)
        ends = lengths[:, None] - 1

        def attend(query, key, value, window_index):
            return self._attention(query, key, value, segment_ids, window_index), (key, value)

        def attend_at_end(query, key, value, window_index):
            # The last position is a branch of length 1 that continues the positions before it.
            own = (_at(y, ends)[:, None] for y in (key, value))
            options = self._attention_options(window_index)
            mixed = branch_attention(query[:, None], key, value, lengths - 1, *own, **options)
            return mixed[:, 0], (key, value)

        graphdef, layers = nnx.split(self.layers)
        stacked = layers, jax.tree.map(jnp.asarray, _Positions(config).per_layer)

        def block(x, layer, attend=attend, asking=None):
            # Indexes one layer at a time, because slicing off the last layer would copy the others.
            of_layer = lambda y: jax.lax.dynamic_index_in_dim(y, layer, keepdims=False)  # noqa: E731
            parameters, (*rope, window_index) = jax.tree.map(of_layer, stacked)
            block = nnx.merge(graphdef, sharding.gather_kernels(parameters, config.dtype))
            mix = functools.partial(attend, window_index=window_index)
            x, kept = block(x, positions, rope, mix, None, asking)
            return sharding.constrain(x, "batch", None, None), kept if keeps else None

        x, before = self._begin(embeddings, positions), config.layers - 1
        x, kept = jax.lax.scan(block, x, jnp.arange(before), unroll=layers_a_turn(before))
        x, last = block(x, before, attend_at_end, ends)
        if keeps:
            kept = jax.tree.map(lambda some, one: jnp.concatenate([some, one[None]]), kept, last)
        return self.final_norm(x)[:, 0], kept

    def extend(
        self, embeddings: Float[Array, "B W S D"], history: HistoryCache, branches: BranchCache | None = None
    ) -> tuple[Float[Array, "B W S D"], BranchCache]:
        """Hidden states of S more positions on each of the W branches that continue a history.

        A branch sees the history, which its branches share, and itself. The states are the same as if history and
        branch were read as one sequence.

        Args:
          branches: the cache of the P positions that each branch has read already; None at the start.

        Returns:
          The states, and the branches' cache, now of P + S positions.
        """
        batch, width, new = embeddings.shape[:3]
        old = 0 if branches is None else branches.keys.shape[3]
        flat = lambda x: x.reshape(batch, width * new, *x.shape[3:])  # noqa: E731
        by_branch = lambda x: x.reshape(batch, width, new, *x.shape[2:])  # noqa: E731
        positions = jnp.broadcast_to(history.lengths[:, None, None] + old + jnp.arange(new), (batch, width, new))

        def attend(query, key, value, window_index, cached):
            (history_key, history_value), branch = cached
            kept = by_branch(key), by_branch(value)
            if branch is not None:
                kept = tuple(jnp.concatenate(pair, axis=2) for pair in zip(branch, kept, strict=True))
            mixed = branch_attention(
                by_branch(query),
                history_key,
                history_value,
                history.lengths,
                *kept,
                **self._attention_options(window_index),
            )
            return flat(mixed), kept

        cached = (history.keys, history.values), branches
        states, kept = self._states(flat(embeddings), flat(positions), attend, cached)
        return by_branch(states), BranchCache(*kept)

    def _attention(self, query, key, value, segment_ids, window_index):
        config = self.config
        options = self._attention_options(window_index)
        return attention(
            query, key, value, segment_ids, causal=config.causal, implementation=config.attention, **options
        )

    def _attention_options(self, window_index: Int[Array, ""]) -> dict[str, Any]:
        config = self.config
        return {
            "windows": _Positions(config).windows,
            "window_index": window_index,
            "scale": config.attention_scale or config.head_width**-0.5,
            "softcap": config.attention_softcap,
        }

    def _begin(
        self, embeddings: Float[Array, "B T D"], positions: Int[Array, "B T"], rngs: nnx.Rngs | None = None
    ) -> Float[Array, "B T D"]:
        """The first layer's input."""
        x = (embeddings * self.config.embedding_scale).astype(self.config.dtype)
        if self.position_embedding is not None:
            x = x + self.position_embedding[positions].astype(self.config.dtype)
        return sharding.constrain(self.dropout(x, deterministic=rngs is None, rngs=rngs), "batch", None, None)

    def _states(
        self,
        embeddings: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        attend: Callable[..., tuple[Float[Array, "B T H head"], Any]],
        cached: Any = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """The hidden states, and what `attend` keeps in each layer, stacked.

        Args:
          attend: (query, key, value, window_index, the layer's part of `cached`) -> (mixed, kept).
          cached: arrays with a leading axis for the layers.
        """
        config, x = self.config, self._begin(embeddings, positions, rngs)
        graphdef, layers = nnx.split(self.layers)
        keys = None if rngs is None else jax.random.split(rngs.dropout(), config.layers)

        def block(x, scanned):
            parameters, (*rope, window_index), key, cached = scanned
            rngs = None if key is None else nnx.Rngs(dropout=key)
            block = nnx.merge(graphdef, sharding.gather_kernels(parameters, config.dtype))
            mix = lambda query, key, value: attend(query, key, value, window_index, cached)  # noqa: E731
            x, kept = block(x, positions, rope, mix, rngs)
            return sharding.constrain(x, "batch", None, None), kept

        if config.remat != "none":
            block = jax.checkpoint(block, policy=REMAT_POLICIES[config.remat], prevent_cse=False)
        scanned = (layers, _Positions(config).per_layer, keys, cached)
        x, kept = jax.lax.scan(block, x, scanned, unroll=layers_a_turn(config.layers))
        return self.final_norm(x), kept
