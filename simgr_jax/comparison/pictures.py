"""A comparison's figures as pictures."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from matplotlib.transforms import Bbox

from simgr_jax.evaluation.report_pictures import STYLE
from simgr_jax.workdir.atomic_write import atomic_path

# The colors of families, in order.
COLORS = ("#1f6fb2", "#e08e45", "#8a8f98", "#5a9e6f", "#8e6bb0", "#c0392b")
# Where a name may be beside its point, in points (1/72 inch), in order of preference.
_PLACES = [(9, 0), (-9, 0), (0, 14), (0, -14), *((x, y) for y in (11, -11, 22, -22, 33, -33) for x in (9, -9))]
# The line from a name to its point, for names that are not directly beside it.
_LINE = {"arrowstyle": "-", "color": "#aaaaaa", "linewidth": 0.7, "shrinkA": 0, "shrinkB": 4}


def write(folder: Path, figures: Mapping[str, Any]) -> list[Path]:
    """Writes `accuracy.png`; for several models also `diversity.png` and `speed.png`; and `scaling.png` if some models
    differ only in their backbone. Returns the files."""
    pictures: dict[str, Callable[[Mapping[str, Any]], Figure]] = {"accuracy": draw_accuracy}
    if len(figures["models"]) > 1:
        pictures["diversity"] = draw_diversity
        if any(model["users_per_second"] for model in figures["models"].values()):
            pictures["speed"] = draw_speed
    if sizes(figures["models"]):
        pictures["scaling"] = draw_scaling
    return [_write(folder / f"{name}.png", draw, figures) for name, draw in pictures.items()]


def write_bias(path: Path, figures: Mapping[str, Any]) -> Path | None:
    """Writes what `draw_bias` draws; None if no model has a beam or a distance."""
    if not any({"beam", "truth", "joint"} & found.keys() for found in figures.values()):
        return None
    return _write(path, draw_bias, figures)


def _write(path: Path, draw: Callable[[Mapping[str, Any]], Figure], figures: Mapping[str, Any]) -> Path:
    with matplotlib.rc_context(STYLE):
        figure = draw(figures)
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png", bbox_inches="tight", pad_inches=0.15)
    return path


def draw_accuracy(figures: Mapping[str, Any]) -> Figure:
    """NDCG@10 of each model, the best at the top, with intervals."""
    models = dict(sorted(figures["models"].items(), key=lambda one: one[1]["NDCG@10"]))
    figure = Figure(figsize=(7.2, 1.4 + 0.34 * len(models)), layout="constrained")
    axes = figure.subplots()
    colors = _colors(figures["models"].values())
    for place, model in enumerate(models.values()):
        value, color = model["NDCG@10"], colors[model["family"]]
        axes.plot([0, value], [place, place], color=color, linewidth=1, alpha=0.35, zorder=1)
        axes.errorbar(value, place, xerr=_interval(model, "NDCG@10"), fmt="o", color=color, capsize=3, markersize=6)
        high = model["NDCG@10/ci95_high"]
        axes.annotate(f"{value:.4f}".lstrip("0"), (high, place), (6, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(models)), models)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")
    axes.set(title=f"Accuracy on {figures['dataset']}", xlabel="NDCG@10, 95% interval over users")
    axes.set_xlim(0, 1.14 * max(model["NDCG@10/ci95_high"] for model in models.values()))
    _legend(figure, colors)
    return figure


def draw_diversity(figures: Mapping[str, Any]) -> Figure:
    """NDCG@10 against the share of the catalog that is recommended, and against how evenly it is recommended."""
    models, colors = figures["models"], _colors(figures["models"].values())
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    coverage, evenness = figure.subplots(1, 2, sharey=True)
    coverage.set(title=f"Accuracy and coverage on {figures['dataset']}", ylabel="NDCG@10")
    coverage.set_xlabel("coverage@10: share of the catalog in any list")
    coverage.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0%}"))
    evenness.set(title="Accuracy and evenness", xlabel="entropy@10 of recommended items, in nats")
    _legend(figure, colors)
    _scatter(coverage, models, "coverage@10", colors)
    _scatter(evenness, models, "entropy@10", colors)
    return figure


def draw_speed(figures: Mapping[str, Any]) -> Figure:
    """NDCG@10 against users per second at inference."""
    models = {name: model for name, model in figures["models"].items() if model["users_per_second"]}
    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.set(title=f"Accuracy and speed on {figures['dataset']}", ylabel="NDCG@10")
    axes.set_xlabel("users ranked per second, all models in one process")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda speed, _: f"{speed:,.0f}"))
    colors = _colors(figures["models"].values())
    _legend(figure, colors)
    _scatter(axes, models, "users_per_second", colors)
    return figure


def sizes(models: Mapping[str, Any]) -> dict[str, list[str]]:
    """Groups of models that differ only in their backbone, smallest first, by what their names begin with."""
    groups: dict[str, list[str]] = {}
    for name in sorted(models, key=lambda name: models[name]["num_parameters"]):
        others = {key: value for key, value in models[name]["overrides"].items() if not key.startswith("backbone.")}
        groups.setdefault(repr(sorted(others.items())), []).append(name)
    return {_shared_beginning(names): names for names in groups.values() if len(names) > 1}


def _shared_beginning(names: Sequence[str]) -> str:
    same = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return "".join(letters[0] for letters in same).rstrip("_") or names[0]


def draw_scaling(figures: Mapping[str, Any]) -> Figure:
    """NDCG@10 against the number of parameters, one line for each group of `sizes`."""
    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.set(title=f"Accuracy and size on {figures['dataset']}", ylabel="NDCG@10, 95% interval over users")
    axes.set_xlabel("parameters")
    axes.grid(axis="x")
    for number, (label, names) in enumerate(sizes(figures["models"]).items()):
        models = [figures["models"][name] for name in names]
        axes.errorbar(
            *([model["num_parameters"] for model in models], [model["NDCG@10"] for model in models]),
            yerr=np.hstack([_interval(model, "NDCG@10") for model in models]),
            fmt="o-",
            color=COLORS[number % len(COLORS)],
            elinewidth=1,
            capsize=3,
            label=label,
        )
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def draw_bias(figures: Mapping[str, Any]) -> Figure:
    """What beams find of the exact top 10, by width; and how far each model is from the truth, or from the joint model
    if the truth isn't known.

    Args:
      figures: as `comparison.decoding_bias.measure` returns them.
    """
    beams = {name: found["beam"] for name, found in figures.items() if "beam" in found}
    reference = "truth" if any("truth" in found for found in figures.values()) else "joint"
    distances = {name: found[reference]["kl"] for name, found in figures.items() if reference in found}
    panels = [partial(_draw_beams, beams)] if beams else []
    panels += [partial(_draw_distances, distances, reference)] if distances else []
    figure = Figure(figsize=(6 * len(panels), 4.2), layout="constrained")
    for axes, draw in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels, strict=True):
        draw(axes)
    return figure


def _draw_beams(beams: Mapping[str, Mapping[str, Mapping[str, float]]], axes: Axes) -> None:
    """beams: each model's search errors, by width."""
    for number, (name, widths) in enumerate(beams.items()):
        across, color = [int(width) for width in widths], COLORS[number % len(COLORS)]
        for key, style in (("found@10", "o-"), ("mass@10", "o--")):
            values = [errors[key] for errors in widths.values()]
            axes.plot(across, values, style, color=color, markersize=4, label=f"{name}, {key.removesuffix('@10')}")
    axes.set(title="Search: the exact top 10, by beam", xlabel="beam width", ylabel="share", ylim=(0, 1.03))
    axes.legend()


def _draw_distances(distances: Mapping[str, float], reference: str, axes: Axes) -> None:
    """distances: each model's distance from the reference; the nearest model is at the top."""
    names = sorted(distances, key=lambda name: -distances[name])
    bars = axes.barh(names, [distances[name] for name in names], color=COLORS[0], height=0.6)
    axes.bar_label(bars, fmt="%.2f", padding=4, fontsize=9)
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")
    axes.set(title="Model: distance from the " + reference, xlabel=f"KL({reference} || model), nats per user")
    axes.margins(x=0.12)


def _colors(models: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The color of each family."""
    families = dict.fromkeys(model["family"] for model in models)
    return {family: COLORS[number % len(COLORS)] for number, family in enumerate(families)}


def _legend(figure: Figure, colors: Mapping[str, str]) -> None:
    """Puts a legend below the axes, where it hides nothing."""
    for family, color in colors.items():
        figure.axes[0].plot([], [], "o", color=color, label=family)
    figure.legend(loc="outside lower center", ncols=len(colors), fontsize=9)


def _interval(model: Mapping[str, Any], metric: str) -> list[list[float]]:
    """How far the interval reaches below and above the value."""
    ends = model[metric] - model[f"{metric}/ci95_low"], model[f"{metric}/ci95_high"] - model[metric]
    return [[max(end, 0.0)] for end in ends]


def _scatter(axes: Axes, models: Mapping[str, Any], across: str, colors: Mapping[str, str]) -> None:
    """Draws a named point for each model: NDCG@10 against the metric `across`."""
    for model in models.values():
        across_interval = _interval(model, across) if f"{across}/ci95_low" in model else None
        axes.errorbar(
            *(model[across], model["NDCG@10"]),
            xerr=across_interval,
            yerr=_interval(model, "NDCG@10"),
            fmt="o",
            color=colors[model["family"]],
            ecolor=f"{colors[model['family']]}77",
            elinewidth=1,
            markersize=6,
        )
    axes.grid(axis="x")
    axes.margins(x=0.15)
    axes.set_ylim(bottom=0)
    _label(axes, models, across)


def _label(axes: Axes, models: Mapping[str, Any], across: str) -> None:
    """Puts names beside the points. Each takes the first of several places where it hides neither a point nor a name,
    or the last place if all are taken.
    """
    # Fixes the positions of the points.
    axes.figure.draw_without_rendering()
    inside = axes.get_window_extent()
    points = {name: axes.transData.transform((model[across], model["NDCG@10"])) for name, model in models.items()}
    around = 7 * axes.figure.dpi / 72  # A little less than a name's distance from its own point.
    taken = [Bbox.from_extents(*(point - around), *(point + around)) for point in points.values()]
    for name, model in models.items():
        point = model[across], model["NDCG@10"]
        label = axes.annotate(name, point, (0, 0), textcoords="offset points", fontsize=9, color="#333333")
        label.set_in_layout(False)
        for x, y in _PLACES:
            label.set(position=(x, y), ha={1: "left", 0: "center", -1: "right"}[np.sign(x)], va="center")
            box = label.get_window_extent()
            is_free = not any(box.overlaps(other) for other in taken)
            if is_free and inside.x0 < box.x0 and box.x1 < inside.x1:
                break
        taken.append(box)
        if x and y:
            axes.annotate("", point, (x, y), textcoords="offset points", arrowprops=_LINE)
