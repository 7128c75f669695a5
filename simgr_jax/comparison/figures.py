"""From finished runs to the figures of a comparison, what `comparison.json` holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from simgr_jax.cache import load_arrays
from simgr_jax.comparison.rows import Row
from simgr_jax.comparison.runs import SCORE, Tuning
from simgr_jax.evaluate import RANKING_FILE
from simgr_jax.evaluation import metrics
from simgr_jax.evaluation.significance import holm, paired_difference
from simgr_jax.files import read_json_object

# Tested against the reference.
TESTED = ("NDCG@10", "HR@10")
FACTS = ("dataset", "split", "num_users", "num_items")
COSTS = ("num_parameters", "train_seconds", "train_targets_per_second")


def collect(
    finished: Mapping[str, tuple[Row, Tuning, Sequence[Path]]], reference: str, speeds: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    """The figures of all finished rows.

    Args:
      finished: by name, each row with its tuning and the workdirs of its runs, in the order of its seeds.
      reference: the row that the others are tested against; without its runs nothing is tested.
      speeds: users per second in each round, of the rows that were measured.

    Returns:
      `dataset`, `split`, `num_users`, `num_items`, `reference`, and `models`, by name: `family`, `model` (that is
      `config.model.name`), `overrides`, `trained_as`, `seeds`, `trials`, `chosen`; each of `metrics.METRICS`, the mean
      over seeds, with `METRIC/ci95_low` and `METRIC/ci95_high` (over users) and `METRIC/seeds` (of each seed);
      `METRIC/difference` of TESTED, against the reference: `mean`, `ci95_low`, `ci95_high`, `p` and, adjusted for all
      tests made, `p_holm`;
      `num_parameters`, `train_seconds`, `train_targets_per_second`, means over seeds; `users_per_second`, the median of
      `users_per_second/rounds`.
    """
    models, cases, facts = {}, {}, {}
    for name, (row, tuning, workdirs) in finished.items():
        reports = [read_json_object(workdir / "report" / "metrics.json") for workdir in workdirs]
        rankings = [load_arrays(workdir / "report" / RANKING_FILE) for workdir in workdirs]
        facts = {key: reports[0][key] for key in FACTS}
        cases[name] = _accuracy(rankings)
        models[name] = (
            _settings(row, tuning, len(workdirs))
            | _metrics(rankings, facts["num_items"])
            | {key: _mean([report[key] for report in reports]) for key in COSTS}
            | _speed(speeds.get(name))
        )
    if reference in models:
        _test(models, cases, reference)
    return facts | {"reference": reference, "models": models}


def _settings(row: Row, tuning: Tuning, num_seeds: int) -> dict[str, Any]:
    trials = [
        {"values": trial.values} | ({SCORE: trial.score} if trial.failure is None else {"failed": trial.failure})
        for trial in tuning.trials
    ]
    return {
        "family": row.family,
        "model": row.config.model.name,
        "overrides": row.overrides,
        "trained_as": row.trained_as,
        "seeds": list(row.seeds[:num_seeds]),
        "trials": trials,
        "chosen": tuning.values,
    }


def _accuracy(rankings: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Of each case, the mean over seeds."""
    ranks = [ranking["target_rank"] for ranking in rankings]
    return {
        "NDCG@10": np.mean([metrics.gains(one, 10) for one in ranks], axis=0),
        "HR@10": np.mean([metrics.hits(one, 10) for one in ranks], axis=0),
    }


def _metrics(rankings: Sequence[Mapping[str, np.ndarray]], num_items: int) -> dict[str, Any]:
    arrays = [(ranking["target_rank"], ranking["items"], num_items) for ranking in rankings]
    seeds = [metrics.summarize(*one) for one in arrays]
    means = {name: float(np.mean([values[name] for values in seeds])) for name in metrics.METRICS}
    # All seeds ranked the same users: a resample draws the same ones for each.
    spread = np.mean([metrics.resample(*one) for one in arrays], axis=0).std(axis=0, ddof=1)
    each = {f"{name}/seeds": [values[name] for values in seeds] for name in metrics.METRICS}
    return means | metrics.intervals_around(means, spread, num_items) | each


def _mean(values: Sequence[float | None]) -> float | None:
    return None if None in values else float(np.mean(values))


def _speed(rounds: Sequence[float] | None) -> dict[str, Any]:
    if rounds is None:
        return {"users_per_second": None}
    return {"users_per_second": float(np.median(rounds)), "users_per_second/rounds": list(rounds)}


def _test(models: dict[str, dict[str, Any]], cases: Mapping[str, Mapping[str, np.ndarray]], reference: str) -> None:
    """Adds the differences from the reference to all other models."""
    differences = {
        (name, metric): paired_difference(cases[name][metric], cases[reference][metric])
        for name in models
        if name != reference
        for metric in TESTED
    }
    adjusted = holm([difference.p for difference in differences.values()])
    for ((name, metric), found), p_holm in zip(differences.items(), adjusted, strict=True):
        models[name][f"{metric}/difference"] = {
            "mean": found.mean,
            "ci95_low": found.low,
            "ci95_high": found.high,
            "p": found.p,
            "p_holm": float(p_holm),
        }
