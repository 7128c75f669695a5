"""Measures the bias of a comparison's trained models: what decoding loses, and how far they are from the truth.

    python -m simgr_jax.bias --workdir=DIR [--users=256] [--beam_widths=5,10,20,50,100] [--joint=lcrec]

DIR is a workdir of `simgr_jax.compare`. Writes DIR/bias.json, DIR/bias.md and DIR/bias.png (docs/bias.md) for all
models that have an item distribution. A model that spells items has to score every item for that, like a beam as wide
as the catalog: on a CPU, 256 users take minutes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags
from rich.markdown import Markdown

from simgr_jax import cli
from simgr_jax.comparison import pictures
from simgr_jax.comparison.decoding_bias import measure
from simgr_jax.comparison.runs import finished_runs, finished_workdirs
from simgr_jax.comparison.table import console, markdown_table
from simgr_jax.errors import UserError
from simgr_jax.workdir.atomic_write import write_json, write_text

# The columns of the table: each header's figure, by key, and the number of digits to show.
COLUMNS = {
    "exact NDCG@10": ("exact/NDCG@10", 4),
    "decoded": ("decoded/NDCG@10", 4),
    "decoded − exact": ("decoded/difference/mean", 4),
    "±": ("decoded/difference/half_width", 4),
    "found@10": ("search/found@10", 4),
    "mass@10": ("search/mass@10", 4),
    "rank correlation": ("search/rank_correlation@10", 4),
    "off the catalog": ("off_catalog_mass", 4),
    "KL from truth": ("truth/kl", 3),
    "total variation": ("truth/total_variation", 3),
    "calibration error": ("truth/calibration_error", 3),
    "KL from joint": ("joint/kl", 3),
}


def main() -> None:
    values = flags.FLAGS
    folder = cli.required_path("workdir")
    workdirs = finished_workdirs(folder)
    if not workdirs:
        raise UserError(f"{folder / 'runs'}: holds no finished run; run simgr_jax.compare in this workdir first")
    if flags.FLAGS["joint"].present and values.joint not in workdirs:
        raise UserError(f'--joint: "{values.joint}" is not in {folder / "runs"}; choose from {", ".join(workdirs)}')
    widths = _widths(values.beam_widths)
    try:
        runs = finished_runs(folder, _places(folder) | {"evaluation.batch_size": values.batch_size})
        figures = measure(runs, users=values.users, beam_widths=widths, joint=values.joint)
    except UserError as error:
        raise UserError(str(error).replace("config.evaluation.batch_size", "--batch_size")) from error
    if not figures:
        raise UserError(
            f"{folder / 'runs'}: no model there has a distribution over items; train one that does, like simgr"
        )
    settings = {"users": values.users, "beam_widths": widths, "joint": values.joint}
    text = markdown(figures, settings)
    write_json(folder / "bias.json", settings | {"models": figures})
    write_text(folder / "bias.md", text)
    pictures.write_bias(folder / "bias.png", figures)
    console().print(Markdown(text))
    print(f"the figures are in {folder / 'bias.json'}")


def _widths(texts: list[str]) -> list[int]:
    widths = [int(text) if text.isdecimal() else 0 for text in texts]
    if not all(widths):
        raise UserError(f"--beam_widths: can't be {','.join(texts)}; give numbers from 1, like 5,20")
    return widths


def _places(folder: Path) -> dict[str, str]:
    """Where the runs' files are now, by full config key."""
    cache = folder.resolve() / "cache"
    return ({"cache_dir": str(cache)} if cache.is_dir() else {}) | cli.places()


def markdown(figures: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Any]) -> str:
    """A table of all models, and a table of beam widths."""
    flat = {name: _flat(found) for name, found in figures.items()}
    columns = {header: place for header, place in COLUMNS.items() if any(place[0] in found for found in flat.values())}
    rows = [
        [name, *(f"{found[key]:.{digits}f}" if key in found else "" for key, digits in columns.values())]
        for name, found in flat.items()
    ]
    cases = next(iter(figures.values()))["cases"]
    text = f"{cases} cases of the test split; ±: 95% interval over their users."
    if settings["joint"] in figures:
        text += f" Joint: {settings['joint']}."
    text += "\n\n" + markdown_table(["model", *columns], rows)
    beams = [
        [name, width, *(f"{errors[key]:.4f}" for key in ("found@5", "found@10", "mass@10", "rank_correlation@10"))]
        for name, found in figures.items()
        for width, errors in found.get("beam", {}).items()
    ]
    if beams:
        text += "\n" + markdown_table(["model", "beam", "found@5", "found@10", "mass@10", "rank correlation"], beams)
    return text


def _flat(found: Mapping[str, Any]) -> dict[str, float]:
    groups = {key: value for key, value in found.items() if isinstance(value, dict) and key != "beam"}
    difference = found["decoded/difference"]
    groups["decoded/difference"] = difference | {"half_width": (difference["ci95_high"] - difference["ci95_low"]) / 2}
    flat = {key: value for key, value in found.items() if isinstance(value, float)}
    return flat | {f"{group}/{key}": value for group, values in groups.items() for key, value in values.items()}


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "The workdir of simgr_jax.compare.")
    cli.define_places()
    flags.DEFINE_integer("users", 256, "How many test cases to measure on.", lower_bound=2)
    flags.DEFINE_integer("batch_size", 16, "The number of users ranked at once.", lower_bound=1)
    flags.DEFINE_list("beam_widths", ["5", "10", "20", "50", "100"], "The beam widths to try for models with a beam.")
    flags.DEFINE_string("joint", "lcrec", "The model to whose distribution the others' are compared.")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
