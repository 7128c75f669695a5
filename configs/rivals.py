"""One row of configs/compare.py, as a config of its own run.

    python -m simgr_jax.train --config=configs/rivals.py:beauty-sasrec --config.data.path=DIR --workdir=DIR

After the colon are a dataset and a row of configs/compare.py.
"""

from __future__ import annotations

import runpy
from pathlib import Path

import ml_collections

from simgr_jax.comparison import rows
from simgr_jax.errors import UserError


def get_config(dataset_and_row: str = "") -> ml_collections.ConfigDict:
    dataset, _, name = dataset_and_row.partition("-")
    comparison = runpy.run_path(str(Path(__file__).with_name("compare.py")))
    if dataset not in comparison["DATASETS"]:
        known = ", ".join(comparison["DATASETS"])
        raise UserError(
            f"--config=configs/rivals.py:{dataset_and_row}: is not DATASET-ROW; choose a dataset of {known}"
        )
    found = {row.name: row.config for row in rows.read(comparison["get_config"](dataset))}
    if name not in found:
        raise UserError(
            f"--config=configs/rivals.py:{dataset_and_row}: is not DATASET-ROW; choose a row of {', '.join(found)}"
        )
    return found[name]
