"""A comparison's figures as a table: in Markdown to keep, and on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from simgr_jax.comparison.figures import TESTED
from simgr_jax.comparison.runs import SCORE
from simgr_jax.evaluation import metrics as metrics_lib
from simgr_jax.evaluation.protocols import FILTERED
from simgr_jax.evaluation.significance import RESAMPLES


class Cell(NamedTuple):
    """
    Attributes:
      text: the value; "" if it is not known.
      detail: its interval.
      is_best: whether it is the best of its column.
    """

    text: str
    detail: str = ""
    is_best: bool = False

    def markdown(self) -> str:
        text = f"**{self.text}**" if self.is_best else self.text
        return f"{text} {self.detail}".strip()

    def rich(self) -> str:
        text = f"[bold green]{escape(self.text)}[/]" if self.is_best else escape(self.text)
        return f"{text}\n[dim]{escape(self.detail)}[/]" if self.detail else text


def columns(figures: Mapping[str, Any]) -> dict[str, list[Cell]]:
    """The cells of each column by its header, one cell per model; the best of each metric is marked."""
    models, reference = figures["models"], figures["reference"]
    table = {"model": [Cell(name) for name in models]}
    table |= _metric_columns(figures)
    if reference in models:
        for metric in TESTED:
            differences = [model.get(f"{metric}/difference") for model in models.values()]
            table[f"Δ {metric}"] = [_difference(one) for one in differences]
            table[f"p ({metric})"] = [Cell(_p(one)) for one in differences]
    table["parameters"] = [Cell(_short(model["num_parameters"])) for model in models.values()]
    table["training"] = [Cell(_duration(model["train_seconds"])) for model in models.values()]
    table["trials"] = [Cell(str(len(model["trials"]))) for model in models.values()]
    speeds = [model["users_per_second"] for model in models.values()]
    table["users/s"] = [Cell("" if speed is None else f"{speed:,.0f}") for speed in speeds]
    table["catalog"] = [Cell(_short_duration(model["catalog_seconds"])) for model in models.values()]
    for name in figures["failed"]:
        for header, cells in table.items():
            cells.append(Cell({"model": name, metrics_lib.names(figures["ks"])[0]: "failed"}.get(header, "")))
    return table


def filtered_columns(figures: Mapping[str, Any]) -> dict[str, list[Cell]]:
    """Like `columns`, but only the metrics, for lists without history items."""
    return {"model": [Cell(name) for name in figures["models"]]} | _metric_columns(figures, FILTERED)


def _metric_columns(figures: Mapping[str, Any], protocol: str = "") -> dict[str, list[Cell]]:
    table, models = {}, figures["models"].values()
    for name in metrics_lib.names(figures["ks"]):
        metric, digits = protocol + name, 3 if name.startswith("entropy") else 4
        best = max(round(model[metric], digits) for model in models)
        table[name] = [_metric(model, metric, digits, best) for model in models]
    return table


def _metric(model: Mapping[str, Any], metric: str, digits: int, best: float) -> Cell:
    value = model[metric]
    half_width = max(abs(value - model[f"{metric}/ci95_{end}"]) for end in ("low", "high"))
    is_best = round(value, digits) == best
    return Cell(_number(value, digits), f"±{_number(half_width, digits)}", is_best)


def _difference(difference: Mapping[str, float] | None) -> Cell:
    if difference is None:
        return Cell("")
    half_width = (difference["ci95_high"] - difference["ci95_low"]) / 2
    sign = "−" if difference["mean"] < 0 else "+"
    return Cell(f"{sign}{_number(abs(difference['mean']), 4)}", f"±{_number(half_width, 4)}")


def _number(value: float, digits: int) -> str:
    """The number without the zero before the point."""
    text = f"{value:.{digits}f}"
    return text[1:] if text.startswith("0.") else text


def _p(difference: Mapping[str, float] | None) -> str:
    if difference is None:
        return ""
    p = difference["p_holm"]
    return "<.001" if p < 0.001 else f"{p:.2f}" if p >= 0.995 else _number(p, 3)


def _short(count: float) -> str:
    """Like 3.4M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return f"{count:.0f}"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _short_duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def console() -> Console:
    """Where tables are shown; a file gets them 200 columns wide."""
    console = Console()
    return console if console.is_terminal else Console(width=200)


def terminal(figures: Mapping[str, Any]) -> Table:
    """For the terminal, intervals below their values."""
    title = f"{figures['dataset']} · {figures['split']} · {_cases(figures)} · {figures['num_items']:,} items"
    caption = "± 95% interval over users"
    if figures["reference"] in figures["models"]:
        caption += f"; Δ from {figures['reference']}, p adjusted for all tests (Holm)"
    table = Table(title=title, caption=caption, pad_edge=False)
    cells = columns(figures)
    for header in cells:
        table.add_column(header.replace(" ", "\n"), justify="left" if header == "model" else "right", no_wrap=True)
    for row in zip(*cells.values(), strict=True):
        table.add_row(*(cell.rich() for cell in row))
    return table


def markdown(figures: Mapping[str, Any]) -> str:
    """The file `comparison.md`: the table, how to read it, and what each model was trained with."""
    heading = f"# {figures['dataset']}: {len(figures['models'])} models on one {figures['split']} split\n"
    filtered = "The same lists with history items taken out; don't compare them with the table above.\n"
    parts = [heading, _of_cells(columns(figures)), _reading(figures), filtered, _of_cells(filtered_columns(figures))]
    parts.append(_settings(figures))
    if figures["failed"]:
        parts.append("Failed:\n\n" + "\n".join(f"- {name}: {why}" for name, why in figures["failed"].items()) + "\n")
    if figures["not_trained"]:
        parts.append(f"Not trained: {', '.join(figures['not_trained'])}.\n")
    return "\n".join(parts)


def _of_cells(cells: Mapping[str, list[Cell]]) -> str:
    return markdown_table(list(cells), [[cell.markdown() for cell in row] for row in zip(*cells.values(), strict=True)])


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; all columns but the first are aligned to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _reading(figures: Mapping[str, Any]) -> str:
    reference, inference = figures["reference"], figures["inference"]
    notes = [
        f"{_cases(figures)}, {figures['num_items']:,} items, ranked over the full catalog, history items left in.",
        "Each run's checkpoint is the best by validation NDCG@10. entropy@10 is in nats. The best metrics are bold.",
        "±: 95% bootstrap interval over users.",
        "training: wall time with validation, without trials.",
    ]
    tests = len(TESTED) * (len(figures["models"]) - 1)
    if reference in figures["models"]:
        notes.append(
            f"Δ: difference from {reference}, with its 95% interval; p: two-sided, from a paired permutation test over "
            f"users, adjusted for all {tests} tests in this table (Holm). With {RESAMPLES:,} permutations none can be "
            f"below {_number(tests / (1 + RESAMPLES), 4)}."
        )
    if inference:
        notes.append(
            f"users/s: the median of {inference['rounds']} rounds of {inference['users']:,} users, "
            f"{inference['batch_size']} at once; all models in one process, in turn. catalog: the time to compute what "
            "ranking needs of the items, once for all users."
        )
    seeds = [_seeds(name, model) for name, model in figures["models"].items() if len(model["seeds"]) > 1]
    missing = [
        f"{name}: not trained yet with {', '.join(f'seed {seed}' for seed in model['missing_seeds'])}."
        for name, model in figures["models"].items()
        if model["missing_seeds"]
    ]
    return "\n".join(f"- {note}" for note in notes + seeds + missing) + "\n"


def _cases(figures: Mapping[str, Any]) -> str:
    users, cases = figures["num_users"], figures["num_cases"]
    return f"{users:,} users" if cases == users else f"{cases:,} cases of {users:,} users"


def _seeds(name: str, model: Mapping[str, Any]) -> str:
    ranges = [
        f"{metric} {_number(min(model[f'{metric}/seeds']), 4)} to {_number(max(model[f'{metric}/seeds']), 4)}"
        for metric in ("NDCG@10", "HR@10", "coverage@10", "entropy@10")
    ]
    return f"{name}: the mean of {len(model['seeds'])} seeds; they range over {', '.join(ranges)}."


def _settings(figures: Mapping[str, Any]) -> str:
    """What each model was trained with."""
    header = ["model", "kind", "differs from the others in", "trials", "validation NDCG@10 of each"]
    rows = [
        [name, model["family"], _code(model["overrides"]), str(len(model["trials"])), _trials(model)]
        for name, model in figures["models"].items()
    ]
    base = ", ".join(f"`{key}={value}`" for key, value in figures["base"].items())
    text = f"All models, where the table below doesn't say otherwise: {base}."
    if figures["trial_epochs"]:
        text += f" Trials: `training.epochs={figures['trial_epochs']}`."
        if figures["finalists"] > 1:
            text += f" The best {figures['finalists']} of a model's were trained in full, to choose between them."
    return f"{text}\n\n" + markdown_table(header, rows).replace("---:", "---")


def _code(values: Mapping[str, Any]) -> str:
    return ", ".join(f"`{key}={value}`" for key, value in values.items())


def _trials(model: Mapping[str, Any]) -> str:
    parts = []
    for trial in model["trials"]:
        score = _number(trial[SCORE], 4) if SCORE in trial else "failed"
        if (full := trial.get(f"{SCORE}/full")) is not None:
            score += f", in full {_number(full, 4)}"
        elif "failed/full" in trial:
            score += ", in full failed"
        parts.append(f"{_code(trial['values'])}: " + (f"**{score}**" if trial["values"] == model["chosen"] else score))
    return "; ".join(parts)
