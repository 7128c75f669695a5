"""No flipped byte of a workdir is read as another value without a word, where that can be told."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

import simgr_jax
from simgr_jax import saved_config
from simgr_jax.config_keys import flat
from simgr_jax.errors import UserError

# What a run reads back besides its checkpoints, whose bytes tests/training/test_checkpoints.py flips.
CHECKED = ("semantic_ids.npz", "report/ranking.npz", "cache/*.npz", "cache/*/*")
# Text that people may edit, where a digit that becomes another digit is no damage that can be told; and what may then
# differ.
EDITABLE = {
    "config.json": {"config"},
    "trained_on.json": set(),
    "metrics.jsonl": {"log"},
    "report/metrics.json": {"report"},
    "semantic_ids.json": set(),
}


@pytest.fixture
def workdir(trained_workdir, tmp_path):
    return shutil.copytree(trained_workdir, tmp_path / "workdir")


def what_is_read(workdir: Path) -> dict[str, object]:
    """All that a run reads back, but for its checkpoints."""
    run = simgr_jax.load(workdir)
    kept, fitted = run.semantic_ids, run.id_quality
    found = {"ids": (kept.codes.tolist(), kept.codebook_sizes, fitted), "config": flat(run.config)}
    found |= {"dataset": listed(run.dataset), "split": listed(run.split), "log": run.log(), "report": run.report()}
    found["ranking"] = [array.tolist() for array in run.saved_ranking()]
    # A run that has learned nothing yet takes its semantic IDs from the cache.
    found["cached ids"] = run_without_checkpoints(workdir)
    return found


def listed(value: object) -> object:
    """A dataclass of arrays as lists."""
    if dataclasses.is_dataclass(value):
        return {field.name: listed(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return (str(value.dtype), value.tolist()) if isinstance(value, np.ndarray) else value


def run_without_checkpoints(workdir: Path) -> object:
    aside = workdir / "aside"
    (workdir / "checkpoints").rename(aside)
    try:
        run = simgr_jax.load(workdir)
        return run.semantic_ids.codes.tolist(), run.id_quality
    finally:
        aside.rename(workdir / "checkpoints")


def flips(files: list[Path], count: int):
    """Flips random bits of a random byte of a random file, yields the file, and makes it whole again."""
    generator = np.random.default_rng(0)
    for _ in range(count):
        file = files[generator.integers(len(files))]
        whole = file.read_bytes()
        damaged = bytearray(whole)
        damaged[generator.integers(len(whole))] ^= int(generator.integers(1, 256))
        file.write_bytes(damaged)
        yield file
        file.write_bytes(whole)


def files_of(workdir: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted(file for pattern in patterns for file in workdir.glob(pattern) if file.is_file())


@pytest.mark.slow
def test_no_flipped_byte_of_an_array_is_read_as_another_value(workdir):
    files, expected = files_of(workdir, CHECKED), what_is_read(workdir)
    assert {file.name.partition("-")[0] for file in files} == {
        *("semantic_ids.npz", "ranking.npz", "dataset", "codes", "tfidf"),
        *("synthetic.json", "user_sequence.txt", "item_plain_text.txt"),
    }
    detected = 0
    for file in flips(files, 200):
        try:
            assert what_is_read(workdir) == expected, file
        except UserError as error:
            assert str(error).startswith(f"{file}: "), file
            detected += 1
    assert detected > 100


@pytest.mark.slow
@pytest.mark.parametrize(("name", "may_differ"), EDITABLE.items())
def test_a_flipped_byte_of_a_text_is_named_or_changes_nothing_else(workdir, name, may_differ):
    """The config's keys may change if they do not matter to the run or may be raised."""
    expected, config = what_is_read(workdir), simgr_jax.load(workdir).config
    for file in flips([workdir / name], 100):
        try:
            saved_config.check_same(config, workdir, may_be_longer=True)
            found = what_is_read(workdir)
        except UserError as error:
            # A value that no run can have is named by its key.
            assert str(error).startswith(f"{file}:") or (name == "config.json" and str(error).startswith("config."))
        else:
            assert {key for key in expected if found[key] != expected[key]} <= may_differ
