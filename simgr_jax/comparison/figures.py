"""Collects the figures of finished runs, the contents of `comparison.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from simgr_jax.comparison.rows import Row
from simgr_jax.comparison.runs import SCORE, Runs, Tuning
from simgr_jax.comparison.speed import Speeds
from simgr_jax.evaluation import metrics
from simgr_jax.evaluation.protocols import PROTOCOLS
from simgr_jax.evaluation.saved_ranking import CaseRankings
from simgr_jax.evaluation.significance import holm, paired_difference

# The metrics that are tested against the reference.
TESTED = ("NDCG@10", "HR@10")
FACTS = ("dataset", "split", "num_users", "num_cases", "num_items")
COSTS = ("num_parameters", "train_seconds", "train_targets_per_second")


def collect(
    rows: Sequence[Row], runs: Runs, reference: str, speeds: Mapping[str, Speeds], ks: Sequence[int]
) -> dict[str, Any]:
    """The figures of all rows that have finished runs, which were all judged on the same cases.

    Args:
      reference: the row that the others are tested against; without its runs nothing is tested.
      speeds: of the rows that were measured.
      ks: the K of HR@K and NDCG@K.

    Returns:
      `dataset`, `split`, `num_users`, `num_cases`, `num_items`, `ks`, `reference`, and `models`, by name:
      `family`, `model` (`config.model`), `overrides`, `trained_as`, `seeds`, `missing_seeds`, `trials`, `chosen`;
      each of `metrics.names(ks)`, the mean over seeds, with `METRIC/ci95_low` and `METRIC/ci95_high` (over users) and
      `METRIC/seeds` (each seed's), and all of these as `filtered/METRIC`, for lists without history items;
      `METRIC/difference` from the reference, for each metric of TESTED: `mean`, `ci95_low`, `ci95_high`, `p`, and
      `p_holm`, which is adjusted for all tests made;
      `num_parameters`, `train_seconds`, `train_targets_per_second`, means over seeds; `users_per_second` and
      `catalog_seconds`, medians of `users_per_second/rounds` and `catalog_seconds/rounds` (see `speed.Speeds`).
    """
    models, cases, facts, users = {}, {}, {}, np.zeros(0, np.int32)
    for row in rows:
        finished, tuning = runs.finished(row), runs.tuning(row)
        if tuning is None or not finished:
            continue
        reports = [run.report() for run in finished.values()]
        rankings = [run.saved_ranking() for run in finished.values()]
        facts, users = {key: reports[0][key] for key in FACTS}, rankings[0].users
        cases[row.name] = _accuracy(rankings)
        models[row.name] = (
            _settings(row, tuning, list(finished))
            | _metrics(rankings, facts["num_items"], ks)
            | {key: _mean([report[key] for report in reports]) for key in COSTS}
            | _speed(speeds.get(row.name))
        )
    # A single user can't be tested.
    if reference in models and facts["num_users"] > 1:
        _test(models, cases, reference, users)
    return facts | {"ks": list(ks), "reference": reference, "models": models}


def _settings(row: Row, tuning: Tuning, seeds: list[int]) -> dict[str, Any]:
    trials = [
        {"values": trial.values}
        | ({SCORE: trial.score} if trial.failure is None else {"failed": trial.failure})
        | ({} if trial.full_score is None else {f"{SCORE}/full": trial.full_score})
        | ({} if trial.full_failure is None else {"failed/full": trial.full_failure})
        for trial in tuning.trials
    ]
    return {
        "family": row.family,
        "model": row.config.model,
        "overrides": row.overrides,
        "trained_as": row.trained_as,
        "seeds": seeds,
        "missing_seeds": [seed for seed in row.seeds if seed not in seeds],
        "trials": trials,
        "chosen": tuning.values,
    }


def _accuracy(rankings: Sequence[CaseRankings]) -> dict[str, np.ndarray]:
    """Each case's accuracy, the mean over seeds."""
    ranks = [ranking.target_rank for ranking in rankings]
    return {
        "NDCG@10": np.mean([metrics.gains(one, 10) for one in ranks], axis=0),
        "HR@10": np.mean([metrics.hits(one, 10) for one in ranks], axis=0),
    }


def _metrics(rankings: Sequence[CaseRankings], num_items: int, ks: Sequence[int]) -> dict[str, Any]:
    found, names = {}, metrics.names(ks)
    for protocol in PROTOCOLS:
        arrays = [(*ranking.by_protocol()[protocol], num_items) for ranking in rankings]
        seeds = [metrics.summarize(*one, ks) for one in arrays]
        means = {name: float(np.mean([values[name] for values in seeds])) for name in names}
        # All seeds ranked the same users, and a resample draws the same ones for each.
        spread = np.mean([metrics.resample(*one, rankings[0].users, ks) for one in arrays], axis=0).std(axis=0, ddof=1)
        each = {f"{name}/seeds": [values[name] for values in seeds] for name in names}
        values = means | metrics.intervals_around(means, spread, num_items, ks) | each
        found |= {f"{protocol}{name}": value for name, value in values.items()}
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    return None if None in values else float(np.mean(values))


def _speed(speeds: Speeds | None) -> dict[str, Any]:
    if speeds is None:
        return dict.fromkeys(Speeds._fields)
    medians = {name: float(np.median(rounds)) for name, rounds in speeds._asdict().items()}
    return medians | {f"{name}/rounds": list(rounds) for name, rounds in speeds._asdict().items()}


def _test(
    models: dict[str, dict[str, Any]], cases: Mapping[str, Mapping[str, np.ndarray]], reference: str, users: np.ndarray
) -> None:
    """Adds the differences from the reference to all other models.

    Args:
      cases: each case's accuracy, by model and metric.
      users: each case's user.
    """
    differences = {
        (name, metric): paired_difference(cases[name][metric], cases[reference][metric], users)
        for name in models
        if name != reference
        for metric in TESTED
    }
    adjusted = holm([difference.p for difference in differences.values()])
    for ((name, metric), found), p_holm in zip(differences.items(), adjusted, strict=True):
        models[name][f"{metric}/difference"] = found._asdict() | {"p_holm": float(p_holm)}
