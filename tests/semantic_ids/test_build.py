"""Builds semantic IDs from a dataset and a config."""

import dataclasses
import json

import numpy as np
import pytest
from ml_collections import ConfigDict

from simgr_jax.data.dataset import Dataset, Sequences
from simgr_jax.errors import UserError
from simgr_jax.semantic_ids import build as build_module
from simgr_jax.semantic_ids import text_embeddings
from simgr_jax.semantic_ids.build import build

WORDS = ("red green blue steel wood glass hammer saw lamp chair table cup plate brush soap towel").split()  # noqa: SIM905
RNG = np.random.default_rng(0)
SEQUENCES = [RNG.integers(0, 120, RNG.integers(3, 12)) for _ in range(200)]
TRAIN = Sequences.from_lists([sequence[:-2] for sequence in SEQUENCES if len(sequence) > 3])
DATASET = Dataset(
    name="toy",
    user_ids=[str(i) for i in range(200)],
    item_ids=[str(i) for i in range(120)],
    sequences=Sequences.from_lists(SEQUENCES),
    item_texts=["", "", ""] + [" ".join(RNG.choice(WORDS, 6)) for _ in range(117)],
)


def make_config(**overrides) -> ConfigDict:
    config = ConfigDict({
        "source": "fit",
        "collisions": "level",
        "embeddings": {
            "names": ("tfidf",), "weights": (), "dim": 16, "encoder": "", "npy_path": "", "window": 3
        },
        "quantizer": {
            "name": "opq", "levels": 3, "codebook_size": 8,
            "rqvae": {
                "steps": 300, "learning_rate": 3e-3, "hidden_widths": (16,), "latent_dim": 4, "commitment": 0.25,
                "batch_size": 64,
            },
        },
    })  # fmt: skip
    config.update_from_flattened_dict(overrides)
    return config


@pytest.mark.parametrize("quantizer", ["opq", "pq", "residual_kmeans", pytest.param("rqvae", marks=pytest.mark.slow)])
@pytest.mark.parametrize("names", [("tfidf",), ("interactions",), ("tfidf", "interactions")])
def test_every_quantizer_works_with_every_embedding(tmp_path, quantizer, names):
    config = make_config(**{"quantizer.name": quantizer, "embeddings.names": names})
    ids, report = build(config, DATASET, TRAIN, tmp_path, seed=0)
    assert ids.codes.dtype == np.int32
    assert report["collisions"] > 0  # at least the items without text collide, or codes are too few
    assert ids.codes.shape == (120, 4)
    assert len(np.unique(ids.codes, axis=0)) == 120
    assert (ids.codes < np.array(ids.codebook_sizes)).all()
    assert report["relative_mse"] < 1


def test_collisions_may_be_kept(tmp_path):
    ids, report = build(make_config(collisions="keep"), DATASET, TRAIN, tmp_path, seed=0)
    assert ids.codes.shape == (120, 3)
    assert len(np.unique(ids.codes, axis=0)) == report["distinct_ids"] < 120


def test_second_build_reads_the_cache(tmp_path, monkeypatch):
    first, report = build(make_config(), DATASET, TRAIN, tmp_path, seed=0)

    def refuse(*_):
        raise AssertionError("fitted again")

    monkeypatch.setattr(build_module, "_embeddings", refuse)
    monkeypatch.setattr(build_module, "_quantize", refuse)
    second, report_again = build(make_config(), DATASET, TRAIN, tmp_path, seed=0)
    np.testing.assert_array_equal(first.codes, second.codes)
    assert first.codebook_sizes == second.codebook_sizes
    assert report == report_again
    # Only options that these codes depend on cause another fit.
    build(make_config(**{"quantizer.rqvae.steps": 7, "embeddings.window": 9}), DATASET, TRAIN, tmp_path, seed=0)
    for change in ({"quantizer.levels": 2}, {"embeddings.dim": 8}, {"embeddings.weights": (2.0,)}):
        with pytest.raises(AssertionError, match="fitted again"):
            build(make_config(**change), DATASET, TRAIN, tmp_path, seed=0)
    with pytest.raises(AssertionError, match="fitted again"):
        build(make_config(), DATASET, TRAIN, tmp_path, seed=1)


def test_another_quantizer_reuses_the_embeddings(tmp_path, monkeypatch):
    build(make_config(), DATASET, TRAIN, tmp_path, seed=0)
    monkeypatch.setattr(text_embeddings, "tfidf_svd", None)
    build(make_config(**{"quantizer.name": "pq"}), DATASET, TRAIN, tmp_path, seed=0)


def test_cache_holds_only_plain_arrays_and_json(tmp_path):
    _, report = build(make_config(), DATASET, TRAIN, tmp_path, seed=0)
    (codes,) = tmp_path.glob("codes-*.npz")
    assert set(np.load(codes, allow_pickle=False)) == {"codes", "codebook_sizes", "report"}
    (quality,) = tmp_path.glob("codes-*.json")
    assert json.loads(quality.read_text()) == report
    assert not list(tmp_path.glob(".*"))


def test_fits_see_only_the_training_interactions(tmp_path):
    config = make_config(**{"embeddings.names": ("interactions",)})
    first, _ = build(config, DATASET, TRAIN, tmp_path / "a", seed=0)
    shuffled = Sequences(DATASET.sequences.values[::-1].copy(), DATASET.sequences.offsets)
    other = Dataset("toy", DATASET.user_ids, DATASET.item_ids, shuffled)
    second, _ = build(config, other, TRAIN, tmp_path / "b", seed=0)
    np.testing.assert_array_equal(first.codes, second.codes)


def test_embeddings_are_scaled_by_their_weights_and_npy_files_hashed_by_content(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.random.default_rng(0).standard_normal((120, 6)))
    overrides = {"embeddings.names": ("npy", "interactions"), "embeddings.npy_path": str(path)}
    config = make_config(**overrides, **{"embeddings.weights": (2.0, 0.5)})
    embeddings = build_module._embeddings(config, DATASET, TRAIN, tmp_path, seed=0, readings=None)
    norms = np.linalg.norm(embeddings[:, :6], axis=1), np.linalg.norm(embeddings[:, 6:], axis=1)
    np.testing.assert_allclose(norms[0], 2, rtol=1e-5)
    np.testing.assert_allclose(norms[1][norms[1] > 0], 0.5, rtol=1e-5)
    first, _ = build(config, DATASET, TRAIN, tmp_path, seed=0)
    np.save(path, np.random.default_rng(1).standard_normal((120, 6)))
    second, _ = build(config, DATASET, TRAIN, tmp_path, seed=0)
    assert (first.codes[:, :3] != second.codes[:, :3]).any()  # the file's contents count, not its name


def test_npy_embeddings_are_not_cached_for_another_catalog(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    np.save(tmp_path / "x.npy", RNG.normal(size=(120, 6)).astype(np.float32))
    config = make_config(**{"embeddings.names": ("npy",), "embeddings.npy_path": "~/x.npy"})
    build(config, DATASET, TRAIN, tmp_path / "cache", seed=0)
    smaller = dataclasses.replace(DATASET, item_ids=DATASET.item_ids[:100], item_texts=DATASET.item_texts[:100])
    with pytest.raises(UserError, match="120"):
        build(config, smaller, TRAIN, tmp_path / "cache", seed=0)


def test_given_codes_are_used_unchanged(tmp_path):
    codes = np.array([[0, 1], [2, 1], [0, 1]], np.int32)
    dataset = Dataset("given", ["u"], ["x", "y", "z"], TRAIN, codes=codes, codebook_sizes=(3, 2))
    kept, report = build(make_config(source="given", collisions="keep"), dataset, TRAIN, tmp_path, seed=0)
    np.testing.assert_array_equal(kept.codes, codes)
    assert kept.codebook_sizes == (3, 2)
    assert report["collisions"] == 1
    unique, _ = build(make_config(source="given"), dataset, TRAIN, tmp_path, seed=0)
    np.testing.assert_array_equal(unique.codes, [[0, 1, 0], [2, 1, 0], [0, 1, 1]])
    assert unique.codebook_sizes == (3, 2, 2)


def test_unique_codes_get_no_further_level(tmp_path):
    codes = np.array([[0, 1], [2, 1]], np.int32)
    dataset = Dataset("given", ["u"], ["x", "y"], TRAIN, codes=codes, codebook_sizes=(3, 2))
    ids, _ = build(make_config(source="given"), dataset, TRAIN, tmp_path, seed=0)
    np.testing.assert_array_equal(ids.codes, codes)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"source": "gven"}, r"config\.semantic_ids\.source: 'gven' is unknown; choose from fit, given"),
        ({"source": "given"}, r"config\.semantic_ids\.source: .* comes without codes"),
        ({"collisions": "drop"}, r"config\.semantic_ids\.collisions: 'drop' is unknown"),
        ({"quantizer.name": "vq"}, r"config\.semantic_ids\.quantizer\.name: 'vq' is unknown"),
        (
            {"quantizer.codebook_size": 121},
            r"config\.semantic_ids\.quantizer\.codebook_size: is 121, but the catalog has only",
        ),
        ({"quantizer.codebook_size": 119}, r"codebook_size: is 119, but the items have only 118 different"),
        ({"quantizer.codebook_size": 1}, r"codebook_size: is 1; set it to at least 2"),
        ({"quantizer.name": "rqvae", "quantizer.rqvae.steps": 0}, r"quantizer\.rqvae\.steps: is 0; set it above 0"),
        ({"quantizer.name": "rqvae", "quantizer.rqvae.hidden_widths": (8, 0)}, r"rqvae\.hidden_widths: is \(8, 0\)"),
        ({"quantizer.levels": 0}, r"quantizer\.levels: is 0; set it to at least 1"),
        ({"quantizer.levels": 17}, r"quantizer\.levels: is 17, but the embeddings have only 16 dimensions"),
        ({"embeddings.dim": 0}, r"embeddings\.dim: is 0"),
        ({"embeddings.window": 0}, r"embeddings\.window: is 0"),
        ({"embeddings.names": ()}, r"embeddings\.names: is empty"),
        ({"embeddings.names": ("bm25",)}, r"embeddings\.names: 'bm25' is unknown; choose from tfidf"),
        ({"embeddings.weights": (1.0, 2.0)}, r"embeddings\.weights: .* a positive number for each"),
        ({"embeddings.weights": (0.0,)}, r"embeddings\.weights: .* a positive number for each"),
        ({"embeddings.weights": ("a",)}, r"embeddings\.weights: .* a positive number for each"),
        ({"embeddings.names": ("npy",)}, r"embeddings\.npy_path: no file"),
        ({"embeddings.names": ("npy",), "embeddings.npy_path": "none.npy"}, r"npy_path: no file 'none.npy'"),
    ],
)
def test_mistakes_in_the_config_are_named(tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        build(make_config(**overrides), DATASET, TRAIN, tmp_path, seed=0)


def test_text_embeddings_need_text(tmp_path):
    dataset = Dataset("bare", DATASET.user_ids, DATASET.item_ids, DATASET.sequences)
    with pytest.raises(UserError, match=r"needs item text, but dataset bare has none.*interactions"):
        build(make_config(), dataset, TRAIN, tmp_path, seed=0)
