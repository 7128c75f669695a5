"""Compiles train steps of Qwen3 for TPU slices and records their memory and the bounds on their speed.

    python -m benchmarks.scale [--part=table|weak_scaling|llm] [--only=qwen3-8b,v5e]
    python -m benchmarks.scale --markdown    # compiles nothing; prints the tables of results/scale.md

Needs libtpu (pip install "jax[tpu]") but no TPU. Each case is compiled in a separate process and takes a minute or two.
Cases that are already in results/scale.json, results/weak_scaling.json or results/llm_memory.json are skipped, so that
an interrupted run can continue; remove the file to start again.
"""

from __future__ import annotations

import importlib.metadata
import json
import multiprocessing
import runpy
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jax
from absl import flags

from benchmarks import record
from simgr_jax import cli
from simgr_jax.devices.chips import CHIPS, Chip

MODELS = Path(__file__).parent / "scale_models"
ITEMS = (100_000, 1_000_000, 10_000_000)
ROW_LENGTH = 512
# Each model has the same number of chips of every kind.
SLICES = {
    "qwen3-0.6b": {"v5e": "4x4", "v5p": "2x2x4", "v6e": "4x4"},
    "qwen3-4b": {"v5e": "8x8", "v5p": "4x4x4", "v6e": "8x8"},
    "qwen3-8b": {"v5e": "16x16", "v5p": "4x8x8", "v6e": "16x16"},
}
# The faster a chip is relative to its links, the more rows it needs to stay busy while parameters travel.
ROWS_PER_CHIP = {"v5e": 4, "v5p": 8, "v6e": 16}
# Histories of codes as tokens, four per item.
OPTIONS = {
    "mesh.data": 4,
    "backbone.remat": "full",
    "backbone.token_init": "mean",
    "simgr.history": "tokens",
    "simgr.item_text": "none",
    "simgr.repeat_bias": False,
}

WEAK_MODEL, WEAK_ITEMS, WEAK_ROWS = "qwen3-0.6b", 1_000_000, 4
WEAK_SLICES = ("2x2", "4x4", "8x8", "16x16")


def table() -> Iterator[tuple[str, dict[str, Any]]]:
    """Each case's name and the arguments for `measure`."""
    for model in reversed(SLICES):
        for kind, shape in SLICES[model].items():
            for way in ("full", "lora"):
                for num_items in reversed(ITEMS):
                    yield (
                        f"{model} {way} {num_items} {kind}:{shape}",
                        {
                            "model": model,
                            "way": way,
                            "num_items": num_items,
                            "topology": f"{kind}:{shape}",
                            "rows": ROWS_PER_CHIP[kind],
                            "options": OPTIONS,
                        },
                    )


def weak_scaling() -> Iterator[tuple[str, dict[str, Any]]]:
    """Like `table`: constant work per chip on growing slices, with an fsdp axis alone and with a data axis of 4."""
    for data in (1, 4):
        for shape in WEAK_SLICES:
            yield (
                f"v5e:{shape} data {data}",
                {
                    "model": WEAK_MODEL,
                    "way": "full",
                    "num_items": WEAK_ITEMS,
                    "topology": f"v5e:{shape}",
                    "rows": WEAK_ROWS,
                    "options": OPTIONS | {"mesh.data": data},
                },
            )


# What the llm configs need: batches as they choose them, or for tokens rows of 512. A chip with 95 GiB shows the whole
# need, and four of them what the largest model needs with all weights.
ONE_CHIP, FOUR_CHIPS = "v5p:1x1x1", "v5p:2x2x1"
LLM_ROWS, LLM_ITEMS = 16, 100_000
BY_TOKENS = {"simgr.history": "tokens", "prompt.prefix": "", "prompt.item": "{codes}"}
LLM_WAYS = {"lora": ("lora", 64, {}), "tokens": ("titles", 512, BY_TOKENS), "full": ("full", 64, {})}


def llm() -> Iterator[tuple[str, dict[str, Any]]]:
    """Like `table`: the configs of configs/llm.py on one chip."""
    for model in ("qwen3-0.6b", "qwen3-1.7b", "qwen3-8b"):
        for name, (way, row_length, options) in LLM_WAYS.items():
            topology = FOUR_CHIPS if (model, name) == ("qwen3-8b", "full") else ONE_CHIP
            chips = 4 if topology == FOUR_CHIPS else 1
            yield (
                f"{model} {name} {LLM_ITEMS} {topology}",
                {
                    "model": model,
                    "way": way,
                    "num_items": LLM_ITEMS,
                    "topology": topology,
                    "rows": LLM_ROWS // chips,
                    "options": options | {"training.row_length": row_length},
                },
            )


PARTS = {"table": ("scale", table), "weak_scaling": ("weak_scaling", weak_scaling), "llm": ("llm_memory", llm)}


def measure(model: str, way: str, num_items: int, topology: str, rows: int, options: dict[str, Any]) -> dict[str, Any]:
    """Compiles one case.

    Args:
      rows: rows per chip.
      options: config keys and their values.
    """
    from simgr_jax.compilation import step_report
    from simgr_jax.compilation.topology import open_topology
    from simgr_jax.compilation.train_step import PlannedRun

    opened = open_topology(topology)
    config = runpy.run_path(str(record.ROOT / "configs" / "llm.py"))["get_config"](way)
    config.backbone.checkpoint = str(MODELS / model)
    config.training.row_length = ROW_LENGTH
    config.training.batch_rows = config.evaluation.batch_size = rows * len(opened.devices)
    config.update_from_flattened_dict(options)
    with tempfile.TemporaryDirectory() as folder:
        found = step_report.compile_step(
            PlannedRun(config, Path(folder), num_items, opened.devices[0].platform), opened
        )
    figures = {
        "fits": found.fits,
        "peak_gib": round(found.peak / step_report.GIB, 2),
        "hbm_gib": opened.chip.hbm_gib,
        "chips": len(opened.devices),
        "mesh": found.mesh,
        "rows": config.training.batch_rows,
        "compile_seconds": round(found.seconds),
    }
    return figures | (_speed(found) if found.fits else {})


def _speed(found) -> dict[str, Any]:
    times, cost = found.times, found.cost
    return {
        "compute_ms": round(1000 * times.compute, 2),
        "memory_ms": round(1000 * times.memory, 2),
        "collectives_ms": round(1000 * times.collectives, 2),
        "bound_ms": round(1000 * times.bound, 2),
        "serial_ms": round(1000 * times.serial, 2),
        "utilisation_at_bound": round(found.utilisation(times.bound), 3),
        "utilisation_serial": round(found.utilisation(times.serial), 3),
        "collective_share_serial": round(times.collectives / times.serial, 3),
        "model_tflop_per_chip": round(found.model_flops / 1e12, 3),
        "tflop_per_chip": round(cost.flops / 1e12, 3),
        "memory_gb": round(cost.memory_bytes / 1e9, 2),
        "collective_gb": {kind: round(size / 1e9, 3) for kind, (_, size) in cost.collectives.items()},
        "uncounted": cost.uncounted,
    }


def _markdown(part: str, figures: dict[str, dict[str, Any]]) -> None:
    """Prints a part's table, one row per case."""
    if part != "weak_scaling":
        columns = ["model", "trained", "items", "slice", "rows", "fits", "peak GiB", "at best ms", "utilisation"]
        columns += ["in sequence ms", "utilisation"]
    else:
        columns = ["chips", "data × fsdp", "compute ms", "HBM ms", "collectives ms", "share in sequence"]
        columns += ["utilisation at best", "in sequence"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for case, found in figures.items():
        print(f"| {' | '.join((_scaling_row if part == 'weak_scaling' else _table_row)(case, found))} |")
    print()


def _table_row(case: str, found: dict[str, Any]) -> list[str]:
    model, way, num_items, topology = case.split()
    memory = f"{found['peak_gib']:.1f} of {found['hbm_gib']:g}"
    row = [model, way, f"{int(num_items):,}", topology, f"{found['rows']:,}", "yes" if found["fits"] else "no", memory]
    if not found["fits"]:
        return [*row, "", "", "", ""]
    best = [f"{found['bound_ms']:,.0f}", f"{found['utilisation_at_bound']:.0%}"]
    return [*row, *best, f"{found['serial_ms']:,.0f}", f"{found['utilisation_serial']:.0%}"]


def _scaling_row(_: str, found: dict[str, Any]) -> list[str]:
    mesh = found["mesh"]
    times = [f"{found[name]:.1f}" for name in ("compute_ms", "memory_ms", "collectives_ms")]
    shares = [
        f"{found[name]:.0%}" for name in ("collective_share_serial", "utilisation_at_bound", "utilisation_serial")
    ]
    return [str(found["chips"]), f"{mesh['data']} × {mesh['fsdp']}", *times, *shares]


def _rates(chip: Chip) -> dict[str, float]:
    return {field: getattr(chip, field) for field in ("hbm_gib", "flops", "hbm_bandwidth", "link_bandwidth")}


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    only = [word for word in flags.FLAGS.only.split(",") if word]
    for part in [flags.FLAGS.part] if flags.FLAGS.part else list(PARTS):
        name, cases = PARTS[part]
        path = record.ROOT / "results" / f"{name}.json"
        figures = json.loads(path.read_text(encoding="utf-8"))["figures"] if path.exists() else {}
        if flags.FLAGS.markdown:
            # Print in the order of the cases, not of compilation.
            _markdown(part, {case: figures[case] for case, _ in cases() if case in figures})
            continue
        of_part = (
            {"ways": {name: [config, length, options] for name, (config, length, options) in LLM_WAYS.items()}}
            if part == "llm"
            else {"row_length": ROW_LENGTH, "options": OPTIONS}
        )
        config = of_part | {
            "items_code_levels": 4,
            "chips": {kind: _rates(CHIPS[kind]) for kind in ROWS_PER_CHIP},
            "libtpu": importlib.metadata.version("libtpu"),
        }
        for case, arguments in cases():
            if case in figures or not all(word in case for word in only):
                continue
            # A separate process returns all of its memory.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                figures[case] = pool.submit(measure, **arguments).result()
            print(case, figures[case], flush=True)
            record.write(name, figures, config, seed=0)


if __name__ == "__main__":
    flags.DEFINE_enum("part", None, list(PARTS), "The part to run; all by default.")
    flags.DEFINE_bool("markdown", False, "Print the results as tables.")
    flags.DEFINE_string("only", "", "Words, separated by commas, that a case's name must contain.")
    cli.run(main)
