"""Builds the catalog's semantic IDs from a dataset and a config, and caches them on disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Float
from ml_collections import ConfigDict

from simgr_jax.data.dataset import Dataset, Sequences
from simgr_jax.errors import UserError
from simgr_jax.semantic_ids import (
    collisions,
    product_quantization,
    quality,
    residual_kmeans,
    rqvae,
    saved_ids,
)
from simgr_jax.semantic_ids.codes import SemanticIds
from simgr_jax.workdir.atomic_write import atomic_path
from simgr_jax.workdir.cache import fingerprint, load_arrays

# Part of every fingerprint: increment it when the same inputs give different codes, or files of another form.
VERSION = 3
KEY = "config.semantic_ids"
EMBEDDINGS = ("tfidf", "text_encoder", "llm", "npy", "interactions")
QUANTIZERS = ("residual_kmeans", "rqvae", "opq", "pq")


def build(
    config: ConfigDict,
    dataset: Dataset,
    train: Sequences,
    cache_dir: Path,
    seed: int,
    readings: Float[np.ndarray, "N X"] | None = None,
) -> tuple[SemanticIds, dict[str, Any]]:
    """Returns the catalog's semantic IDs: the dataset's own, or fitted ones, which are cached.

    Args:
      config: `config.semantic_ids`.
      dataset: its texts or codes are used.
      train: the training sequences. Fits see no other interactions.
      cache_dir: where embeddings, codes and their quality reports are kept.
      seed: of every fit.
      readings: an LLM's readings of the items' texts, for "llm" in `config.embeddings.names`.

    Returns:
      The IDs, with a disambiguating level if `config.collisions` asks for one and codes collide; and the quality report
      (see `quality.report`) of the codes without that level.

    Raises:
      UserError: the config has an invalid value, or needs something that the dataset lacks.
    """
    _check_choice("source", config.source, ("fit", "given"))
    _check_choice("collisions", config.collisions, ("level", "keep"))
    if config.source == "given":
        if dataset.codes is None:
            raise UserError(
                f"{KEY}.source: is 'given', but dataset {dataset.name} comes without codes; set it to 'fit'"
            )
        codes, sizes = dataset.codes, tuple(dataset.codebook_sizes)
        report = quality.report(codes, sizes)
    else:
        _check_fit(config, dataset)
        fitted, report = _fit_cached(config, dataset, train, Path(cache_dir), seed, readings)
        codes, sizes = fitted.codes, fitted.codebook_sizes
    if config.collisions == "level" and report["collisions"]:
        codes, sizes = collisions.add_disambiguating_level(codes, sizes)
    return SemanticIds(codes, sizes), report


def reads_llm(config: ConfigDict) -> bool:
    """Whether codes are fitted to an LLM's readings of the items' texts."""
    return config.source == "fit" and "llm" in config.embeddings.names


def unread(config: ConfigDict) -> dict[str, str]:
    """The keys of `config.semantic_ids` without effect as the others are set, each with what would give it one."""
    found = {}
    if config.source == "given":
        return dict.fromkeys(_keys(config, ("source", "collisions")), f"{KEY}.source=fit")
    names = set(config.embeddings.names)
    embedders = {"dim": ("tfidf", "interactions"), "encoder": ("text_encoder",), "npy_path": ("npy",)}
    for key, readers in (embedders | {"window": ("interactions",)}).items():
        if not names & set(readers):
            found[f"embeddings.{key}"] = f"{readers[0]} in {KEY}.embeddings.names"
    if len(names) < 2:
        found["embeddings.weights"] = f"two names in {KEY}.embeddings.names"
    if config.quantizer.name != "rqvae":
        found |= {f"quantizer.rqvae.{key}": f"{KEY}.quantizer.name=rqvae" for key in config.quantizer.rqvae}
    return found


def _keys(config: ConfigDict, but: tuple[str, ...], prefix: str = "") -> list[str]:
    """All full keys, but for some."""
    keys = []
    for key, value in config.items():
        keys += _keys(value, (), f"{prefix}{key}.") if isinstance(value, ConfigDict) else [prefix + key]
    return [key for key in keys if key not in but]


def _fit_cached(config, dataset, train, cache_dir, seed, readings) -> tuple[SemanticIds, dict[str, Any]]:
    parts = [
        _embedding_fingerprint(name, config.embeddings, dataset, train, seed, readings)
        for name in config.embeddings.names
    ]
    quantizer = config.quantizer.to_dict()
    if quantizer["name"] != "rqvae":
        quantizer.pop("rqvae", None)
    file = cache_dir / f"codes-{fingerprint(VERSION, parts, list(_weights(config)), quantizer, seed)}.npz"
    if not file.exists():
        embeddings = _embeddings(config, dataset, train, cache_dir, seed, readings)
        logging.info("Fitting semantic IDs: %s, %d items", quantizer["name"], len(embeddings))
        codes, reconstruction = _quantize(config.quantizer, embeddings, seed)
        sizes = (config.quantizer.codebook_size,) * config.quantizer.levels
        report = quality.report(codes, sizes, embeddings, reconstruction)
        report["zero_embeddings"] = int((~embeddings.any(axis=1)).sum())
        saved_ids.write(file, SemanticIds(codes, sizes), report)
    return saved_ids.read(file)


def _embedding_fingerprint(
    name: str,
    config: ConfigDict,
    dataset: Dataset,
    train: Sequences,
    seed: int,
    readings: Float[np.ndarray, "N X"] | None,
) -> str:
    """Covers everything that embedding `name` depends on, and nothing else."""
    if name == "tfidf":
        return fingerprint(VERSION, name, dataset.item_texts, config.dim, seed)
    if name == "text_encoder":
        folder = Path(os.path.expanduser(config.encoder))
        model = folder if folder.is_dir() else config.encoder
        return fingerprint(VERSION, name, dataset.item_texts, model)
    if name == "llm":
        return fingerprint(VERSION, name, readings)
    if name == "npy":
        return fingerprint(VERSION, name, _npy_path(config), dataset.num_items)
    sequences = (train.values, train.offsets)
    return fingerprint(VERSION, name, *sequences, dataset.num_items, config.dim, config.window, seed)


def _embeddings(
    config: ConfigDict,
    dataset: Dataset,
    train: Sequences,
    cache_dir: Path,
    seed: int,
    readings: Float[np.ndarray, "N X"] | None,
) -> Float[np.ndarray, "N D"]:
    """float32 [N, D]: the named embeddings concatenated, each with rows of norm `weight` (or zero rows)."""
    from sklearn.preprocessing import normalize  # Takes seconds to import, as what imports it does.

    from simgr_jax.semantic_ids import interaction_embeddings, text_embeddings

    options = config.embeddings
    makers: dict[str, Callable[[], np.ndarray]] = {
        "tfidf": lambda: text_embeddings.tfidf_svd(dataset.item_texts, options.dim, seed),
        "text_encoder": lambda: text_embeddings.encode(dataset.item_texts, options.encoder, batch_size=64),
        "npy": lambda: text_embeddings.load_npy(_npy_path(options), dataset.num_items),
        "interactions": lambda: interaction_embeddings.cooccurrence(
            train, dataset.num_items, options.dim, seed, options.window
        ),
    }
    blocks = []
    for name, weight in zip(options.names, _weights(config), strict=True):
        if name == "llm":
            blocks.append(weight * normalize(readings))  # They are cached where they are made.
            continue
        path = cache_dir / f"{name}-{_embedding_fingerprint(name, options, dataset, train, seed, readings)}.npz"
        if not path.exists():
            logging.info("Making item embeddings: %s", name)
            embeddings = makers[name]()
            with atomic_path(path) as temporary:
                np.savez(temporary, embeddings=embeddings)
        blocks.append(weight * normalize(load_arrays(path)["embeddings"]))
    return np.concatenate(blocks, axis=1).astype(np.float32)


def _quantize(config: ConfigDict, embeddings: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    distinct = len(np.unique(embeddings, axis=0))
    if config.codebook_size > distinct:
        raise UserError(
            f"{KEY}.quantizer.codebook_size: is {config.codebook_size}, but the items have only {distinct} different "
            "embeddings; set it to far fewer, like 16, so that items share codes"
        )
    if config.name in ("opq", "pq") and config.levels > embeddings.shape[1]:
        raise UserError(
            f"{KEY}.quantizer.levels: is {config.levels}, but the embeddings have only {embeddings.shape[1]} "
            f"dimensions; set at most that many levels, or raise {KEY}.embeddings.dim"
        )
    arguments = (embeddings, config.levels, config.codebook_size, seed)
    if config.name == "rqvae":
        return rqvae.fit(*arguments, rqvae.Options(**config.rqvae.to_dict()))
    fits = {
        "residual_kmeans": residual_kmeans.fit,
        "opq": product_quantization.fit_opq,
        "pq": product_quantization.fit_pq,
    }
    return fits[config.name](*arguments)


def _check_fit(config: ConfigDict, dataset: Dataset) -> None:
    """Raises UserError for mistakes that show before any work is done."""
    names = config.embeddings.names
    if not names:
        raise UserError(f"{KEY}.embeddings.names: is empty; name one or more of {', '.join(EMBEDDINGS)}")
    for name in names:
        _check_choice("embeddings.names", name, EMBEDDINGS)
    if {"tfidf", "text_encoder", "llm"} & set(names) and dataset.item_texts is None:
        raise UserError(
            f"{KEY}.embeddings.names: {list(names)} needs item text, but dataset {dataset.name} has none; "
            "set it to ('interactions',), or to ('npy',) with your own embeddings"
        )
    _check_choice("quantizer.name", config.quantizer.name, QUANTIZERS)
    for key, least in (
        ("embeddings.dim", 1), ("embeddings.window", 1), ("quantizer.levels", 1), ("quantizer.codebook_size", 2)
    ):  # fmt: skip
        group, name = key.split(".")
        if config[group][name] < least:
            raise UserError(f"{KEY}.{key}: is {config[group][name]}; set it to at least {least}")
    if config.quantizer.name == "rqvae":
        for name, value in config.quantizer.rqvae.items():
            if (np.asarray(value) <= 0).any():
                raise UserError(f"{KEY}.quantizer.rqvae.{name}: is {value}; set it above 0")
    if config.quantizer.codebook_size > dataset.num_items:
        raise UserError(
            f"{KEY}.quantizer.codebook_size: is {config.quantizer.codebook_size}, but the catalog has only "
            f"{dataset.num_items} items; set it to far fewer, like 16, so that items share codes"
        )
    weights = _weights(config)
    if len(weights) != len(names) or not all(isinstance(weight, int | float) and weight > 0 for weight in weights):
        raise UserError(f"{KEY}.embeddings.weights: is {weights}; give a positive number for each of {list(names)}")


def _weights(config: ConfigDict) -> tuple[float, ...]:
    return tuple(config.embeddings.weights) or (1.0,) * len(config.embeddings.names)


def _npy_path(config: ConfigDict) -> Path:
    path = Path(os.path.expanduser(config.npy_path))
    if not config.npy_path or not path.is_file():
        raise UserError(f"{KEY}.embeddings.npy_path: no file {config.npy_path!r}; give the path of a .npy file")
    return path


def _check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{KEY}.{key}: {value!r} is unknown; choose from {', '.join(choices)}")
