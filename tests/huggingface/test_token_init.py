import json

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config

from simgr_jax.errors import UserError
from simgr_jax.huggingface.checkpoint import Checkpoint
from simgr_jax.huggingface.llm_tokenizer import load_tokenizer
from simgr_jax.huggingface.token_init import from_mean, from_readings, from_words

WIDTH, VOCABULARY = 16, 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder with a BPE tokenizer and embeddings of uneven spread; these tests read no other weights."""
    folder = tmp_path_factory.mktemp("llm")
    Qwen2Config(vocab_size=40, hidden_size=WIDTH, num_attention_heads=2).save_pretrained(folder)
    generator = np.random.default_rng(0)
    embedding = 3 + generator.normal(size=(40, WIDTH)) * np.linspace(0.1, 2, WIDTH)
    save_file({"model.embed_tokens.weight": embedding.astype(np.float32)}, folder / "model.safetensors")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, show_progress=False)
    tokenizer.train_from_iterator(["red wool blue wool lamp chair lamp"] * 9, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def embedding_of(folder):
    return Checkpoint(folder).read("model.embed_tokens.weight").astype(np.float64)


def test_new_tokens_are_one_token_each_and_come_after_the_others(folder):
    plain, extended = load_tokenizer(folder), load_tokenizer(folder, ["<a_0>", "<a_1>", "<b_0>"])
    red, lamp = plain("red").input_ids, plain("lamp").input_ids
    size = len(plain)
    assert extended("red<a_1><b_0>lamp").input_ids == [*red, size + 1, size + 2, *lamp]


def test_existing_tokens_are_not_added_again(folder, tmp_path):
    load_tokenizer(folder, ["<a_0>"]).save_pretrained(tmp_path)
    assert len(load_tokenizer(tmp_path, ["<a_0>", "<a_1>"])) == len(load_tokenizer(folder)) + 2


@pytest.mark.parametrize("broken", ["missing", "garbage"])
def test_a_tokenizer_that_cannot_be_read_is_refused_in_one_line(tmp_path, broken):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    if broken == "garbage":
        (tmp_path / "tokenizer.json").write_text("{")
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(UserError, match="copy the model's tokenizer files there") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_draws_around_the_mean_with_each_dimensions_spread(folder):
    existing, drawn = embedding_of(folder), from_mean(Checkpoint(folder), 4000, seed=0)
    np.testing.assert_allclose(drawn.mean(axis=0), existing.mean(axis=0), atol=0.15)
    np.testing.assert_allclose(drawn.std(axis=0), existing.std(axis=0), rtol=0.05)
    np.testing.assert_array_equal(drawn, from_mean(Checkpoint(folder), 4000, seed=0))


def test_tokens_begin_at_the_words_of_their_items(folder):
    """After standardisation, each token's vector is the mean over its items of the mean of their words."""
    texts = ["red wool", "blue wool wool", "", "chair lamp"]
    tokens = np.array([[0, 3], [1, 3], [2, 4], [1, 4]])
    start = from_words(Checkpoint(folder), load_tokenizer(folder), texts, tokens, vocab_size=6, seed=0)

    existing, tokenizer = embedding_of(folder), load_tokenizer(folder)
    items = [existing[tokenizer(text).input_ids].mean(axis=0) if text else None for text in texts]
    expected = np.stack([items[0], (items[1] + items[3]) / 2, (items[0] + items[1]) / 2, items[3]])
    carried = [0, 1, 3, 4]
    standardised = (expected - expected.mean(axis=0)) / expected.std(axis=0)
    np.testing.assert_allclose(
        start[carried], existing.mean(axis=0) + standardised * existing.std(axis=0), rtol=1e-3, atol=1e-3
    )
    # Token 2's only item has no text; token 5 has no items.
    np.testing.assert_array_equal(start[[2, 5]], from_mean(Checkpoint(folder), 6, seed=0)[[2, 5]])


def test_control_tokens_in_the_texts_are_read_as_text(folder):
    tokens = np.arange(3)[:, None]
    tokenizer = load_tokenizer(folder, ["<wool>"])
    start, expected = (
        from_words(Checkpoint(folder), tokenizer, [text, "red", "chair lamp"], tokens, vocab_size=3, seed=0)
        for text in ("blue <wool>", "blue < wool>")
    )
    np.testing.assert_array_equal(start, expected)


def test_a_catalog_without_words_is_refused(folder):
    with pytest.raises(UserError, match=r"^config\.backbone\.token_init: "):
        from_words(Checkpoint(folder), load_tokenizer(folder), ["", ""], np.zeros((2, 1), int), 1, seed=0)


def test_readings_are_fitted_by_the_mean_of_an_items_codes(folder):
    """Readings that codes can express are met up to their scale, which is that of the LLM's embeddings."""
    generator = np.random.default_rng(0)
    tokens = np.stack([generator.integers(0, 4, 90), 4 + generator.integers(0, 4, 90)], axis=1)
    truth = generator.normal(size=(9, WIDTH))  # Token 8 has no item.
    readings = truth[tokens].mean(axis=1).astype(np.float32)
    start = from_readings(Checkpoint(folder), readings, tokens, 9)
    means = start[tokens].mean(axis=1)
    scale = (means * readings).sum() / np.square(readings).sum()
    np.testing.assert_allclose(means, scale * readings, atol=0.02 * np.abs(means).max())
    assert not start[8].any()
    spread = embedding_of(folder).std(axis=0)
    np.testing.assert_allclose(np.sqrt(np.square(start).mean()), np.sqrt(np.square(spread).mean()), rtol=1e-5)


def test_readings_of_another_width_are_cut_or_filled(folder):
    tokens = np.arange(6)[:, None]
    wide, narrow = (np.random.default_rng(0).normal(size=(6, width)).astype(np.float32) for width in (WIDTH + 3, 5))
    found = from_readings(Checkpoint(folder), wide, tokens, 6)
    np.testing.assert_allclose(found / found[0, 0], wide[:, :WIDTH] / wide[0, 0], rtol=1e-3)
    assert not from_readings(Checkpoint(folder), narrow, tokens, 6)[:, 5:].any()
