"""A run's report: `metrics.json`, `slices.json`, a table on the terminal, and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from simgr_jax.data.dataset import EvaluationCases, Sequences
from simgr_jax.evaluation import metrics as metrics_lib
from simgr_jax.evaluation.protocols import FILTERED, LEFT_IN
from simgr_jax.evaluation.slices import slice_metrics
from simgr_jax.ops.top_k import Ranking
from simgr_jax.workdir.atomic_write import write_json

MODEL = "model"  # The ranking whose metrics have no prefix.


class Judged(NamedTuple):
    """What a report is made from.

    Attributes:
      facts: what is known besides the metrics (model, dataset, split, num_users, num_parameters, ...).
      rankings: Rankings of the same C cases, by name and protocol. "model" is the one that is judged; others, such as
        "popularity" or "oracle", are there to compare.
      cases: the C evaluation cases.
      train: the training sequences, for the popularity of items.
      num_items: the size N of the catalog.
      ks: the K of HR@K and NDCG@K.
    """

    facts: Mapping[str, Any]
    rankings: Mapping[str, Mapping[str, Ranking]]
    cases: EvaluationCases
    train: Sequences
    num_items: int
    ks: tuple[int, ...] = metrics_lib.DEFAULT_KS


def collect_metrics(judged: Judged) -> dict[str, Any]:
    """The flat object of `metrics.json`: the facts, then every metric with its interval.

    `tied_targets` is the share of the targets that have the time of the item before them; None without times.

    The model's metrics have no prefix (`HR@10`, `HR@10/ci95_low`); those of other rankings begin with their name
    (`popularity/HR@10`). Metrics of lists without history items have `filtered/` (`popularity/filtered/HR@10`).
    """
    tied = judged.cases.tied
    flat = dict(judged.facts) | {"tied_targets": None if tied is None else float(np.mean(tied))}
    for name, by_protocol in judged.rankings.items():
        for protocol, ranking in by_protocol.items():
            arrays = np.asarray(ranking.target_rank), np.asarray(ranking.items), judged.num_items
            values = metrics_lib.summarize(*arrays, judged.ks)
            values |= metrics_lib.confidence_intervals(*arrays, judged.cases.users, judged.ks)
            flat |= {f"{_prefix(name)}{protocol}{key}": value for key, value in values.items()}
    return flat


def _prefix(name: str) -> str:
    return "" if name == MODEL else f"{name}/"


def write_report(
    folder: Path, judged: Judged, log: Sequence[Mapping[str, Any]] = (), console: Console | None = None
) -> dict[str, Any]:
    """Writes the report into `folder` and prints its table.

    Files: `metrics.json`; `slices.json` (by name of the ranking, see `slices.slice_metrics`); `exposure.png`;
    `slices.png`; `learning_curves.png` if `log` has anything to draw. Each file is replaced atomically. Slices and
    pictures leave history items in the lists.

    Args:
      folder: created if missing.
      log: the lines of `metrics.jsonl`. A line has `step` and any of `train/loss`, `validation/HR@10`,
        `validation/NDCG@10`.
      console: where the table goes; standard output by default.

    Returns:
      The object of `metrics.json`.

    Raises:
      UserError: the folder can't be written.
    """
    from simgr_jax.evaluation import report_pictures  # Matplotlib takes a second to import.

    metrics = collect_metrics(judged)
    rankings = {name: by_protocol[LEFT_IN] for name, by_protocol in judged.rankings.items()}
    slices = {
        name: slice_metrics(np.asarray(ranking.target_rank), judged.cases, judged.train, judged.num_items)
        for name, ranking in rankings.items()
    }
    for name, content in (("metrics.json", metrics), ("slices.json", slices)):
        write_json(folder / name, content, allow_nan=False, default=lambda value: value.item())

    shown = {name: metrics_lib.exposure(ranking.items, judged.num_items) for name, ranking in rankings.items()}
    shown["targets"] = np.bincount(judged.cases.targets, minlength=judged.num_items)
    report_pictures.write(folder, shown, slices, log)
    console = console or Console()
    console.print(metrics_table(metrics, list(judged.rankings), judged.ks))
    if share := metrics["tied_targets"]:
        console.print(f"{share:.1%} of targets tie in time with the item before; a hash decides their order")
    return metrics


def metrics_table(metrics: Mapping[str, Any], names: Sequence[str], ks: Sequence[int]) -> Table:
    """One row per metric and protocol, one column per ranking, with 95% intervals.

    Args:
      metrics: from `collect_metrics`.
      names: the names of the rankings, as in `Judged.rankings`.
    """
    title = " · ".join(str(metrics[key]) for key in ("dataset", "split") if key in metrics)
    table = Table(title=title or None, caption="± 95% bootstrap interval over users")
    table.add_column("metric", no_wrap=True)
    for name in names:
        table.add_column(str(metrics.get("model", MODEL)) if name == MODEL else name, justify="right")
    for protocol, heading in ((LEFT_IN, "history left in"), (FILTERED, "history taken out")):
        table.add_row(f"[dim]{heading}[/]")
        for metric in metrics_lib.names(ks):
            table.add_row(metric, *(_cell(metrics, f"{_prefix(name)}{protocol}{metric}") for name in names))
    return table


def _cell(metrics: Mapping[str, Any], key: str) -> str:
    half_width = max(abs(metrics[key] - metrics[f"{key}/ci95_{end}"]) for end in ("low", "high"))
    return f"[bold]{metrics[key]:.4f}[/] [dim]± {half_width:.4f}[/]"
