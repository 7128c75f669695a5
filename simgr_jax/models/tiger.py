"""TIGER: an encoder reads the history, a decoder spells the next item's semantic ID (arXiv 2305.05065).

The decoder (see `speller.Speller`) attends to the tokens spelled so far and, by cross-attention, to the encoder's
states. Encoder, decoder and softmax share the token embeddings, as in T5.

Differences from the paper:
- The layers are the backbone's (rotary positions, gated MLPs), so that the comparison between models is fair. T5 has
  learned distance biases, and none in cross-attention; here the decoder's positions continue the history's, also in
  cross-attention, so that it can tell how long ago an item was.
- There is no user token (TIGER has 2000, chosen by the hash of the user's id).
- With `encoder="causal"`, a state knows only what came before it, so a history is read once for all its targets and
  each is decoded from the states before it. TIGER's bidirectional encoder has to read the history anew for each target,
  which takes several times as long. "causal" is for small budgets; its states can't use later items.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from simgr_jax.devices import sharding
from simgr_jax.inputs.batch import RankBatch, TrainBatch
from simgr_jax.models.attention_layer import apply_rotary
from simgr_jax.models.embed_tokens import EMBEDDING_STD, embed_tokens
from simgr_jax.models.linear import Linear
from simgr_jax.models.mlp import MLP
from simgr_jax.models.model_inputs import ModelInputs
from simgr_jax.models.norm import Norm
from simgr_jax.models.options import COMPUTATION_KEYS, SHAPE_KEYS, ModelOptions
from simgr_jax.models.scratch import scratch_config
from simgr_jax.models.speller import Speller
from simgr_jax.models.transformer import Transformer, layers_a_turn
from simgr_jax.models.transformer_config import REMAT_POLICIES, TransformerConfig

ENCODERS = ("bidirectional", "causal")


@dataclasses.dataclass(frozen=True)
class Options(ModelOptions):
    """
    Attributes:
      encoder: "bidirectional", TIGER's, which reads a history anew for each of its targets, or "causal", which reads it
        once for all of them. It has the backbone's layers.
      decoder_layers: layers of the decoder.
      beam_width: number of item prefixes that beam search keeps; at least the length of the lists.
      label_smoothing: ε of each token's cross-entropy.
    """

    name = "tiger"
    history = "tokens"
    reads_semantic_ids = True
    backbone_keys = SHAPE_KEYS + COMPUTATION_KEYS

    encoder: str = "bidirectional"
    decoder_layers: int = 2
    beam_width: int = 20
    label_smoothing: float = 0.0

    def __post_init__(self):
        self.require_choice("encoder", ENCODERS)
        self.require(self.decoder_layers >= 1, "decoder_layers", "give a number from 1")
        self.require(self.beam_width >= 1, "beam_width", "give a number from 1")
        self.require_label_smoothing()

    @property
    def windows(self) -> str:
        return "history" if self.encoder == "causal" else "one_target"


def create(config: ml_collections.ConfigDict, options: Options, inputs: ModelInputs) -> Tiger:
    """
    Raises:
      UserError: a config value is invalid.
    """
    shape = dataclasses.replace(scratch_config(config), causal=options.encoder == "causal")
    return Tiger(shape, options, inputs)


class KeysValues(NamedTuple):
    keys: Float[Array, "*B T Hkv head"]
    values: Float[Array, "*B T Hkv head"]


class History(NamedTuple):
    """What the decoder needs to continue each history at S places.

    Attributes:
      kept: [layers, B, T, Hkv, head], the keys and values of each decoder layer's cross-attention.
      sees: which of the T states the continuation at each place attends to.
      positions: the position of the continuation's first token.
    """

    kept: KeysValues
    sees: Bool[Array, "B S T"]
    positions: Int[Array, "B S"]


class Tiger(Speller):
    """Implements `recommender.Recommender`.

    Args:
      shape: the encoder's; the decoder's layers have the same widths, plus cross-attention.
    """

    def __init__(self, shape: TransformerConfig, options: Options, inputs: ModelInputs):
        rngs = inputs.rngs
        super().__init__(options, inputs.semantic_ids, shape.width, rngs)
        self.start = nnx.Param(nnx.initializers.normal(EMBEDDING_STD)(rngs.params(), (shape.width,), jnp.float32))
        self.encoder = Transformer(shape, rngs)
        self.decoder = Decoder(shape, options.decoder_layers, rngs)

    def loss(self, batch: TrainBatch, rngs: nnx.Rngs) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        history = self._encode(batch.inputs, batch.segment_ids, batch.positions, batch.readouts, rngs)
        tokens = self._tokens(batch.targets)
        start = self._start(*tokens.shape[:2])
        embeddings = jnp.concatenate([start, self.catalog()[tokens[..., :-1]]], axis=2)
        states, _ = self.decoder(embeddings, history, rngs=rngs)
        return self._spelling_loss(states, tokens, batch.valid)

    def _read(self, batch: RankBatch, _: Float[Array, "V D"]) -> tuple[Float[Array, "B D"], History, KeysValues]:
        history = self._encode(batch.inputs, batch.segment_ids, batch.positions, batch.lengths[:, None] - 1)
        states, past = self.decoder(self._start(len(batch.inputs), 1), history)
        return states[:, 0, 0], history, past

    def _read_on(
        self, embeddings: Float[Array, "B W S D"], history: History, branches: KeysValues
    ) -> tuple[Float[Array, "B W S D"], KeysValues]:
        return self.decoder(embeddings, history, branches)

    def _floats_a_token(self, length: int) -> int:
        return max(self.encoder.config.mlp_width, self.encoder.config.heads * length)

    def _start(self, batch: int, sequences: int) -> Float[Array, "B S 1 D"]:
        """What the decoder reads to predict the first token."""
        return jnp.broadcast_to(self.start[...], (batch, sequences, 1, len(self.start)))

    def _encode(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        readouts: Int[Array, "B S"],
        rngs: nnx.Rngs | None = None,
    ) -> History:
        """Histories, to be continued after each readout."""
        states = self.encoder(embed_tokens(self.embedding, None, tokens), segment_ids, positions, rngs)
        at_readout = lambda x: jnp.take_along_axis(x, readouts, axis=1)  # noqa: E731
        sees = at_readout(segment_ids)[:, :, None] == segment_ids[:, None]
        if self.encoder.config.causal:
            sees &= jnp.arange(tokens.shape[1]) <= readouts[:, :, None]
        return History(self.decoder.read(states, positions), sees, at_readout(positions) + 1)


class Decoder(nnx.Module):
    """A stack of layers with cross-attention, stored and scanned as in `transformer.Transformer`.

    Args:
      config: a Transformer's; its number of layers is not read.
    """

    def __init__(self, config: TransformerConfig, layers: int, rngs: nnx.Rngs):
        self.config, self.num_layers = config, layers
        blocks = nnx.vmap(lambda rngs: DecoderBlock(config, rngs), in_axes=0, out_axes=0)
        self.layers = nnx.split_rngs(splits=layers)(blocks)(rngs)
        self.final_norm = Norm(config.width, config)
        self.dropout = nnx.Dropout(config.dropout)

    def read(self, states: Float[Array, "B T D"], positions: Int[Array, "B T"]) -> KeysValues:
        """The cross-attention keys and values of each layer, [layers, B, T, Hkv, head], shared by all continuations."""
        graphdef, layers = nnx.split(self.layers)

        def keys_values(parameters):
            block = nnx.merge(graphdef, sharding.gather_kernels(parameters, self.config.dtype))
            return block.cross_attn.keys_values(states, positions)

        return jax.lax.map(keys_values, layers)

    def __call__(
        self,
        embeddings: Float[Array, "B S Q D"],
        history: History,
        past: KeysValues | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "B S Q D"], KeysValues]:
        """Hidden states of the next Q tokens of S continuations of each history.

        Args:
          history: with S places, or with one place that all continue.
          past: what an earlier call returned for the P tokens before these; None at the start.
          rngs: with a "dropout" stream in training; None switches dropout off.

        Returns:
          The states, and `past` for the next call: [layers, B, S, P + Q, Hkv, head].
        """
        config, (batch, sequences, new, width) = self.config, embeddings.shape
        done = 0 if past is None else past.keys.shape[3]
        of_tokens = lambda x: jnp.broadcast_to(x, (batch, sequences, new, *x.shape[3:]))  # noqa: E731
        positions = of_tokens(history.positions[:, :, None] + done + jnp.arange(new)).reshape(batch, -1)
        sees = of_tokens(history.sees[:, :, None]).reshape(batch, sequences * new, -1)
        x = self.dropout(embeddings.astype(config.dtype), deterministic=rngs is None, rngs=rngs)
        x = sharding.constrain(x.reshape(batch, -1, width), "batch", None, None)

        graphdef, layers = nnx.split(self.layers)
        keys = None if rngs is None else jax.random.split(rngs.dropout(), self.num_layers)

        def block(x, scanned):
            parameters, kept, past, key = scanned
            rngs = None if key is None else nnx.Rngs(dropout=key)
            block = nnx.merge(graphdef, sharding.gather_kernels(parameters, config.dtype))
            x, past = block(x, positions, sequences, kept, sees, past, rngs)
            return sharding.constrain(x, "batch", None, None), past

        if config.remat != "none":
            block = jax.checkpoint(block, policy=REMAT_POLICIES[config.remat], prevent_cse=False)
        scanned = (layers, history.kept, past, keys)
        x, past = jax.lax.scan(block, x, scanned, unroll=layers_a_turn(self.num_layers))
        return self.final_norm(x).reshape(embeddings.shape), past


class DecoderBlock(nnx.Module):
    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        self.pre_self_norm, self.pre_cross_norm, self.pre_mlp_norm = (Norm(config.width, config) for _ in range(3))
        self.self_attn, self.cross_attn = Attention(config, rngs), Attention(config, rngs)
        self.mlp = MLP(config, rngs)
        self.dropout = nnx.Dropout(config.dropout)

    def __call__(
        self,
        x: Float[Array, "B S*Q D"],
        positions: Int[Array, "B S*Q"],
        sequences: int,
        history: KeysValues,
        sees: Bool[Array, "B S*Q T"],
        past: KeysValues | None,
        rngs: nnx.Rngs | None,
    ) -> tuple[Float[Array, "B S*Q D"], KeysValues]:
        drop = lambda y: self.dropout(y, deterministic=rngs is None, rngs=rngs)  # noqa: E731
        branch, past = self._each_to_itself(self.pre_self_norm(x), positions, sequences, past)
        x = x + drop(branch)
        query = self.cross_attn.queries(self.pre_cross_norm(x), positions)
        x = x + drop(self.cross_attn(query, history, sees))
        return x + drop(self.mlp(self.pre_mlp_norm(x), rngs)), past

    def _each_to_itself(self, x, positions, sequences, past) -> tuple[Float[Array, "B S*Q D"], KeysValues]:
        """Causal self-attention of each of the S sequences."""
        batch = len(x)
        query = self.self_attn.queries(x, positions)
        kept = self.self_attn.keys_values(x, positions)
        kept = jax.tree.map(lambda y: y.reshape(batch, sequences, -1, *y.shape[2:]), kept)
        if past is not None:
            kept = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=2), past, kept)
        new, total = query.shape[1] // sequences, kept.keys.shape[2]
        alone = lambda y: y.reshape(batch * sequences, -1, *y.shape[-2:])  # noqa: E731
        mask = jnp.tril(jnp.ones((1, new, total), bool), total - new)
        mixed = self.self_attn(alone(query), jax.tree.map(alone, kept), mask)
        return mixed.reshape(x.shape), kept


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions, in parts, so that keys and values can be computed once and kept.

    It always runs XLA's own kernel, whatever `config.attention` says: no fused kernel has masks of this kind.
    """

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        self.config = config
        query_width, kv_width = config.heads * config.head_width, config.kv_heads * config.head_width
        self.q_proj = Linear(config.width, query_width, False, config.dtype, rngs, ("embed", "heads"))
        self.k_proj = Linear(config.width, kv_width, False, config.dtype, rngs, ("embed", "heads"))
        self.v_proj = Linear(config.width, kv_width, False, config.dtype, rngs, ("embed", "heads"))
        self.o_proj = Linear(query_width, config.width, False, config.dtype, rngs, ("heads", "embed"))

    def queries(self, x: Float[Array, "B T D"], positions: Int[Array, "B T"]) -> Float[Array, "B T H head"]:
        return self._rotated(self._by_head(self.q_proj(x, None)), positions)

    def keys_values(self, x: Float[Array, "B T D"], positions: Int[Array, "B T"]) -> KeysValues:
        return KeysValues(
            self._rotated(self._by_head(self.k_proj(x, None)), positions), self._by_head(self.v_proj(x, None))
        )

    def __call__(
        self, query: Float[Array, "B Q H head"], kept: KeysValues, mask: Bool[Array, "#B Q T"]
    ) -> Float[Array, "B Q D"]:
        mixed = jax.nn.dot_product_attention(query, kept.keys, kept.values, mask=mask[:, None])
        return self.o_proj(mixed.reshape(*mixed.shape[:2], -1), None)

    def _by_head(self, x: Float[Array, "B T width"]) -> Float[Array, "B T heads head"]:
        x = x.reshape(*x.shape[:2], -1, self.config.head_width)
        return sharding.constrain(x, "batch", None, "heads", None)

    def _rotated(
        self, x: Float[Array, "B T heads head"], positions: Int[Array, "B T"]
    ) -> Float[Array, "B T heads head"]:
        rope = self.config.rope[0]
        return apply_rotary(x, positions, jnp.array(rope.frequencies), jnp.float32(rope.scale))
