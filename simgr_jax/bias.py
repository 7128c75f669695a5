"""Measures the bias of a comparison's trained models: what decoding loses, and how far they are from the truth.

    python -m simgr_jax.bias --workdir=DIR [--users=256] [--beam_widths=5,10,20,50,100] [--joint=autoregressive]

DIR is of `simgr_jax.compare`. Writes DIR/bias.json, DIR/bias.md and DIR/bias.png (docs/compare.md) with all models that
have an item distribution. One that spells items has to score every one of them for that, like a beam as wide as the
catalog: on a CPU, 256 users take minutes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags
from rich.markdown import Markdown

from simgr_jax import cli
from simgr_jax.cache import atomic_path
from simgr_jax.comparison import pictures
from simgr_jax.comparison.bias import measure
from simgr_jax.comparison.table import console, markdown_table
from simgr_jax.errors import UserError
from simgr_jax.evaluate import RANKING_FILE

# Header of a column: where its figure is, and in how many digits.
COLUMNS = {
    "exact NDCG@10": ("exact/NDCG@10", 4),
    "decoded": ("decoded/NDCG@10", 4),
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
    folder = Path(cli.required("workdir"))
    workdirs = {
        path.parents[1].name: path.parents[1] for path in sorted((folder / "runs").glob(f"*/report/{RANKING_FILE}"))
    }
    if not workdirs:
        raise UserError(f"{folder / 'runs'}: holds no finished run; run simgr_jax.compare in this workdir first")
    try:
        widths = [int(width) for width in values.beam_widths]
    except ValueError:
        raise UserError(f"--beam_widths: {','.join(values.beam_widths)} are no numbers; give some like 5,20") from None
    figures = measure(
        workdirs, users=values.users, batch_size=values.batch_size, beam_widths=widths, joint=values.joint
    )
    settings = {"users": values.users, "beam_widths": widths, "joint": values.joint}
    text = markdown(figures, settings)
    for name, content in (("bias.json", json.dumps(settings | {"models": figures}, indent=2)), ("bias.md", text)):
        with atomic_path(folder / name) as temporary:
            temporary.write_text(content + "\n", encoding="utf-8")
    pictures.write_bias(folder / "bias.png", figures)
    console().print(Markdown(text))
    print(f"the figures are in {folder / 'bias.json'}")


def markdown(figures: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Any]) -> str:
    """A table of all models, and one of the beams' widths."""
    flat = {name: _flat(found) for name, found in figures.items()}
    columns = {header: place for header, place in COLUMNS.items() if any(place[0] in found for found in flat.values())}
    rows = [
        [name, *(f"{found[key]:.{digits}f}" if key in found else "" for key, digits in columns.values())]
        for name, found in flat.items()
    ]
    text = f"{settings['users']} users. Joint: {settings['joint']}.\n\n" + markdown_table(["model", *columns], rows)
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
    flat = {key: value for key, value in found.items() if isinstance(value, float)}
    return flat | {f"{group}/{key}": value for group, values in groups.items() for key, value in values.items()}


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "The workdir of simgr_jax.compare.")
    flags.DEFINE_integer("users", 256, "How many users of the test split are asked about.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 16, "Users at once.", lower_bound=1)
    flags.DEFINE_list("beam_widths", ["5", "10", "20", "50", "100"], "Of models with a beam.")
    flags.DEFINE_string("joint", "autoregressive", "The model that others' distributions are measured from.")
    cli.run(main)
