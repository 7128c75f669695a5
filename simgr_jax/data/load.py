"""Loads and splits the dataset that `config.data` names, and caches what was read."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import ml_collections
import numpy as np

from simgr_jax.data import splits, synthetic
from simgr_jax.data.dataset import Dataset, Sequences, Split
from simgr_jax.data.interactions import filter_k_core, from_frame
from simgr_jax.data.readers import lcrec_files, log, minionerec, p5, recbole
from simgr_jax.errors import UserError
from simgr_jax.workdir.atomic_write import atomic_path
from simgr_jax.workdir.cache import fingerprint, load_arrays

FORMATS = ("p5", "lcrec", "minionerec", "recbole", "log", "amazon_reviews", "synthetic")
SPLITS = ("leave_one_out", "temporal", "given")

# Part of the cache key: increment it when the readers' results change.
PREPARED_VERSION = 3
# The fields of a dataset that are stored as JSON.
_STRINGS = ("name", "user_ids", "item_ids", "item_texts", "codebook_sizes", "notes")


def load(config: ml_collections.ConfigDict, cache_dir: Path) -> tuple[Dataset, Split]:
    """Reads and splits the data that `config.data` names.

    Args:
      config: `config.data`: `format` (see FORMATS), `path` (a folder, or the file of a log), `name` ("" takes the
        folder's), `k_core` (0 keeps everything), `split` (see SPLITS), `validation_fraction` and `test_fraction` (of a
        temporal split), and the options of single formats: `log` and `recbole` (arguments of their readers'
        `read`), `amazon_reviews` (`version`, `category`), `synthetic` (arguments of `synthetic.ensure`).
      cache_dir: where prepared data is kept, under a hash of the files' contents and the options that affect it.

    Raises:
      UserError: a config value is unknown or out of range, or a reader or split finds a problem.
    """
    for key, known in (("format", FORMATS), ("split", SPLITS)):
        if config[key] not in known:
            raise UserError(f"config.data.{key}: {config[key]!r} is unknown; choose from {', '.join(known)}")
    if config.k_core < 0:
        raise UserError(f"config.data.k_core: {config.k_core} is negative; use 0 to keep everything")
    source = _source(config, cache_dir)
    key = fingerprint(PREPARED_VERSION, config.format, config.k_core, source.arguments, *source.files)
    path = cache_dir / f"dataset-{key}.npz"
    if path.exists():
        dataset = _load_dataset(path)
    else:
        dataset = source.read()
        _save_dataset(path, dataset)
    dataset = dataclasses.replace(dataset, name=config.name or source.name)
    for note in dataset.notes:
        logging.getLogger(__name__).warning("%s: %s", dataset.name, note)
    if dataset.timestamps is None and _is_sorted_by_id(dataset):
        logging.getLogger(__name__).warning(
            "config.data.path: every user's items in %s are sorted by id; check that this is their order in time, "
            "because models learn and are evaluated in that order",
            dataset.name,
        )
    if config.split == "temporal":
        return dataset, splits.temporal(dataset, config.validation_fraction, config.test_fraction)
    return dataset, getattr(splits, config.split)(dataset)


def _is_sorted_by_id(dataset: Dataset) -> bool:
    """Whether every user's items are sorted by id, with enough users to rule out chance."""
    place_of_item = np.argsort(np.argsort(np.array(dataset.item_ids)))
    places, is_first = place_of_item[dataset.sequences.values], np.zeros(len(dataset.sequences.values), bool)
    is_first[dataset.sequences.offsets[:-1][dataset.sequences.lengths > 0]] = True
    descends = (np.diff(places) < 0) & ~is_first[1:]
    return np.count_nonzero(dataset.sequences.lengths > 1) >= 100 and not descends.any()


def _synthetic_folder(config: ml_collections.ConfigDict, cache_dir: Path) -> Path:
    """The folder of the synthetic data."""
    if config.path:
        return Path(os.path.expanduser(config.path))
    return cache_dir / f"synthetic-{fingerprint(config.synthetic.to_dict())}"


def oracle_folder(config: ml_collections.ConfigDict, cache_dir: Path) -> Path | None:
    """The folder of the synthetic data, whose true next-item distribution is known. None for other data.

    Also None with k-core filtering: the oracle knows only the generator's whole catalog.
    """
    return _synthetic_folder(config, cache_dir) if config.format == "synthetic" and not config.k_core else None


@dataclasses.dataclass(frozen=True)
class _Source:
    """Data to read. `read()` depends only on `files`, `arguments` and `config.data.k_core`."""

    name: str
    files: list[Path]
    arguments: dict
    read: Callable[[], Dataset]


def _source(config: ml_collections.ConfigDict, cache_dir: Path) -> _Source:
    if config.format == "synthetic":
        arguments = config.synthetic.to_dict()
        path = _synthetic_folder(config, cache_dir)
        synthetic.ensure(path, **arguments)
        return dataclasses.replace(_sequences(p5, path, config.k_core), name="synthetic")
    if not config.path:
        what = "the log file" if config.format == "log" else "the folder with the dataset's files"
        raise UserError(f"config.data.path: not set; set it to {what}")
    path = Path(os.path.expanduser(config.path))
    match config.format:
        case "p5":
            return _sequences(p5, path, config.k_core)
        case "lcrec":
            return _sequences(lcrec_files, path, config.k_core)
        case "minionerec":
            return _sequences(minionerec, path, config.k_core)
        case "recbole":
            name, arguments = path.resolve().name, config.recbole.to_dict()
            return _Source(
                name, recbole.files(path), arguments, lambda: recbole.read(path, name, config.k_core, **arguments)
            )
        case "log":
            arguments = config.log.to_dict()
            files = log.files(path, arguments["items_file"])
            return _Source(path.stem, files, arguments, lambda: log.read(path, path.stem, config.k_core, **arguments))
        case "amazon_reviews":
            return _amazon_reviews(path, config)


def _sequences(reader: ModuleType, path: Path, k_core: int) -> _Source:
    """The source of a format that stores one sequence per user."""
    name = path.resolve().name

    def read() -> Dataset:
        dataset = reader.read(path, name)
        return filter_k_core(dataset, k_core) if k_core else dataset

    return _Source(name, reader.files(path), {}, read)


def _amazon_reviews(path: Path, config: ml_collections.ConfigDict) -> _Source:
    version, category = config.amazon_reviews.version, config.amazon_reviews.category
    name = f"amazon_{version}_{category}"

    def read() -> Dataset:
        from simgr_jax.data import amazon  # TFDS takes seconds to import

        frame, item_texts = amazon.read(path, version, category)
        return from_frame(frame, name, config.k_core, item_texts)

    # Only the raw files that the user put there: downloaded files never change.
    raw_files = sorted(file for file in path.glob(f"*{category.removesuffix('_5')}*") if file.is_file())
    return _Source(name, raw_files, {"version": version, "category": category}, read)


def _save_dataset(path: Path, dataset: Dataset) -> None:
    """Writes an npz file that is read without pickle: strings are stored as UTF-8 JSON."""
    arrays = {"values": dataset.sequences.values, "offsets": dataset.sequences.offsets}
    for field in ("timestamps", "codes", "parts"):
        if getattr(dataset, field) is not None:
            arrays[field] = getattr(dataset, field)
    for field in _STRINGS:
        arrays[field] = np.frombuffer(json.dumps(getattr(dataset, field)).encode(), dtype=np.uint8)
    with atomic_path(path) as temporary:
        np.savez(temporary, **arrays)


def _load_dataset(path: Path) -> Dataset:
    arrays = load_arrays(path)
    fields = {field: json.loads(arrays[field].tobytes()) for field in _STRINGS}
    for field in ("codebook_sizes", "notes"):
        fields[field] = tuple(fields[field])
    optional = {field: arrays[field] for field in ("timestamps", "codes", "parts") if field in arrays}
    return Dataset(sequences=Sequences(arrays["values"], arrays["offsets"]), **fields, **optional)
