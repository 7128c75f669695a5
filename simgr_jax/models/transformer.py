"""One transformer for every supported family of Hugging Face decoders, and for training from scratch.

It takes embeddings and returns hidden states; the recommender decides what the embeddings stand for. Every difference
between the families is a field of `TransformerConfig`. `huggingface/` knows where their checkpoints keep the weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from simgr_jax.devices import sharding
from simgr_jax.models.attention_layer import Attention
from simgr_jax.models.gated_delta_net import GatedDeltaNet
from simgr_jax.models.layer_order import Segment
from simgr_jax.models.mlp import MLP, MixtureOfExperts
from simgr_jax.models.norm import Norm
from simgr_jax.models.per_layer_inputs import PerLayerInput, PerLayerInputs
from simgr_jax.models.reading import Branches, Cached, Histories, HistoryEnds, Layer, Reading, Shared
from simgr_jax.models.short_convolution import ShortConvolution
from simgr_jax.models.transformer_config import REMAT_POLICIES, TransformerConfig

# The states between two layers, and what layers share.
_Carry = tuple[Float[Array, "B T D"], Shared]


def layers_a_turn(layers: int) -> int:
    """The number of layers in one iteration of the loop over layers.

    Each iteration copies what it passes on, so one layer per iteration is slow on a CPU (measure changes with
    benchmarks/llm_train_step.py). The compiled program grows with this number, not with the depth. Layers that are left
    over are compiled once more, so many layers are divided without a rest.
    """
    if sharding.platform() != "cpu":
        return 1
    return max(min(layers, 4), 1) if layers <= 8 else next((turn for turn in (4, 3, 2) if layers % turn == 0), 4)


class _Stack(NamedTuple):
    """Layers of one shape, of which one scanned body computes all: whatever differs between them is an array with an
    axis for the layers.

    Attributes:
      graphdef: of its Block.
      windows: the layers' attention windows, without repetition.
      arrays: what `Transformer._block` needs of each layer.
    """

    graphdef: nnx.GraphDef
    windows: tuple[int, ...]
    arrays: _LayerArrays


class _LayerArrays(NamedTuple):
    """
    Attributes:
      parameters: the Block's.
      frequencies, rotary_scale, window_index, cached, per_layer: see `Layer`.
      key: for dropout; None switches it off.
    """

    parameters: nnx.State
    frequencies: np.ndarray
    rotary_scale: np.ndarray
    window_index: np.ndarray
    cached: Cached
    per_layer: Array | None
    key: Array | None


def _stack(
    block: Block, config: TransformerConfig, layers: range, cached: Cached, per_layer: Array | None, keys: Array | None
) -> _Stack:
    """The layers `layers`, whose parameters are those of `block`."""
    ropes = [config.rope[layer] for layer in layers] if config.rope else []
    # A frequency of 0 rotates nothing, so a layer without positions has zeros.
    pairs = max((len(rope.frequencies) for rope in ropes), default=0)
    frequencies, scales = np.zeros((len(layers), pairs), np.float32), np.ones(len(layers), np.float32)
    for row, rope in enumerate(ropes):
        frequencies[row, : len(rope.frequencies)] = rope.frequencies
        scales[row] = rope.scale
    windows = tuple(sorted({config.windows[layer] for layer in layers}))
    window_index = np.array([windows.index(config.windows[layer]) for layer in layers], np.int32)
    graphdef, parameters = nnx.split(block)
    if keys is not None:
        keys = keys[np.array(layers)]
    return _Stack(
        graphdef, windows, _LayerArrays(parameters, frequencies, scales, window_index, cached, per_layer, keys)
    )


class Block(nnx.Module):
    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        norm = lambda exists: Norm(config.width, config) if exists else None  # noqa: E731
        self.pre_attention_norm = norm(config.pre_norms)
        # "Attention" stands for whatever takes its place.
        self.self_attn = Attention(config, rngs) if config.mixer == "attention" else None
        self.short_conv = ShortConvolution(config, rngs) if config.mixer == "short_convolution" else None
        self.delta_net = GatedDeltaNet(config, rngs) if config.mixer == "gated_delta_net" else None
        self.post_attention_norm = norm(config.post_norms)
        self.pre_mlp_norm = norm(config.pre_norms)
        self.mlp = (MixtureOfExperts if config.experts else MLP)(config, rngs)
        self.post_mlp_norm = norm(config.post_norms)
        self.per_layer_input = PerLayerInput(config, rngs) if config.per_layer_width else None
        self.scale = nnx.Param(jnp.ones(1, jnp.float32)) if config.layer_scale else None
        self.residual_scale = config.residual_scale
        self.dropout = nnx.Dropout(config.dropout)

    def __call__(
        self, x: Float[Array, "B T D"], layer: Layer, reading: Reading, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "B Q D"], Any]:
        """The states at the positions that `reading` asks for, and what the layer keeps for later positions."""
        normed = lambda norm, y: y if norm is None else norm(y)  # noqa: E731
        mixer = self.self_attn or self.short_conv or self.delta_net
        branch, kept = mixer(normed(self.pre_attention_norm, x), layer, reading, rngs)
        x = self._add(reading.asked(x), normed(self.post_attention_norm, branch), rngs)
        branch = self.mlp(normed(self.pre_mlp_norm, x), rngs)
        x = self._add(x, normed(self.post_mlp_norm, branch), rngs)
        if self.per_layer_input is not None:
            x = self._add(x, self.per_layer_input(x, reading.asked(layer.per_layer), rngs), rngs)
        return x if self.scale is None else (x * self.scale[...]).astype(x.dtype), kept

    def _add(self, x, branch, rngs):
        branch = branch if self.residual_scale == 1 else branch * self.residual_scale
        return x + self.dropout(branch, deterministic=rngs is None, rngs=rngs)


class HistoryCache(NamedTuple):
    """What `Transformer.prefill` keeps for `Transformer.extend`.

    Attributes:
      stacks: what each stack's layers keep, arrays [layers, B, ...].
      lengths: the length of each history; later positions are padding.
    """

    stacks: list[Any]
    lengths: Int[Array, " B"]


class BranchCache(NamedTuple):
    """What the W branches of each history have read so far.

    Attributes:
      stacks: what each stack's layers keep, arrays [layers, B, W, ...].
      read: the number of positions read, in the shape of the other arrays, as if there were one layer.
    """

    stacks: list[Any]
    read: Int[Array, "1 B W"]


class Transformer(nnx.Module):
    """The decoder stack.

    Each entry of `layers` is one Block whose arrays have a leading axis for the layers of a stack, `config.stacks`.
    Stacks are scanned, so compile time does not grow with the number of layers.
    """

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        self.config = config
        self.position_embedding = nnx.data(None)
        if config.max_positions:
            init = nnx.initializers.normal(0.02)
            positions = init(rngs.params(), (config.max_positions, config.width), jnp.float32)
            self.position_embedding = nnx.Param(positions, axes=(None, "embed"))

        def stack(layers: range) -> Block:
            blocks = nnx.vmap(lambda rngs: Block(config.of_layer(layers[0]), rngs), in_axes=0, out_axes=0)
            return nnx.split_rngs(splits=len(layers))(blocks)(rngs)

        self.per_layer_inputs = PerLayerInputs(config, rngs) if config.per_layer_width else None
        self.layers = nnx.List([stack(layers) for layers in config.stacks])
        self.final_norm = Norm(config.width, config)
        self.dropout = nnx.Dropout(config.dropout)

    def __call__(
        self,
        embeddings: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B T D"]:
        """The hidden states. A position sees only its own segment.

        Args:
          embeddings: for a decoder with per-layer inputs, here and below, they may be of width `config.input_width`:
            followed by the tokens' embeddings for each layer.
          segment_ids: which sequence of a packed row a position belongs to; 0 is padding.
          positions: position within the segment.
          rngs: with a "dropout" stream in training; None switches dropout off.
        """
        return self._states(embeddings, Reading(self.config, segment_ids, positions), rngs=rngs)[0]

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
        return state, HistoryCache(kept, lengths)

    def _read(
        self, embeddings: Float[Array, "B T D"], lengths: Int[Array, " B"], keeps: bool
    ) -> tuple[Float[Array, "B D"], list[Any]]:
        """The state at the end of each history; with `keeps`, also what every stack's layers keep."""
        config = self.config
        if not config.causal:
            raise ValueError("only a causal decoder can stop at the end of a history")
        histories, ends = (kind(config, lengths, embeddings.shape[1]) for kind in (Histories, HistoryEnds))
        carry, per_layer = self._begin(embeddings, histories.positions)
        all_kept = []
        for segment, stacks in self._segments(per_layer):
            blocks = [self._block(stack, histories) for stack in stacks]
            last_blocks = [*blocks[:-1], self._block(stacks[-1], ends)]
            arrays = jax.tree.map(jnp.asarray, [stack.arrays for stack in stacks])

            def period(carry, turn, blocks=blocks, arrays=arrays):
                # Indexes one layer at a time, because slicing off the last layer would copy the others.
                of_layer = lambda y: jax.lax.dynamic_index_in_dim(y, turn, keepdims=False)  # noqa: E731
                carry, kept = _through(blocks, carry, jax.tree.map(of_layer, arrays))
                return carry, kept if keeps else []

            is_last = segment is config.segments[-1]
            turns = segment.repeats - is_last
            carry, kept = jax.lax.scan(period, carry, jnp.arange(turns), unroll=_unroll(segment.period, turns))
            if is_last:
                carry, last = period(carry, turns, last_blocks)
                kept = jax.tree.map(lambda some, one: jnp.concatenate([some, one[None]]), kept, last)
            all_kept += kept
        return self.final_norm(carry[0])[:, 0], all_kept

    def extend(
        self, embeddings: Float[Array, "B W S D"], history: HistoryCache, branches: BranchCache | None = None
    ) -> tuple[Float[Array, "B W S D"], BranchCache]:
        """Hidden states of S more positions on each of the W branches that continue a history.

        A branch sees the history, which its branches share, and itself. The states are the same as if history and
        branch were read as one sequence.

        Args:
          branches: the cache of the positions that each branch has read already; None at the start.

        Returns:
          The states, and the branches' cache, now with these positions.
        """
        new = embeddings.shape[2]
        read = jnp.zeros((1, *embeddings.shape[:2]), jnp.int32) if branches is None else branches.read
        positions = history.lengths[:, None, None] + read[0, ..., None] + jnp.arange(new)
        of_branches = [None] * len(self.layers) if branches is None else branches.stacks
        cached = [Cached(*pair) for pair in zip(history.stacks, of_branches, strict=True)]
        reading = Branches(self.config, history.lengths, positions)
        flat = embeddings.reshape(len(embeddings), -1, embeddings.shape[-1])
        states, kept = self._states(flat, reading, cached)
        return states.reshape(*embeddings.shape[:3], -1), BranchCache(kept, read + new)

    def _begin(
        self, embeddings: Float[Array, "B T D"], positions: Int[Array, "B T"], rngs: nnx.Rngs | None = None
    ) -> tuple[_Carry, list[Float[Array, "layers B T P"] | None]]:
        """The first layer's input with room for what layers share, and what each stack's layers read of the inputs."""
        config = self.config
        of_layers = None
        if embeddings.shape[-1] > config.width:
            embeddings, of_layers = jnp.split(embeddings, [config.width], axis=-1)
        x = (embeddings * config.embedding_scale).astype(config.dtype)
        if self.position_embedding is not None:
            x = x + self.position_embedding[positions].astype(config.dtype)
        per_layer = [None] * len(self.layers)
        if self.per_layer_inputs is not None:
            inputs = self.per_layer_inputs(x, of_layers)
            per_layer = [inputs[layers.start : layers.stop : layers.step] for layers in config.stacks]
        shared = {}
        for of_stack in (config.of_layer(layers[0]) for layers in config.stacks):
            if of_stack.kv_group:
                empty = jnp.zeros((*x.shape[:2], of_stack.kv_heads, of_stack.head_width), x.dtype)
                shared[of_stack.kv_group] = empty, empty
        x = sharding.constrain(self.dropout(x, deterministic=rngs is None, rngs=rngs), "batch", None, None)
        return (x, shared), per_layer

    def _segments(
        self, per_layer: list[Array | None], cached: list[Cached] | None = None, keys: Array | None = None
    ) -> Iterator[tuple[Segment, list[_Stack]]]:
        """Each segment with the stacks of its places.

        Args:
          per_layer, cached: of every stack.
          keys: of every layer.
        """
        cached, number = cached or [Cached()] * len(self.layers), 0
        for segment in self.config.segments:
            stacks = []
            for layers in segment.stacks():
                arrays = cached[number], per_layer[number], keys
                stacks.append(_stack(self.layers[number], self.config, layers, *arrays))
                number += 1
            yield segment, stacks

    def _states(
        self,
        embeddings: Float[Array, "B T D"],
        reading: Reading,
        cached: list[Cached] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "B T D"], list[Any]]:
        """The hidden states, and what every stack's layers keep.

        Args:
          cached: of every stack, arrays with a leading axis for the layers.
        """
        carry, per_layer = self._begin(embeddings, reading.positions, rngs)
        keys = None if rngs is None else jax.random.split(rngs.dropout(), self.config.layers)
        all_kept = []
        for segment, stacks in self._segments(per_layer, cached, keys):
            period = functools.partial(_through, [self._block(stack, reading) for stack in stacks])
            arrays = [stack.arrays for stack in stacks]
            carry, kept = jax.lax.scan(period, carry, arrays, unroll=_unroll(segment.period, segment.repeats))
            all_kept += kept
        return self.final_norm(carry[0]), all_kept

    def _block(self, stack: _Stack, reading: Reading) -> Callable[[_Carry, _LayerArrays], tuple[_Carry, Any]]:
        """What computes one of the stack's layers: the states after it, and what it keeps."""
        config = self.config

        def block(carry: _Carry, of_layer: _LayerArrays) -> tuple[_Carry, Any]:
            x, shared = carry
            parameters, frequencies, rotary_scale, window_index, cached, per_layer, key = of_layer
            layer = Layer(
                frequencies, rotary_scale, stack.windows, window_index, cached, shared=dict(shared), per_layer=per_layer
            )
            module = nnx.merge(stack.graphdef, sharding.gather_kernels(parameters, config.dtype))
            x, kept = module(x, layer, reading, None if key is None else nnx.Rngs(dropout=key))
            return (sharding.constrain(x, "batch", None, None), layer.shared), kept

        if config.remat == "none":
            return block
        return jax.checkpoint(block, policy=REMAT_POLICIES[config.remat], prevent_cse=False)


def _through(blocks: list[Callable], carry: _Carry, of_layers: list[_LayerArrays]) -> tuple[_Carry, list[Any]]:
    """The states after some layers, one after the other, and what each keeps."""
    all_kept = []
    for block, of_layer in zip(blocks, of_layers, strict=True):
        carry, kept = block(carry, of_layer)
        all_kept.append(kept)
    return carry, all_kept


def _unroll(period: int, turns: int) -> int:
    """The number of periods in one iteration of a loop over `turns` periods."""
    return max(layers_a_turn(period * turns) // period, 1)
