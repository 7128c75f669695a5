"""The LLM's readings of item texts: mean states, whitened."""

import shutil

import jax
import ml_collections
import numpy as np
import pytest
from flax import nnx
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from simgr_jax.default_config import get_config
from simgr_jax.errors import UserError
from simgr_jax.huggingface import families, item_reader
from simgr_jax.huggingface.checkpoint import Checkpoint
from simgr_jax.huggingface.item_reader import ItemReader, fit_whitening
from simgr_jax.huggingface.load_weights import load_transformer, read_input_rows
from simgr_jax.models import lora
from tests.huggingface.make_golden import GOLDEN

WORDS = ["[BOS]", "red", "blue", "wool", "lamp", "chair"]
TEXTS = ["red wool lamp", "", "chair", "blue wool lamp chair red", " ".join(["red", "lamp"] * 9), "blue lamp"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama whose tokenizer knows five words."""
    folder = tmp_path_factory.mktemp("llm") / "llama"
    shutil.copytree(GOLDEN / "llama", folder)
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[BOS]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def make_reader(folder, cache, **changes):
    config = ml_collections.ConfigDict({**get_config().item_reader, **changes})
    return ItemReader(Checkpoint(folder), config, "float32", TEXTS, cache)


@pytest.mark.parametrize(("depth", "layers", "max_tokens"), [(1.0, 2, 64), (0.25, 1, 4)])
def test_a_reading_is_the_mean_state_of_the_texts_tokens_without_the_first(folder, tmp_path, depth, layers, max_tokens):
    readings = make_reader(folder, tmp_path, depth=depth, max_tokens=max_tokens, whitening=0.0).readings()
    checkpoint = Checkpoint(folder)
    config = families.transformer_config(checkpoint.config, max_length=20).first_layers(layers)
    model = jax.jit(load_transformer(checkpoint, config, "float32").__call__)
    expected = []
    for text in TEXTS:
        tokens = [WORDS.index(word) for word in text.split()][:max_tokens]
        if not tokens:
            expected.append(np.zeros(config.width))
            continue
        padded = read_input_rows(checkpoint, tokens + [0] * (20 - len(tokens)))[None]
        positions = np.arange(20)[None]
        states = model(padded, (positions < len(tokens)).astype(int), positions)[0, : len(tokens)]
        expected.append(np.asarray(states[1:] if len(tokens) > 1 else states, np.float64).mean(axis=0))
    expected = np.stack(expected)
    expected = fit_whitening(expected, 0.0)(expected)
    np.testing.assert_allclose(readings @ readings.T, expected @ expected.T, atol=1e-4)


def test_states_are_read_once(folder, tmp_path, monkeypatch):
    first = make_reader(folder, tmp_path).readings()
    monkeypatch.setattr(item_reader, "load_transformer", None)
    np.testing.assert_array_equal(make_reader(folder, tmp_path).readings(), first)
    # How they are whitened does not change what was read; what is read does.
    assert not np.array_equal(make_reader(folder, tmp_path, whitening=1.0).readings(), first)
    with pytest.raises(TypeError, match="not callable"):
        make_reader(folder, tmp_path, max_tokens=2).readings()


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_whitening_centers_and_evens_the_directions_out(power):
    generator = np.random.default_rng(0)
    states = (5 + generator.normal(size=(50, 8)) * np.arange(1, 9)).astype(np.float32)
    states[:, 3] = 2 * states[:, 4]  # The states have rank 7.
    states[7] = 0  # An item without text.
    centered = np.delete(states, 7, axis=0).astype(np.float64)
    centered -= centered.mean(axis=0)
    left, deviations, _ = np.linalg.svd(centered / 7, full_matrices=False)
    expected = left[:, :7] * deviations[:7] ** (1 - power)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)

    whitened = fit_whitening(states, power)(states)
    assert not whitened[7].any()
    rest = np.delete(whitened, 7, axis=0)
    np.testing.assert_allclose(np.abs(rest[:, :7]), np.abs(expected), atol=1e-4)
    np.testing.assert_allclose(rest @ rest.T, expected @ expected.T, atol=1e-4)


def test_a_target_that_the_reader_lacks_is_said_to_be_the_readers(folder, tmp_path):
    adapters = lora.LoRAConfig(2, 4.0, ("c_attn",), 0.0)
    with pytest.raises(
        UserError, match=r"^config\.lora\.targets: the LLM of config\.item_reader has no projection c_attn"
    ):
        make_reader(folder, tmp_path).text_reader(64, adapters, nnx.Rngs(0), dtype="float32", remat="none")
