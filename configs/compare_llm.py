"""What a pretrained LLM adds: SimGR on it, on its shape with random weights, without each part, and without an LLM.

    python -m simgr_jax.compare --config=configs/compare_llm.py --config.base.data.path=DIR --workdir=DIR \\
        --config.base.backbone.checkpoint=LLM --config.models.random.overrides.backbone.checkpoint=RANDOM \\
        --config.base.item_reader.checkpoint=LLM --config.models.random.overrides.item_reader.checkpoint=RANDOM

LLM is a checkpoint, and RANDOM the same model with random weights. The data are in the P5 format, with real titles. All
rows have the same epochs and the same trials of learning rates.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import ml_collections

_HERE = Path(__file__).parent
LLM, SCRATCH, TRADITIONAL = "SimGR on an LLM", "SimGR from scratch", "traditional"

RATES = [{"optimizer": {"learning_rate": rate}} for rate in (5e-4, 1e-3, 2e-3)]
SHRINKAGES = [{"item_knn": {"shrinkage": shrinkage}} for shrinkage in (0.0, 10.0, 100.0)]
# From scratch: the small model of configs/amazon.py.
SMALL = {
    "backbone": {"checkpoint": "", "width": 128, "layers": 2, "dropout": 0.3, "remat": "none", "dtype": "float32"},
    "lora": {"rank": 0},
}
TFIDF = {"semantic_ids": {"embeddings": {"names": ("tfidf", "interactions")}}}


def get_config() -> ml_collections.ConfigDict:
    base = runpy.run_path(str(_HERE / "llm.py"))["get_config"]()
    base.data.format = "p5"
    models = _models()
    return ml_collections.ConfigDict(
        {
            "base": base,
            "rows": tuple(models),
            "reference": "pretrained",
            "trial_epochs": 1,
            "finalists": 1,
            "inference": {"batch_size": 256, "batches": 4, "rounds": 3},
            "shared": {},
            "models": models,
        }
    )


def _models() -> dict[str, Any]:
    row = runpy.run_path(str(_HERE / "compare.py"))["_row"]
    none = {"simgr": {"item_text": "none"}, "backbone": {"token_init": "mean"}}

    def llm(*changes: dict[str, Any], trials: Any = ()) -> dict[str, Any]:
        return row(LLM, "simgr", _merged(*changes), trials=trials)

    return {
        "pretrained": llm(trials=RATES),
        # All weights are trained: adapters on random weights would be no rival.
        "random": llm(
            {"backbone": {"checkpoint": ""}, "item_reader": {"checkpoint": ""}, "lora": {"rank": 0}}, trials=RATES
        ),
        "without_readout": llm({"simgr": {"readout": "state"}}),
        "without_text": llm(none, TFIDF),
        "without_prior": llm({"simgr": {"popularity_prior": 0.0}}),
        "small": row(SCRATCH, "simgr", _merged(SMALL, none, TFIDF), trials=RATES),
        "small_with_text": row(SCRATCH, "simgr", _merged(SMALL, {"backbone": {"token_init": "mean"}}), trials=RATES),
        "sasrec": row(TRADITIONAL, "sasrec", _merged(SMALL, {"sasrec": {"loss": "full"}}), trials=RATES),
        "item_knn": row(TRADITIONAL, "item_knn", trials=SHRINKAGES),
        "popularity": row(TRADITIONAL, "popularity", trials=()),
    }


def _merged(*changes: dict[str, Any]) -> dict[str, Any]:
    """The union of nested changes."""
    merged = ml_collections.ConfigDict()
    for change in changes:
        merged.update(ml_collections.ConfigDict(change))
    return merged.to_dict()
