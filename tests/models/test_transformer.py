"""The decoder against plain numpy in float64. tests/huggingface compares it with each family's own decoder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from simgr_jax.errors import UserError
from simgr_jax.models.transformer import Transformer
from simgr_jax.models.transformer_config import DeltaNetShape, from_scratch_config

ROPE_THETA = 50.0
SHAPE = {
    "width": 12,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "head_width": 6,
    "mlp_width": 20,
    "rope_theta": ROPE_THETA,
    "norm_epsilon": 1e-3,
}
CONFIG = from_scratch_config(**SHAPE)


def mixed(*mixers):
    """A config whose layers mix positions in different ways."""
    return dataclasses.replace(
        from_scratch_config(**SHAPE | {"layers": len(mixers)}),
        convolution_width=3,
        delta_net=DeltaNetShape(key_heads=2, value_heads=4, key_width=5, value_width=3),
        layer_fields=tuple((("mixer", mixer),) for mixer in mixers),
    )


DELTA_NET, ATTENTION, CONVOLUTION = "gated_delta_net", "attention", "short_convolution"
MIXED = mixed(DELTA_NET, ATTENTION, DELTA_NET, ATTENTION, CONVOLUTION)


def make(config=CONFIG, seed=0):
    """A transformer whose parameters, also those that begin as ones, are all random and not small."""
    model = Transformer(config, nnx.Rngs(seed))
    generator = np.random.default_rng(seed)

    def random(path, x):
        is_scale = "scale" in jax.tree_util.keystr(path)
        return jnp.asarray(generator.normal(float(is_scale), 0.3, x.shape), jnp.float32)

    nnx.update(model, jax.tree_util.tree_map_with_path(random, nnx.state(model, nnx.Param)))
    return model


def layers_of(model):
    """The blocks one by one, of a model whose layers are all of one shape."""
    graphdef, state = nnx.split(model.layers[0])
    return [nnx.merge(graphdef, jax.tree.map(lambda x, i=i: x[i], state)) for i in range(model.config.layers)]


MODEL = make()
_compiled = jax.jit(lambda graphdef, state, *inputs: nnx.merge(graphdef, state)(*inputs), static_argnums=0)


def run(model, embeddings, ids, positions):
    """The hidden states [B, T, D]. The batch is padded to [6, 12, D], so that only one shape is compiled."""
    rows, length = ids.shape
    fill = lambda x: np.pad(x, [(0, 6 - rows), (0, 12 - length)] + [(0, 0)] * (x.ndim - 2))  # noqa: E731
    return np.asarray(_compiled(*nnx.split(model), fill(embeddings), fill(ids), fill(positions))[:rows, :length])


def embeddings_of(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def one_segment(rows, length):
    return np.ones((rows, length), np.int32), np.tile(np.arange(length, dtype=np.int32), (rows, 1))


def pack(sequences, rows, length):
    """Rows filled first-fit with embedding sequences, and the (row, slice) of each sequence."""
    embeddings = np.zeros((rows, length, sequences[0].shape[1]), np.float32)
    ids, positions = np.zeros((rows, length), np.int32), np.zeros((rows, length), np.int32)
    used, segments, places = [0] * rows, [0] * rows, []
    for sequence in sequences:
        row = next(r for r in range(rows) if used[r] + len(sequence) <= length)
        place = slice(used[row], used[row] + len(sequence))
        segments[row] += 1
        embeddings[row, place], ids[row, place], positions[row, place] = sequence, segments[row], range(len(sequence))
        used[row] += len(sequence)
        places.append((row, place))
    return (embeddings, ids, positions), places


def numpy_transformer(model, x):
    """The decoder on one whole sequence, float64 [T, D]."""
    config = model.config
    kernel = lambda linear: np.asarray(linear.kernel[...], np.float64)  # noqa: E731

    def norm(module, x):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_epsilon) * np.asarray(module.scale[...])

    def rotate(x):
        """Rotates each pair (i, i + head/2), as a complex number."""
        half = config.head_width // 2
        turns = np.outer(np.arange(len(x)), ROPE_THETA ** (-np.arange(half) / half))
        turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * turns)[:, None]
        return np.concatenate([turned.real, turned.imag], -1)

    x = x.astype(np.float64)
    for layer in layers_of(model):
        attention, mlp = layer.self_attn, layer.mlp
        y = norm(layer.pre_attention_norm, x)
        heads = lambda linear, y=y: (y @ kernel(linear)).reshape(len(y), -1, config.head_width)  # noqa: E731
        query, key, value = rotate(heads(attention.q_proj)), rotate(heads(attention.k_proj)), heads(attention.v_proj)
        key, value = (np.repeat(z, config.heads // config.kv_heads, axis=1) for z in (key, value))
        scores = np.einsum("thd,shd->hts", query, key) / np.sqrt(config.head_width)
        weights = np.exp(np.where(np.tri(len(x), dtype=bool), scores, -np.inf))
        weights /= weights.sum(-1, keepdims=True)
        x = x + np.einsum("hts,shd->thd", weights, value).reshape(len(x), -1) @ kernel(attention.o_proj)
        y = norm(layer.pre_mlp_norm, x)
        gate = y @ kernel(mlp.gate_proj)
        x = x + (gate / (1 + np.exp(-gate)) * (y @ kernel(mlp.up_proj))) @ kernel(mlp.down_proj)
    return norm(model.final_norm, x)


def test_equals_numpy_in_float64():
    sequences = [embeddings_of(length, 12, seed=length) for length in (5, 3, 8)]
    inputs, places = pack(sequences, 2, 10)
    hidden = run(MODEL, *inputs)
    for sequence, (row, place) in zip(sequences, places, strict=True):
        np.testing.assert_allclose(hidden[row, place], numpy_transformer(MODEL, sequence), rtol=1e-4, atol=2e-5)


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=6), data=st.data())
def test_a_sequences_states_are_the_same_padded_and_packed_in_any_order(lengths, data):
    sequences = [embeddings_of(length, 12, seed=i) for i, length in enumerate(lengths)]
    padded = np.zeros((6, 12, 12), np.float32)
    ids = (np.arange(12) < np.array(lengths + [0] * (6 - len(lengths)))[:, None]).astype(np.int32)
    for row, sequence in zip(padded, sequences, strict=False):
        row[: len(sequence)] = sequence
    alone = run(MODEL, padded, ids, one_segment(6, 12)[1])

    order = data.draw(st.permutations(range(len(lengths))))
    inputs, places = pack([sequences[i] for i in order], 6, 12)
    packed = run(MODEL, *inputs)
    for i, (row, place) in zip(order, places, strict=True):
        np.testing.assert_allclose(packed[row, place], alone[i, : lengths[i]], rtol=1e-5, atol=1e-5)


def test_a_sequences_states_are_the_same_packed_whatever_mixes_positions():
    model = make(MIXED)
    sequences = [embeddings_of(length, 12, seed=length) for length in (5, 3, 1, 6)]
    alone, places = pack(sequences, 4, 6)
    alone = run(model, *alone)
    packed, packed_places = pack(sequences, 2, 9)
    packed = run(model, *packed)
    for (row, place), (packed_row, packed_place) in zip(places, packed_places, strict=True):
        np.testing.assert_allclose(packed[packed_row, packed_place], alone[row, place], rtol=1e-5, atol=1e-5)


def test_padding_changes_nothing():
    sequence = embeddings_of(1, 5, 12)
    alone = MODEL(sequence, *one_segment(1, 5))
    inputs, _ = pack([sequence[0]], 6, 12)
    inputs[0][inputs[1] == 0] = 7.0
    np.testing.assert_allclose(run(MODEL, *inputs)[0, :5], alone[0], rtol=1e-5, atol=1e-5)


def test_a_later_item_changes_no_earlier_state():
    embeddings = embeddings_of(6, 12, 12)
    ids, positions = one_segment(6, 12)
    changed = embeddings.copy()
    changed[:, 7] += 1
    before, after = run(MODEL, embeddings, ids, positions), run(MODEL, changed, ids, positions)
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert (np.abs(before[:, 7:] - after[:, 7:]).max(axis=-1) > 1e-3).all()


def test_the_order_of_items_matters():
    embeddings = embeddings_of(1, 4, 12)
    swapped = embeddings[:, [1, 0, 2, 3]]
    states = [run(MODEL, x, *one_segment(1, 4))[0, -1] for x in (embeddings, swapped)]
    assert np.abs(states[0] - states[1]).max() > 1e-3


def test_only_distances_between_positions_matter():
    """With rotary positions a sequence has the same states wherever it begins."""
    embeddings = embeddings_of(1, 5, 12)
    ids, positions = one_segment(1, 5)
    np.testing.assert_allclose(
        run(MODEL, embeddings, ids, positions), run(MODEL, embeddings, ids, positions + 9), rtol=1e-4, atol=1e-4
    )


def test_grouped_query_attention_equals_repeated_heads():
    state = nnx.to_pure_dict(nnx.state(MODEL, nnx.Param))
    for name in ("k_proj", "v_proj"):
        kernel = state["layers"][0]["self_attn"][name]["kernel"].reshape(2, 12, 2, 6)
        state["layers"][0]["self_attn"][name]["kernel"] = jnp.repeat(kernel, 2, axis=2).reshape(2, 12, 24)
    full = Transformer(dataclasses.replace(CONFIG, kv_heads=CONFIG.heads), nnx.Rngs(0))
    params = nnx.state(full, nnx.Param)
    nnx.replace_by_pure_dict(params, state)
    nnx.update(full, params)
    inputs = (embeddings_of(1, 5, 12), *one_segment(1, 5))
    np.testing.assert_allclose(run(full, *inputs), run(MODEL, *inputs), rtol=1e-5, atol=1e-5)


def test_dropout_acts_only_if_it_is_given_random_keys():
    dropping = make(dataclasses.replace(CONFIG, dropout=0.5))
    inputs = (embeddings_of(1, 5, 12), *one_segment(1, 5))
    still = run(dropping, *inputs)
    np.testing.assert_array_equal(still, run(MODEL, *inputs))
    first, again, other = (dropping(*inputs, nnx.Rngs(dropout=seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    assert not np.allclose(first, still)


def test_bfloat16_computes_in_bfloat16_with_float32_parameters():
    narrow = make(dataclasses.replace(CONFIG, dtype="bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(narrow, nnx.Param))} == {jnp.dtype("float32")}
    inputs = (embeddings_of(2, 5, 12), *one_segment(2, 5))
    hidden = run(narrow, *inputs)
    assert hidden.dtype == jnp.bfloat16
    error = hidden.astype(np.float32) - run(MODEL, *inputs)
    assert 0 < np.sqrt((error**2).mean()) < 0.05


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"layers": 0}, "layers"),
        ({"kv_heads": 3}, "kv_heads"),
        ({"head_width": 5}, "head_width"),
        ({"dropout": 1.0}, "dropout"),
        ({"dtype": "float64"}, "dtype"),
        ({"remat": "some"}, "remat"),
        ({"attention": "flash"}, "attention"),
    ],
)
def test_an_impossible_shape_names_its_key(change, key):
    with pytest.raises(UserError, match=rf"^config\.backbone\.{key}: "):
        dataclasses.replace(CONFIG, **change)


DEEP = from_scratch_config(**SHAPE | {"layers": 6})


def gradients(model, inputs):
    """The gradients of the sum of squared states, with respect to the parameters and the embeddings."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, embeddings):
        return jnp.sum(nnx.merge(graphdef, params, rest)(embeddings, *inputs[1:]) ** 2)

    return jax.grad(loss, argnums=(0, 1))(params, inputs[0])


def test_scanned_layers_equal_layers_one_after_the_other():
    deep = make(DEEP)
    embeddings = embeddings_of(5, 12)
    np.testing.assert_allclose(
        run(deep, embeddings[None], *one_segment(1, 5))[0], numpy_transformer(deep, embeddings), rtol=1e-4, atol=2e-5
    )


@pytest.mark.parametrize("period", [(ATTENTION,), (DELTA_NET, CONVOLUTION, ATTENTION)])
def test_the_compiled_program_does_not_grow_with_depth(period):
    def lines(repeats):
        model = nnx.eval_shape(lambda: Transformer(mixed(*period * repeats), nnx.Rngs(0)))
        lowered = _compiled.lower(*nnx.split(model), embeddings_of(1, 4, 12), *one_segment(1, 4))
        return len(lowered.as_text().splitlines())

    assert lines(40) == lines(8)


@pytest.mark.parametrize(
    ("config", "remat"),
    [
        pytest.param(DEEP, "dots", marks=pytest.mark.slow),
        (DEEP, "full"),
        pytest.param(MIXED, "full", marks=pytest.mark.slow),
    ],
)
def test_remat_gives_the_same_gradients(config, remat):
    inputs = (embeddings_of(2, 5, 12), *one_segment(2, 5))
    expected = gradients(make(config), inputs)
    actual = gradients(make(dataclasses.replace(config, remat=remat)), inputs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), actual, expected)


def test_full_remat_needs_less_memory():
    def kept(remat):
        config = dataclasses.replace(from_scratch_config(**SHAPE | {"layers": 12}), remat=remat)
        inputs = (embeddings_of(8, 12, 12), *one_segment(8, 12))
        compiled = jax.jit(lambda x: gradients(make(config), (x, *inputs[1:]))[1]).lower(inputs[0]).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert kept("full") < 0.5 * kept("none")


def test_each_position_goes_through_its_own_experts():
    config = dataclasses.replace(CONFIG, experts=5, experts_per_token=2)
    moe = layers_of(make(config))[0].mlp
    x = embeddings_of(2, 3, 12)
    kernels = [np.asarray(part.kernel[...], np.float64) for part in (moe.gate_proj, moe.up_proj, moe.down_proj)]
    expected = np.zeros_like(x, np.float64)
    for where in np.ndindex(2, 3):
        logits = x[where] @ np.asarray(moe.router.kernel[...], np.float64)
        chosen = np.argsort(-logits)[:2]
        weights = np.exp(logits[chosen]) / np.exp(logits[chosen]).sum()
        for weight, expert in zip(weights, chosen, strict=True):
            gate, up, down = (kernel[expert] for kernel in kernels)
            inner = x[where] @ gate
            expected[where] += weight * ((inner / (1 + np.exp(-inner)) * (x[where] @ up)) @ down)
    np.testing.assert_allclose(moe(jnp.asarray(x), None), expected, rtol=1e-4, atol=1e-5)


def test_a_window_hides_older_positions():
    config = dataclasses.replace(CONFIG, layers=1, rope=CONFIG.rope[:1], windows=(3,))
    model = make(config)
    embeddings = embeddings_of(1, 8, 12)
    inputs = (embeddings, *one_segment(1, 8))
    changed = embeddings.copy()
    changed[0, 2] += 1
    moved = np.abs(run(model, *inputs) - run(model, changed, *inputs[1:])).max(axis=-1)[0] > 1e-6
    np.testing.assert_array_equal(moved, [False, False, True, True, True, False, False, False])
