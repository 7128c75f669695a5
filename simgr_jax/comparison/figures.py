"""From finished runs to the figures of a comparison, what `comparison.json` holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from simgr_jax.comparison.inference import Speeds
from simgr_jax.comparison.rows import Row
from simgr_jax.comparison.runs import SCORE, Tuning
from simgr_jax.evaluation import metrics, ranking_file
from simgr_jax.evaluation.ranking_file import CaseRankings
from simgr_jax.evaluation.significance import holm, paired_difference
from simgr_jax.files import read_json_object

# Tested against the reference.
TESTED = ("NDCG@10", "HR@10")
FACTS = ("dataset", "split", "num_users", "num_cases", "num_items")
COSTS = ("num_parameters", "train_seconds", "train_targets_per_second")


class Finished(NamedTuple):
    """What there is of a row.

    Attributes:
      workdirs: of its finished runs, at least one, by seed.
    """

    row: Row
    tuning: Tuning
    workdirs: Mapping[int, Path]


def collect(finished: Mapping[str, Finished], reference: str, speeds: Mapping[str, Speeds]) -> dict[str, Any]:
    """The figures of all finished rows.

    Args:
      finished: by name; all judged on the same cases.
      reference: the row that the others are tested against; without its runs nothing is tested.
      speeds: of the rows that were measured.

    Returns:
      `dataset`, `split`, `num_users`, `num_cases`, `num_items`, `reference`, and `models`, by name: `family`, `model`
      (that is `config.model.name`), `overrides`, `trained_as`, `seeds`, `missing_seeds`, `trials`, `chosen`; each of
      `metrics.METRICS`, the mean over seeds, with `METRIC/ci95_low` and `METRIC/ci95_high` (over users) and
      `METRIC/seeds` (of each seed); `METRIC/difference` of TESTED, against the reference: `mean`, `ci95_low`,
      `ci95_high`, `p` and, adjusted for all tests made, `p_holm`;
      `num_parameters`, `train_seconds`, `train_targets_per_second`, means over seeds; `users_per_second` and
      `catalog_seconds`, medians of `users_per_second/rounds` and `catalog_seconds/rounds` (see `inference.Speeds`).
    """
    models, cases, facts, users = {}, {}, {}, np.zeros(0, np.int32)
    for name, one in finished.items():
        reports = [read_json_object(workdir / "report" / "metrics.json") for workdir in one.workdirs.values()]
        rankings = [ranking_file.read(workdir / "report") for workdir in one.workdirs.values()]
        facts, users = {key: reports[0][key] for key in FACTS}, rankings[0].users
        cases[name] = _accuracy(rankings)
        models[name] = (
            _settings(one)
            | _metrics(rankings, facts["num_items"])
            | {key: _mean([report[key] for report in reports]) for key in COSTS}
            | _speed(speeds.get(name))
        )
    # One user is no sample.
    if reference in models and facts["num_users"] > 1:
        _test(models, cases, reference, users)
    return facts | {"reference": reference, "models": models}


def _settings(finished: Finished) -> dict[str, Any]:
    row, tuning, workdirs = finished
    trials = [
        {"values": trial.values}
        | ({SCORE: trial.score} if trial.failure is None else {"failed": trial.failure})
        | ({} if trial.full_score is None else {f"{SCORE}/full": trial.full_score})
        | ({} if trial.full_failure is None else {"failed/full": trial.full_failure})
        for trial in tuning.trials
    ]
    return {
        "family": row.family,
        "model": row.config.model.name,
        "overrides": row.overrides,
        "trained_as": row.trained_as,
        "seeds": list(workdirs),
        "missing_seeds": [seed for seed in row.seeds if seed not in workdirs],
        "trials": trials,
        "chosen": tuning.values,
    }


def _accuracy(rankings: Sequence[CaseRankings]) -> dict[str, np.ndarray]:
    """Of each case, the mean over seeds."""
    ranks = [ranking.target_rank for ranking in rankings]
    return {
        "NDCG@10": np.mean([metrics.gains(one, 10) for one in ranks], axis=0),
        "HR@10": np.mean([metrics.hits(one, 10) for one in ranks], axis=0),
    }


def _metrics(rankings: Sequence[CaseRankings], num_items: int) -> dict[str, Any]:
    arrays = [(ranking.target_rank, ranking.items, num_items) for ranking in rankings]
    seeds = [metrics.summarize(*one) for one in arrays]
    means = {name: float(np.mean([values[name] for values in seeds])) for name in metrics.METRICS}
    # All seeds ranked the same users: a resample draws the same ones for each.
    spread = np.mean([metrics.resample(*one, rankings[0].users) for one in arrays], axis=0).std(axis=0, ddof=1)
    each = {f"{name}/seeds": [values[name] for values in seeds] for name in metrics.METRICS}
    return means | metrics.intervals_around(means, spread, num_items) | each


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

    users: whose cases they are.
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
