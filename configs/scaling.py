"""SimGR and its rivals with backbones of several sizes, in one table and one picture of accuracy against size.

    python -m simgr_jax.compare --config=configs/scaling.py:beauty --config.base.data.path=DIR --workdir=DIR

A row is MODEL_SIZE, like `simgr_small`: a row of configs/compare.py with a backbone of SIZES. Each has its own trials.
"""

from __future__ import annotations

import copy
import runpy
from pathlib import Path

import ml_collections

from simgr_jax.errors import UserError
from simgr_jax.models import registry

MODELS = ("simgr", "lcrec", "rpg", "sasrec")
# Width, layers and heads. Heads are 32 wide, MLPs four times as wide as the model.
SIZES = {"tiny": (32, 1, 1), "small": (64, 2, 2), "medium": (128, 2, 4), "large": (256, 4, 8)}


def get_config(dataset: str = "") -> ml_collections.ConfigDict:
    """dataset: one of configs/compare.py's."""
    comparison = runpy.run_path(str(Path(__file__).with_name("compare.py")))
    if dataset not in comparison["DATASETS"]:
        known = ", ".join(comparison["DATASETS"])
        raise UserError(f"--config=configs/scaling.py:{dataset}: no such dataset; choose one of {known}")
    config = comparison["get_config"](dataset)
    rows = {f"{model}_{size}": _row(config.models[model], size) for model in MODELS for size in SIZES}
    config.models, config.rows = rows, tuple(rows)
    config.reference = f"{MODELS[0]}_{list(SIZES)[-1]}"
    return config


def _row(row: ml_collections.ConfigDict, size: str) -> ml_collections.ConfigDict:
    width, layers, heads = SIZES[size]
    backbone = {"width": width, "layers": layers, "heads": heads, "kv_heads": heads, "head_width": width // heads}
    backbone["mlp_width"] = 4 * width
    row = copy.deepcopy(row)
    read = registry.module_of(row.overrides.model).Options.backbone_keys
    row.overrides.backbone = {key: value for key, value in backbone.items() if key in read}
    return row
