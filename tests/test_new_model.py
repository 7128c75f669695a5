"""Adding a model is one module and one line in the registry: a model of ten lines trains, evaluates, resumes, runs on
several devices, and is compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from simgr_jax.config_files import load_run_config
from simgr_jax.models import registry
from simgr_jax.run import Run
from simgr_jax.training.checkpoints import Checkpoints
from tests import virtual_devices

MODULE = """
import dataclasses
from flax import nnx
from simgr_jax.models.item_sequence import ItemSequenceModel
from simgr_jax.models.options import ModelOptions

@dataclasses.dataclass(frozen=True)
class Options(ModelOptions):
    name = "last_item"
    width: int = 8

class LastItem(nnx.Module):
    def __call__(self, embeddings, segment_ids, positions, rngs=None):
        return embeddings

def create(config, options, inputs):
    return ItemSequenceModel(LastItem(), options.width, 0.0, inputs, item_bias=True)
"""
SMALL = {
    "data.synthetic.num_users": 120,
    "data.synthetic.num_items": 40,
    "training.epochs": 2,
    "training.batch_rows": 8,
    "optimizer.learning_rate": 0.05,
    "evaluation.batch_size": 64,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the model's module, and with the line that registers it in every Python process."""
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "last_item.py").write_text(MODULE)
    (folder / "sitecustomize.py").write_text(
        "from simgr_jax.models import registry\nregistry.MODELS['last_item'] = 'last_item'\n"
    )
    return folder


@pytest.fixture
def registered(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setitem(registry.MODELS, "last_item", "last_item")


def environment(folder: Path, root: Path, devices: int = 1) -> dict[str, str]:
    path = os.pathsep.join(map(str, (folder, root)))
    return virtual_devices.environment(devices) | {"PYTHONPATH": path}


def open_run(workdir: Path, **overrides) -> Run:
    values = SMALL | {"model": "last_item", "last_item.width": 16} | overrides
    return Run(load_run_config("quickstart", values), workdir)


def test_it_trains_is_evaluated_and_recommends(registered, tmp_path):
    run = open_run(tmp_path)
    run.train()
    metrics = run.evaluate()
    assert metrics["model"] == "last_item" and metrics["num_parameters"] == 40 * 16 + 40
    assert metrics["HR@10"] > metrics["popularity/HR@10"] / 2
    assert len(run.recommend([run.dataset.item_ids[:3]], k=5).items[0]) == 5
    # A model without semantic IDs writes none.
    assert not (tmp_path / "semantic_ids.npz").exists()


def test_it_resumes_as_if_nothing_had_happened(registered, tmp_path, monkeypatch):
    unbroken = open_run(tmp_path / "unbroken")
    unbroken.train()
    save = Checkpoints.save

    def save_and_stop(self, *arguments):
        save(self, *arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            open_run(tmp_path / "broken").train()
    broken = open_run(tmp_path / "broken")
    broken.train()
    assert broken.item_vectors() == pytest.approx(unbroken.item_vectors(), abs=0)


@pytest.mark.slow
def test_it_gives_the_same_on_eight_devices(registered, folder, root, tmp_path):
    run = open_run(tmp_path / "one")
    run.train()
    flags = [f"--config.{key}={value}" for key, value in (SMALL | {"last_item.width": 16, "mesh.data": 2}).items()]
    command = [sys.executable, "-m", "simgr_jax.train", "--config=quickstart", "--config.model=last_item", *flags]
    subprocess.run(
        [*command, f"--workdir={tmp_path / 'eight'}"], check=True, env=environment(folder, root, 8), cwd=root
    )
    alone, together = run.evaluate(), json.loads((tmp_path / "eight" / "report" / "metrics.json").read_text())
    for metric in ("NDCG@10", "filtered/NDCG@10", "coverage@10"):
        assert together[metric] == pytest.approx(alone[metric], abs=2e-3)


@pytest.mark.slow
def test_it_is_compared(folder, root, tmp_path):
    (tmp_path / "comparison.py").write_text(
        f"import runpy\n"
        f"def get_config():\n"
        f"    config = runpy.run_path({str(root / 'configs' / 'compare.py')!r})['get_config']('synthetic')\n"
        f"    row = {{'family': 'new', 'shares': (), 'overrides': {{'model': 'last_item'}}}}\n"
        f"    row |= {{'seeds': (), 'trials': {{}}, 'trained_as': ''}}\n"
        f"    config.models = {{'last_item': row, 'popularity': config.models.popularity}}\n"
        f"    config.rows, config.reference = ('last_item', 'popularity'), 'popularity'\n"
        f"    config.inference.batches = config.inference.rounds = 1\n"
        f"    return config\n"
    )
    flags = [f"--config.base.{key}={value}" for key, value in SMALL.items()]
    command = [sys.executable, "-m", "simgr_jax.compare", f"--config={tmp_path / 'comparison.py'}", *flags]
    subprocess.run([*command, f"--workdir={tmp_path / 'w'}"], check=True, env=environment(folder, root), cwd=root)
    figures = json.loads((tmp_path / "w" / "comparison.json").read_text())
    assert figures["models"]["last_item"]["NDCG@10"] > 0 and "NDCG@10/difference" in figures["models"]["last_item"]
