"""The encoder-decoder rival: TIGER (arXiv 2305.05065), which reads a history and spells the next item's semantic ID.

An encoder reads the history's semantic-ID tokens. A decoder spells the next item (see `speller.Speller`), looking at
the tokens before and, by cross-attention, at the encoder's states. Encoder, decoder and softmax share the token
embeddings, as in T5.

Where this is not TIGER:
- Layers are the backbone's (rotary positions, gated MLPs), so that it is compared with what the other models have. T5
  has learned biases for distances, and none in cross-attention; here the decoder's positions go on from the history's,
  in cross-attention as well, so that it can tell how long ago an item was.
- There is no token of the user (TIGER has 2000, by the hash of the user's id).
- With the encoder "causal", a state knows only what came before it. A history is then read once for all of its targets:
  each is decoded from the states up to its place. The bidirectional encoder, TIGER's, must read it anew for each, which
  takes several times as long. That is for small budgets, and costs what a state could learn from later items.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from simgr_jax import sharding
from simgr_jax.batch import RankBatch, TrainBatch
from simgr_jax.errors import UserError
from simgr_jax.models import speller
from simgr_jax.models.create import scratch_backbone_config
from simgr_jax.models.inputs import ModelInputs
from simgr_jax.models.speller import Speller
from simgr_jax.models.token_embeddings import EMBEDDING_STD, embed_tokens
from simgr_jax.models.transformer import (
    MLP,
    REMAT_POLICIES,
    Linear,
    Norm,
    Transformer,
    TransformerConfig,
    apply_rotary,
    layers_a_turn,
)

ENCODERS = ("bidirectional", "causal")


def create(config: ml_collections.ConfigDict, inputs: ModelInputs) -> EncoderDecoder:
    """
    Raises:
      UserError: see `speller.check`; or the backbone is a checkpoint, or a value can't be.
    """
    speller.check(config)
    own = config.encoder_decoder
    if config.backbone.checkpoint:
        raise UserError(
            "config.backbone.checkpoint: is a decoder's, but the encoder-decoder model is trained from scratch; leave "
            'it "", or choose config.model.name = "autoregressive"'
        )
    if own.encoder not in ENCODERS:
        raise UserError(
            f'config.encoder_decoder.encoder: "{own.encoder}" is unknown; choose one of {", ".join(ENCODERS)}'
        )
    if own.decoder_layers < 1:
        raise UserError(f"config.encoder_decoder.decoder_layers: can't be {own.decoder_layers}; give a number from 1")
    return EncoderDecoder(config, inputs)


class KeysValues(NamedTuple):
    keys: Float[Array, "*B T Hkv head"]
    values: Float[Array, "*B T Hkv head"]


class History(NamedTuple):
    """What the decoder needs of histories to continue each of them at S places.

    Attributes:
      kept: [layers, B, T, Hkv, head], what each of the decoder's layers looks at.
      sees: which of the T states each place's continuation looks at.
      positions: of the first token of the continuation.
    """

    kept: KeysValues
    sees: Bool[Array, "B S T"]
    positions: Int[Array, "B S"]


class EncoderDecoder(Speller):
    """Implements `recommender.Recommender`. The encoder is a Transformer of the backbone's shape; of its layers the
    decoder has `config.encoder_decoder.decoder_layers`, with cross-attention."""

    def __init__(self, config: ml_collections.ConfigDict, inputs: ModelInputs):
        own, rngs = config.encoder_decoder, inputs.rngs
        shape = dataclasses.replace(scratch_backbone_config(config), causal=own.encoder == "causal")
        super().__init__(config, inputs.semantic_ids, shape.width, rngs)
        self.windows = "history" if shape.causal else "one_target"
        self.start = nnx.Param(nnx.initializers.normal(EMBEDDING_STD)(rngs.params(), (shape.width,), jnp.float32))
        self.encoder = Transformer(shape, rngs)
        self.decoder = Decoder(shape, own.decoder_layers, rngs)

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
    """A stack of layers with cross-attention, kept and scanned as `transformer.Transformer`'s.

    Args:
      config: a Transformer's; its number of layers does not count.
    """

    def __init__(self, config: TransformerConfig, layers: int, rngs: nnx.Rngs):
        self.config, self.num_layers = config, layers
        blocks = nnx.vmap(lambda rngs: DecoderBlock(config, rngs), in_axes=0, out_axes=0)
        self.layers = nnx.split_rngs(splits=layers)(blocks)(rngs)
        self.final_norm = Norm(config.width, config)
        self.dropout = nnx.Dropout(config.dropout)

    def read(self, states: Float[Array, "B T D"], positions: Int[Array, "B T"]) -> KeysValues:
        """What each layer looks at of the encoder's states, [layers, B, T, Hkv, head]: once for all continuations."""
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
          history: with S places, or one that all continue.
          past: of the P tokens of each continuation before these; None where there are none.
          rngs: with a "dropout" stream in training; None switches dropout off.

        Returns:
          The states, and what the next call gets as `past`: [layers, B, S, P + Q, Hkv, head].
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
    """Grouped-query attention with rotary positions, in parts: what is looked at is computed once and kept.

    XLA's own kernel, whatever `config.attention`: no packed kernel has masks of this kind.
    """

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        self.config = config
        query_width, kv_width = config.heads * config.head_width, config.kv_heads * config.head_width
        self.q_proj = Linear(config.width, query_width, False, config, rngs)
        self.k_proj = Linear(config.width, kv_width, False, config, rngs)
        self.v_proj = Linear(config.width, kv_width, False, config, rngs)
        self.o_proj = Linear(query_width, config.width, False, config, rngs)

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
