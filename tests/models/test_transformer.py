"""The decoder against two independent references: plain numpy in float64, and Hugging Face's Llama."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from simgr_jax.errors import UserError
from simgr_jax.models.transformer import Transformer, TransformerConfig

CONFIG = TransformerConfig(
    width=12, layers=2, heads=4, kv_heads=2, head_width=6, mlp_width=20, rope_theta=50.0, norm_epsilon=1e-3
)


def make(config=CONFIG, seed=0):
    """A transformer whose parameters, also those that begin as ones, are all random and not small."""
    model = Transformer(config, nnx.Rngs(seed))
    generator = np.random.default_rng(seed)
    state = jax.tree.map(
        lambda x: jnp.asarray(generator.normal(1.0 if x.ndim == 1 else 0.0, 0.3, x.shape), jnp.float32),
        nnx.state(model, nnx.Param),
    )
    nnx.update(model, state)
    return model


MODEL = make()
_compiled = jax.jit(lambda graphdef, state, *inputs: nnx.merge(graphdef, state)(*inputs), static_argnums=0)


def run(model, embeddings, ids, positions):
    """The hidden states [B, T, D] of a batch filled up with padding to [6, 12, D]: one shape, compiled once."""
    rows, length = ids.shape
    fill = lambda x: np.pad(x, [(0, 6 - rows), (0, 12 - length)] + [(0, 0)] * (x.ndim - 2))  # noqa: E731
    return np.asarray(_compiled(*nnx.split(model), fill(embeddings), fill(ids), fill(positions))[:rows, :length])


def embeddings_of(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def one_segment(rows, length):
    return np.ones((rows, length), np.int32), np.tile(np.arange(length, dtype=np.int32), (rows, 1))


def pack(sequences, rows, length):
    """Rows filled first-fit with embedding sequences, and where each sequence went: (row, slice)."""
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
        """Each pair (i, i + head/2) as a complex number, turned."""
        half = config.head_width // 2
        turns = np.outer(np.arange(len(x)), config.rope_theta ** (-np.arange(half) / half))
        turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * turns)[:, None]
        return np.concatenate([turned.real, turned.imag], -1)

    x = x.astype(np.float64)
    for layer in model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        y = norm(layer.input_layernorm, x)
        heads = lambda linear, y=y: (y @ kernel(linear)).reshape(len(y), -1, config.head_width)  # noqa: E731
        query, key, value = rotate(heads(attention.q_proj)), rotate(heads(attention.k_proj)), heads(attention.v_proj)
        key, value = (np.repeat(z, config.heads // config.kv_heads, axis=1) for z in (key, value))
        scores = np.einsum("thd,shd->hts", query, key) / np.sqrt(config.head_width)
        weights = np.exp(np.where(np.tri(len(x), dtype=bool), scores, -np.inf))
        weights /= weights.sum(-1, keepdims=True)
        x = x + np.einsum("hts,shd->thd", weights, value).reshape(len(x), -1) @ kernel(attention.o_proj)
        y = norm(layer.post_attention_layernorm, x)
        gate = y @ kernel(mlp.gate_proj)
        x = x + (gate / (1 + np.exp(-gate)) * (y @ kernel(mlp.up_proj))) @ kernel(mlp.down_proj)
    return norm(model.norm, x)


def test_equals_numpy_in_float64():
    sequences = [embeddings_of(length, 12, seed=length) for length in (5, 3, 8)]
    inputs, places = pack(sequences, 2, 10)
    hidden = run(MODEL, *inputs)
    for sequence, (row, place) in zip(sequences, places, strict=True):
        np.testing.assert_allclose(hidden[row, place], numpy_transformer(MODEL, sequence), rtol=1e-4, atol=2e-5)


@pytest.fixture(scope="module")
def llama():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.LlamaModel(
        transformers.LlamaConfig(
            vocab_size=2,
            hidden_size=CONFIG.width,
            intermediate_size=CONFIG.mlp_width,
            num_hidden_layers=CONFIG.layers,
            num_attention_heads=CONFIG.heads,
            num_key_value_heads=CONFIG.kv_heads,
            head_dim=CONFIG.head_width,
            rms_norm_eps=CONFIG.norm_epsilon,
            rope_parameters={"rope_type": "default", "rope_theta": CONFIG.rope_theta},
            attn_implementation="eager",
        )
    )
    names = {"kernel": "weight", "scale": "weight"}
    weights = {}
    for path, leaf in nnx.to_flat_state(nnx.state(MODEL, nnx.Param)):
        name = ".".join(str(names.get(part, part)) for part in path)
        weights[name] = torch.tensor(np.array(leaf[...]).T)
    # Strict: every name of ours is one of theirs, and only the token embeddings are not ours.
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["embed_tokens.weight"], [])
    return model.eval()


def test_equals_hugging_face_llama_padded_and_packed(llama):
    import torch

    lengths = (6, 2, 4)
    padded = embeddings_of(3, 6, 12)
    real = np.arange(6) < np.array(lengths)[:, None]
    with torch.no_grad():
        expected = llama(inputs_embeds=torch.tensor(padded), attention_mask=torch.tensor(real.astype(np.int64)))
    expected = expected.last_hidden_state.numpy()

    positions = one_segment(3, 6)[1]
    ours = run(MODEL, padded, real.astype(np.int32), positions)
    np.testing.assert_allclose(ours[real], expected[real], atol=1e-5)

    inputs, places = pack([padded[i, :length] for i, length in enumerate(lengths)], 1, 12)
    packed = run(MODEL, *inputs)
    for i, (row, place) in enumerate(places):
        np.testing.assert_allclose(packed[row, place], expected[i, : lengths[i]], atol=1e-5)


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
    """Rotary positions: the same states wherever the sequence begins."""
    embeddings = embeddings_of(1, 5, 12)
    ids, positions = one_segment(1, 5)
    np.testing.assert_allclose(
        run(MODEL, embeddings, ids, positions), run(MODEL, embeddings, ids, positions + 9), rtol=1e-4, atol=1e-4
    )


def test_grouped_query_attention_equals_repeated_heads():
    full = make(dataclasses.replace(CONFIG, kv_heads=CONFIG.heads))
    for grouped_layer, full_layer in zip(MODEL.layers, full.layers, strict=True):
        for name in ("k_proj", "v_proj"):
            kernel = getattr(grouped_layer.self_attn, name).kernel[...].reshape(12, 2, 6)
            getattr(full_layer.self_attn, name).kernel[...] = jnp.repeat(kernel, 2, axis=1).reshape(12, 24)
        for name in ("q_proj", "o_proj"):
            getattr(full_layer.self_attn, name).kernel[...] = getattr(grouped_layer.self_attn, name).kernel[...]
        for name in ("mlp", "input_layernorm", "post_attention_layernorm"):
            nnx.update(getattr(full_layer, name), nnx.state(getattr(grouped_layer, name)))
    nnx.update(full.norm, nnx.state(MODEL.norm))
    inputs = (embeddings_of(1, 5, 12), *one_segment(1, 5))
    np.testing.assert_allclose(run(full, *inputs), run(MODEL, *inputs), rtol=1e-5, atol=1e-5)


def test_dropout_acts_only_where_it_is_given_randomness():
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
    ],
)
def test_an_impossible_shape_names_its_key(change, key):
    with pytest.raises(UserError, match=rf"^config\.backbone\.{key}: "):
        dataclasses.replace(CONFIG, **change)
