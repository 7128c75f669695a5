"""Reading a history and then its branches from a cache gives the same states as reading everything at once.

The decoders cover what the families do differently.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from transformers import AutoConfig

from simgr_jax.huggingface import families
from simgr_jax.models import lora
from simgr_jax.models.lora import LoRAConfig
from simgr_jax.models.transformer import Transformer
from simgr_jax.models.transformer_config import DeltaNetShape, from_scratch_config

SCRATCH = from_scratch_config(width=12, layers=2, heads=4, kv_heads=2, head_width=6, mlp_width=20, rope_theta=50.0)
LORA = LoRAConfig(rank=2, alpha=6.0, targets=("q_proj", "v_proj", "down_proj"), dropout=0.5)
# They have, in this order: learned positions and biases; windows, softcap, post norms and scales; experts, windows and
# normalized heads; a layer without positions; rotary positions in a part of each head; shared keys and values, and
# inputs for each layer.
GOLDEN = ("gpt2", "gemma2", "qwen3_moe_fused_window", "smollm3_biases_window", "phi3_partial_rotary", "gemma4_text")
# Each takes seconds to compile. This one has most of what the others have, too.
QUICK = ("qwen3_moe_fused_window",)

LENGTHS = (11, 6, 1)
LENGTH, WIDTH, NEW = 11, 2, 4
PARENTS = np.array([[1, 0], [0, 0], [1, 1]])


class Reading(NamedTuple):
    """
    Attributes:
      history: [B, T, D], then padding.
      lengths: [B].
      branches: [B, W, NEW, D]. After its first embedding, branch w continues what branch PARENTS[b, w] has read.
    """

    history: np.ndarray
    lengths: np.ndarray
    branches: np.ndarray


def reading(width):
    random = lambda *axes: jnp.asarray(np.random.default_rng(len(axes)).normal(size=axes), jnp.float32)  # noqa: E731
    return Reading(random(3, LENGTH, width), jnp.array(LENGTHS), random(3, WIDTH, NEW, width))


def of_parents(x, axis):
    """x with the branches that PARENTS names. axis: the axis of branches, which follows that of histories."""
    parents = np.expand_dims(PARENTS, [*range(axis - 1), *range(axis + 1, x.ndim)])
    return jnp.take_along_axis(x, jnp.asarray(parents), axis=axis)


def make(config):
    """A transformer whose weights are all random and not small."""
    model = Transformer(config, nnx.Rngs(0))
    return randomized(model, 0.3)


def randomized(model, scale):
    generator = np.random.default_rng(0)
    random = lambda x: jnp.asarray(generator.normal(0.1, scale, x.shape), x.dtype)  # noqa: E731
    nnx.update(model, jax.tree.map(random, nnx.state(model)))
    return model


# Two programs give the same bits only with the emitters that users have, which the tests otherwise switch off.
fused = functools.partial(jax.jit, compiler_options={"xla_cpu_use_fusion_emitters": True})


@fused
def read_on(model, inputs):
    """The state at each history's end, [B, D], and those of the branches, [B, W, NEW, D], read in two steps."""
    state, history = model.prefill(inputs.history, inputs.lengths)
    first, branches = model.extend(inputs.branches[:, :, :1], history)
    first, branches = of_parents(first, 1), jax.tree.map(lambda x: of_parents(x, 2), branches)
    rest, branches = model.extend(inputs.branches[:, :, 1:], history, branches)
    assert all(x.shape[1:3] == (len(LENGTHS), WIDTH) for x in jax.tree.leaves(branches))
    return state, jnp.concatenate([first, rest], axis=2)


@jax.jit
def read_at_once(model, inputs):
    """[B, W, T + NEW, D]. Each branch has a row of its own: its history, its parent's first embedding, then its own."""
    branches = jnp.concatenate([of_parents(inputs.branches[:, :, :1], 1), inputs.branches[:, :, 1:]], axis=2)
    rows = []
    for history, length, own in zip(inputs.history, LENGTHS, branches, strict=True):
        repeated = jnp.tile(history[:length], (WIDTH, 1, 1))
        padding = jnp.zeros((WIDTH, LENGTH - length, history.shape[1]))
        rows.append(jnp.concatenate([repeated, own, padding], axis=1))
    rows = jnp.concatenate(rows)
    positions = jnp.broadcast_to(jnp.arange(rows.shape[1]), rows.shape[:2])
    segment_ids = positions < jnp.repeat(inputs.lengths + NEW, WIDTH)[:, None]
    states = model(rows, segment_ids.astype(jnp.int32), positions)
    return states.reshape(len(LENGTHS), WIDTH, *states.shape[1:])


def assert_same_states(model, inputs, **tolerance):
    state, read = (np.asarray(x, np.float32) for x in read_on(model, inputs))
    alone = fused(lambda model, inputs: model.at_end(*inputs[:2]))(model, inputs)
    np.testing.assert_array_equal(np.asarray(alone, np.float32), state)
    at_once = np.asarray(read_at_once(model, inputs), np.float32)
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(state[row], at_once[row, 0, length - 1], **tolerance)
        np.testing.assert_allclose(read[row], at_once[row, :, length : length + NEW], **tolerance)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in GOLDEN]
)
def test_reading_on_equals_reading_at_once(name, root):
    hf_config = AutoConfig.from_pretrained(root / "tests" / "huggingface" / "golden" / name)
    model = make(families.transformer_config(hf_config, max_length=LENGTH + NEW))
    assert_same_states(model, reading(model.config.width), rtol=1e-4, atol=1e-4)


def test_reading_on_equals_reading_at_once_with_adapters():
    model = Transformer(SCRATCH, nnx.Rngs(0))
    lora.add(model, LORA, nnx.Rngs(1))
    assert_same_states(randomized(model, 0.3), reading(12), rtol=1e-4, atol=1e-4)


def mixed(*mixers):
    """SCRATCH with layers that mix positions in different ways."""
    return dataclasses.replace(
        SCRATCH,
        layers=len(mixers),
        rope=SCRATCH.rope[:1] * len(mixers),
        windows=(0,) * len(mixers),
        convolution_width=4,
        delta_net=DeltaNetShape(key_heads=2, value_heads=4, key_width=5, value_width=3),
        layer_fields=tuple((("mixer", mixer),) for mixer in mixers),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "mixers",
    [("attention", "short_convolution", "gated_delta_net"), ("gated_delta_net", "attention", "short_convolution")],
)
def test_reading_on_equals_reading_at_once_whatever_mixes_positions(mixers):
    assert_same_states(make(mixed(*mixers)), reading(12), rtol=1e-4, atol=1e-4)


def test_the_state_at_the_end_equals_that_among_all_states_whatever_mixes_positions():
    model, (history, lengths, _) = make(mixed("short_convolution", "gated_delta_net")), reading(12)
    positions = jnp.broadcast_to(jnp.arange(LENGTH), history.shape[:2])
    segment_ids = (positions < lengths[:, None]).astype(jnp.int32)
    states = jax.jit(lambda model: model(history, segment_ids, positions))(model)
    ends = jax.jit(lambda model: model.at_end(history, lengths))(model)
    np.testing.assert_allclose(ends, states[jnp.arange(len(LENGTHS)), lengths - 1], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_reading_on_equals_reading_at_once_with_one_layer():
    model = make(dataclasses.replace(SCRATCH, layers=1, rope=SCRATCH.rope[:1], windows=(0,)))
    assert_same_states(model, reading(12), rtol=1e-4, atol=1e-4)


def test_reading_on_in_bfloat16_is_close_and_has_a_bfloat16_cache():
    model = make(dataclasses.replace(SCRATCH, dtype="bfloat16"))
    assert_same_states(model, reading(12), rtol=0, atol=0.1)
    _, cache = jax.jit(lambda model, inputs: model.prefill(*inputs[:2]))(model, reading(12))
    assert {x.dtype for x in jax.tree.leaves(cache.stacks)} == {jnp.dtype("bfloat16")}


def test_a_decoder_that_reads_in_both_directions_has_no_cache():
    model, inputs = make(dataclasses.replace(SCRATCH, causal=False)), reading(12)
    for read in (model.prefill, model.at_end):
        with pytest.raises(ValueError, match="causal"):
            read(inputs.history, inputs.lengths)
