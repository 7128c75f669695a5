"""The pictures of a run's report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from simgr_jax.evaluation.report import MODEL
from simgr_jax.workdir.atomic_write import atomic_path

COLORS = {MODEL: "#1f6fb2", "popularity": "#e08e45", "oracle": "#5a9e6f", "targets": "#8a8f98"}
STYLE = {
    "figure.dpi": 150,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": "#444444",
    "axes.edgecolor": "#bbbbbb",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e9e9e9",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


def write(
    folder: Path,
    shown: Mapping[str, Int[np.ndarray, " N"]],
    slices: Mapping[str, list[dict[str, Any]]],
    log: Sequence[Mapping[str, Any]],
) -> None:
    """Writes `exposure.png`, `slices.png`, and `learning_curves.png` if `log` has anything to draw.

    Args:
      shown: how often each item is shown, by name of the ranking, and how often it is a target, as "targets".
      slices: by name of the ranking, see `slices.slice_metrics`.
      log: the lines of `metrics.jsonl`.

    Raises:
      UserError: the folder can't be written.
    """
    with matplotlib.rc_context(STYLE):
        _save(folder / "exposure.png", draw_exposure(shown))
        _save(folder / "slices.png", draw_slices(slices))
        if any("train/loss" in line or "validation/NDCG@10" in line for line in log):
            _save(folder / "learning_curves.png", draw_learning_curves(log))


def _save(path: Path, figure: Figure) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", bbox_inches="tight", pad_inches=0.15)


def draw_learning_curves(log: Sequence[Mapping[str, Any]]) -> Figure:
    """Training loss and validation accuracy over training steps; the selected step is marked."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    loss_axes.plot(*_series(log, "train/loss"), color=COLORS[MODEL])
    loss_axes.set(title="Training loss", xlabel="step")
    for metric, color in (("HR@10", "#7fb2dd"), ("NDCG@10", COLORS[MODEL])):
        accuracy_axes.plot(*_series(log, f"validation/{metric}"), "o-", color=color, markersize=3, label=metric)
    _mark_best(accuracy_axes, *_series(log, "validation/NDCG@10"))
    accuracy_axes.legend(loc="best")
    accuracy_axes.set(title="Validation accuracy", xlabel="step")
    accuracy_axes.set_ylim(bottom=0)
    for axes in (loss_axes, accuracy_axes):
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    return figure


def _mark_best(axes: Axes, steps: np.ndarray, values: np.ndarray) -> None:
    if not len(values):
        return
    best = int(np.argmax(values))
    point, red = (steps[best], values[best]), "#c0392b"
    axes.plot(*point, "o", markersize=9, markerfacecolor="none", markeredgecolor=red, markeredgewidth=1.5)
    text = f"best NDCG@10 {values[best]:.4f}\nat step {steps[best]:,.0f}"
    side = "right" if best > len(steps) / 2 else "left"
    axes.annotate(text, point, (0, -10), textcoords="offset points", ha=side, va="top", color=red, fontsize=9)


def _series(log: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """The finite values of `key` and their steps."""
    points = [(line["step"], line[key]) for line in log if line.get(key) is not None]
    steps, values = np.array(points, dtype=np.float64).reshape(-1, 2).T
    finite = np.isfinite(values)
    return steps[finite], values[finite]


def lorenz(counts: Int[np.ndarray, " N"]) -> tuple[Float[np.ndarray, " M"], Float[np.ndarray, " M"]]:
    """The Lorenz curve of `counts`: shares of the items, least shown first, and of the slots that they hold."""
    rising = np.sort(counts)
    held = np.concatenate([[0], np.cumsum(rising)]) / max(rising.sum(), 1)
    return np.linspace(0, 1, len(held)), held


def gini(counts: Int[np.ndarray, " N"]) -> float:
    """The Gini coefficient: 0 if every item is shown equally often, near 1 if one item takes every slot."""
    items, held = lorenz(counts)
    return float(1 - 2 * np.trapezoid(held, items))


def draw_exposure(shown: Mapping[str, Int[np.ndarray, " N"]]) -> Figure:
    """Lorenz curves of how often each item is shown; the further below the diagonal, the fewer items take all slots."""
    figure = Figure(figsize=(6.2, 5.2), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="#cccccc", linewidth=1)
    diagonal = {"rotation": 45, "rotation_mode": "anchor", "transform_rotates_text": True}
    axes.text(0.31, 0.335, "every item equally often", color="#999999", fontsize=8.5, ha="center", **diagonal)
    for name, counts in shown.items():
        items, held = lorenz(counts)
        points = np.linspace(0, 1, 2001)  # Enough for a picture of any catalog.
        label = f"{name}: {np.mean(counts > 0):.1%} of items, Gini {gini(counts):.2f}"
        style = "--" if name == "targets" else "-"
        axes.plot(points, np.interp(points, items, held), style, color=COLORS.get(name), label=label, clip_on=False)
    axes.set(
        title="How the top-10 slots are shared among items",
        xlabel="share of the catalog, least shown items first",
        ylabel="share of slots they hold",
        xlim=(0, 1),
        ylim=(0, 1),
        aspect="equal",
    )
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.legend(loc="upper left", fontsize=9)
    return figure


def draw_slices(slices: Mapping[str, list[dict[str, Any]]]) -> Figure:
    """HR@10 of each ranking, by the target's popularity and by the history's length."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    groups = (
        ("target popularity", "HR@10 by popularity of the target in training"),
        ("history length", "HR@10 by length of the history"),
    )
    for axes, (by, title) in zip(panels, groups, strict=True):
        _draw_bars(axes, {name: [row for row in rows if row["by"] == by] for name, rows in slices.items()})
        axes.set_title(title)
    panels[0].legend(loc="best")
    return figure


def _draw_bars(axes: Axes, slices: Mapping[str, list[dict[str, Any]]]) -> None:
    width = 0.8 / len(slices)
    for number, (name, rows) in enumerate(slices.items()):
        centers = np.arange(len(rows)) + (number - (len(slices) - 1) / 2) * width
        bars = axes.bar(centers, [row["HR@10"] for row in rows], width * 0.94, color=COLORS.get(name), label=name)
        axes.bar_label(
            bars, [f"{row['HR@10']:.3f}".lstrip("0") for row in rows], fontsize=8, padding=1, color="#444444"
        )
    rows = next(iter(slices.values()))
    axes.set_xticks(range(len(rows)), [f"{row['slice']}\n{row['num_cases']:,} cases" for row in rows], fontsize=9)
    axes.tick_params(axis="x", length=0)
