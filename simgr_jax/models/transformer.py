"""One transformer for every supported family of Hugging Face decoders, and for training from scratch.

It takes embeddings and returns hidden states; the recommender decides what the embeddings stand for. Every difference
between the families is a field of `TransformerConfig`. `huggingface/` knows where their checkpoints keep the weights.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from simgr_jax.devices import sharding
from simgr_jax.models.attention import Attention
from simgr_jax.models.gated_delta_net import GatedDeltaNet
from simgr_jax.models.layer_order import Segment
from simgr_jax.models.mlp import MLP, MixtureOfExperts
from simgr_jax.models.norm import Norm
from simgr_jax.models.reading import Branches, Cached, Histories, HistoryEnds, Layer, Reading
from simgr_jax.models.short_convolution import ShortConvolution
from simgr_jax.models.transformer_config import REMAT_POLICIES, TransformerConfig


def layers_a_turn(layers: int) -> int:
    """The number of layers in one iteration of the loop over layers.

    Each iteration copies what it passes on, so one layer per iteration is slow on a CPU (measure changes with
    benchmarks/llm_train_step.py). The compiled program grows with this number, not with the depth.
    """
    return max(min(layers, 4), 1) if sharding.platform() == "cpu" else 1


class _LayerNumbers:
    """The rotary frequencies and the attention window of each layer of a stack.

    One scanned body computes all layers of a stack, so whatever differs between them is an array with an axis for the
    layers.
    """

    def __init__(self, config: TransformerConfig, layers: range):
        ropes = [config.rope[layer] for layer in layers] if config.rope else []
        windows = [config.windows[layer] for layer in layers]
        # A frequency of 0 rotates nothing, so a layer without positions has zeros.
        pairs = max((len(rope.frequencies) for rope in ropes), default=0)
        frequencies, scales = np.zeros((len(layers), pairs), np.float32), np.ones(len(layers), np.float32)
        for row, rope in enumerate(ropes):
            frequencies[row, : len(rope.frequencies)] = rope.frequencies
            scales[row] = rope.scale
        self.windows = tuple(sorted(set(windows)))
        window_index = np.array([self.windows.index(window) for window in windows], np.int32)
        self.arrays = frequencies, scales, window_index

    def layer(self, arrays: tuple[Array, Array, Array], cached: Cached) -> Layer:
        """One layer's part.

        Args:
          arrays: its entry of `arrays`.
        """
        frequencies, scale, window_index = arrays
        return Layer(frequencies, scale, self.windows, window_index, cached)


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
        return self._add(x, normed(self.post_mlp_norm, branch), rngs), kept

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
        x, all_kept = self._begin(embeddings, histories.positions), []
        for segment, stacks, numbers in self._segments():
            graphdefs, states = zip(*map(nnx.split, stacks), strict=True)
            stacked = states, [jax.tree.map(jnp.asarray, one.arrays) for one in numbers]
            is_last = segment is config.segments[-1]

            def period(x, turn, last_reading=histories, stacked=stacked, graphdefs=graphdefs, numbers=numbers):
                # Indexes one layer at a time, because slicing off the last layer would copy the others.
                of_layer = lambda y: jax.lax.dynamic_index_in_dim(y, turn, keepdims=False)  # noqa: E731
                kept = []
                for place, graphdef in enumerate(graphdefs):
                    parameters, arrays = (jax.tree.map(of_layer, of_stacks[place]) for of_stacks in stacked)
                    block = nnx.merge(graphdef, sharding.gather_kernels(parameters, config.dtype))
                    reading = last_reading if place == len(graphdefs) - 1 else histories
                    x, own = block(x, numbers[place].layer(arrays, Cached()), reading)
                    x = sharding.constrain(x, "batch", None, None)
                    kept.append(own if keeps else None)
                return x, kept

            turns = segment.repeats - is_last
            x, kept = jax.lax.scan(period, x, jnp.arange(turns), unroll=_unroll(segment.period, turns))
            if is_last:
                x, last = period(x, turns, ends)
                kept = jax.tree.map(lambda some, one: jnp.concatenate([some, one[None]]), kept, last)
            all_kept += kept
        return self.final_norm(x)[:, 0], all_kept

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
        return states.reshape(embeddings.shape), BranchCache(kept, read + new)

    def _begin(
        self, embeddings: Float[Array, "B T D"], positions: Int[Array, "B T"], rngs: nnx.Rngs | None = None
    ) -> Float[Array, "B T D"]:
        """The first layer's input."""
        x = (embeddings * self.config.embedding_scale).astype(self.config.dtype)
        if self.position_embedding is not None:
            x = x + self.position_embedding[positions].astype(self.config.dtype)
        return sharding.constrain(self.dropout(x, deterministic=rngs is None, rngs=rngs), "batch", None, None)

    def _segments(self) -> list[tuple[Segment, list[Block], list[_LayerNumbers]]]:
        """Each segment with the stacks of its places, and the numbers of their layers."""
        found, start = [], 0
        for segment in self.config.segments:
            stacks = list(self.layers)[start : start + segment.period]
            found.append((segment, stacks, [_LayerNumbers(self.config, layers) for layers in segment.stacks()]))
            start += segment.period
        return found

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
        config, x = self.config, self._begin(embeddings, reading.positions, rngs)
        keys = None if rngs is None else jax.random.split(rngs.dropout(), config.layers)
        all_kept = []
        for segment, stacks, numbers in self._segments():
            graphdefs, states = zip(*map(nnx.split, stacks), strict=True)
            blocks = [self._block(*pair, reading) for pair in zip(graphdefs, numbers, strict=True)]
            of_segment = [Cached()] * len(stacks) if cached is None else cached[len(all_kept) :][: len(stacks)]
            scanned = [
                (state, one.arrays, None if keys is None else keys[np.array(layers)], of_stack)
                for state, one, layers, of_stack in zip(states, numbers, segment.stacks(), of_segment, strict=True)
            ]

            def period(x, scanned, blocks=blocks):
                kept = []
                for block, of_layer in zip(blocks, scanned, strict=True):
                    x, own = block(x, of_layer)
                    kept.append(own)
                return x, kept

            x, kept = jax.lax.scan(period, x, scanned, unroll=_unroll(segment.period, segment.repeats))
            all_kept += kept
        return self.final_norm(x), all_kept

    def _block(self, graphdef: Any, numbers: _LayerNumbers, reading: Reading) -> Any:
        """The function (x, of a layer: parameters, numbers, dropout key and cache) -> (x, kept)."""
        config = self.config

        def block(x, of_layer):
            parameters, arrays, key, cached = of_layer
            rngs = None if key is None else nnx.Rngs(dropout=key)
            block = nnx.merge(graphdef, sharding.gather_kernels(parameters, config.dtype))
            x, kept = block(x, numbers.layer(arrays, cached), reading, rngs)
            return sharding.constrain(x, "batch", None, None), kept

        if config.remat == "none":
            return block
        return jax.checkpoint(block, policy=REMAT_POLICIES[config.remat], prevent_cse=False)


def _unroll(period: int, turns: int) -> int:
    """The number of periods in one iteration of a loop over `turns` periods."""
    return max(layers_a_turn(period * turns) // period, 1)
