"""Small comparisons for these tests: configs, and finished runs that no model was trained for."""

from __future__ import annotations

import json
from pathlib import Path

import ml_collections
import numpy as np

from simgr_jax import default_config
from simgr_jax.config_keys import flat
from simgr_jax.data.dataset import EvaluationCases, Sequences
from simgr_jax.evaluation import metrics, saved_ranking
from simgr_jax.evaluation.protocols import PROTOCOLS
from simgr_jax.evaluation.saved_ranking import CaseRankings
from simgr_jax.ops.top_k import Ranking
from simgr_jax.run import Run

NUM_USERS, NUM_ITEMS = 80, 30


def config(**models) -> ml_collections.ConfigDict:
    """A comparison's config, locked as the flags lock it.

    models: by row, the values that differ from those below.
    """
    base = default_config.get_config()
    base.data.format = "synthetic"
    row = {"family": "a kind", "shares": (), "seeds": (), "overrides": {}, "trials": {}, "trained_as": ""}
    return ml_collections.ConfigDict(
        {
            "base": base,
            "rows": tuple(models),
            "reference": next(iter(models)),
            "trial_epochs": 2,
            "finalists": 1,
            "inference": {"batch_size": 8, "batches": 1, "rounds": 1},
            "shared": {
                "ids": {"semantic_ids": {"quantizer": {"name": "residual_kmeans", "levels": 3}}},
                "wide": {"backbone": {"width": 256}},
            },
            "models": {name: row | values for name, values in models.items()},
        }
    ).lock()


def rates(*values: float) -> dict[str, dict]:
    """Trials of learning rates."""
    return {f"trial{number}": {"optimizer": {"learning_rate": value}} for number, value in enumerate(values, start=1)}


def write_report(workdir: Path, seed: int = 0, skill: float = 1.0, targets_seed: int = 0) -> CaseRankings:
    """What a finished run leaves: its rankings are random, and the higher the skill, the better. Returns them."""
    generator = np.random.default_rng(seed)
    rankings, values = {}, {}
    for protocol in PROTOCOLS:
        ranks = np.ceil(NUM_ITEMS * generator.random(NUM_USERS) ** skill).astype(np.float32)
        items = np.stack([generator.permutation(NUM_ITEMS)[:10] for _ in ranks]).astype(np.int32)
        rankings[protocol] = Ranking(items, np.zeros_like(items, np.float32), ranks)
        values |= {f"{protocol}{key}": value for key, value in metrics.summarize(ranks, items, NUM_ITEMS).items()}
    facts = {"model": "simgr", "dataset": "tiny", "split": "test"}
    facts |= {"num_users": NUM_USERS, "num_cases": NUM_USERS, "num_items": NUM_ITEMS}
    cost = {"num_parameters": 1000, "train_seconds": 10.0 + seed, "train_targets_per_second": 50.0}
    folder = workdir / "report"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(facts | cost | values))
    targets = np.random.default_rng(targets_seed).integers(0, NUM_ITEMS, NUM_USERS, np.int32)
    cases = EvaluationCases(np.arange(NUM_USERS, dtype=np.int32), Sequences.from_lists([[0]] * NUM_USERS), targets)
    saved_ranking.write(folder, rankings, cases)
    return saved_ranking.read(folder)


def written_config(workdir: Path) -> dict:
    return flat(Run.load(workdir).config)
