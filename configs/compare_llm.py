"""What a pretrained LLM adds: SimGR on it, on its shape with random weights, without each part, and without an LLM.

    python -m simgr_jax.compare --config=configs/compare_llm.py --config.base.data.path=DIR --workdir=DIR \\
        --config.shared.llm.backbone.checkpoint=LLM --config.shared.random.backbone.checkpoint=RANDOM \\
        --config.models.small_with_text.overrides.item_reader.checkpoint=LLM

LLM is a checkpoint, and RANDOM the same model with random weights. The data are in the P5 format, with titles. All rows
have the same epochs and batches. A row reads texts with the LLM that it trains.
"""

from __future__ import annotations

import runpy
from pathlib import Path

import ml_collections

from simgr_jax import default_config

LLM, SCRATCH, TRADITIONAL = "SimGR on an LLM", "SimGR from scratch", "traditional"

RATES = [{"optimizer": {"learning_rate": rate}} for rate in (1e-3, 2e-3, 4e-3)]
SHRINKAGES = [{"item_knn": {"shrinkage": shrinkage}} for shrinkage in (100.0, 1000.0, 10000.0)]
FROM_TEXT = {
    "semantic_ids": {"embeddings": {"names": ("llm", "interactions")}},
    "simgr": {"item_text": "read"},
}
REPEATS = {"simgr": {"repeat_bias": True}}


def get_config() -> ml_collections.ConfigDict:
    row = runpy.run_path(str(Path(__file__).with_name("compare.py")))["_row"]
    backbone = {"checkpoint": "", "token_init": "reading", "dropout": 0.0, "remat": "dots"}
    models = {
        "pretrained": row(LLM, "simgr", shares=("repeats", "text", "llm"), trials=()),
        # All weights are trained: adapters on random weights would be no rival.
        "random": row(LLM, "simgr", shares=("repeats", "text", "random"), trials=()),
        "without_readout": row(
            *(LLM, "simgr", {"simgr": {"readout": "state"}}), shares=("repeats", "text", "llm"), trials=()
        ),
        "without_repeats": row(LLM, "simgr", shares=("text", "llm"), trials=()),
        "without_text": row(
            *(LLM, "simgr", {"backbone": {"token_init": "mean"}}), shares=("repeats", "llm"), trials=()
        ),
        "small": row(SCRATCH, "simgr", shares=("repeats",), trials=RATES),
        "small_with_text": row(
            *(SCRATCH, "simgr", {"item_reader": {"checkpoint": ""}}), shares=("repeats", "text"), trials=RATES
        ),
        "sasrec": row(TRADITIONAL, "sasrec", {"sasrec": {"loss": "full"}}, trials=RATES),
        "item_knn": row(TRADITIONAL, "item_knn", trials=SHRINKAGES),
        "popularity": row(TRADITIONAL, "popularity", trials=()),
    }
    return ml_collections.ConfigDict(
        {
            "base": _base(),
            "rows": tuple(models),
            "reference": "pretrained",
            "trial_epochs": 2,
            "finalists": 1,
            "inference": {"batch_size": 256, "batches": 4, "rounds": 3},
            "shared": {
                "llm": {
                    "backbone": dict(backbone),
                    "lora": {"rank": 16},
                    "optimizer": {"backbone": {"learning_rate": 3e-4}},
                },
                "random": {
                    "backbone": dict(backbone),
                    "optimizer": {"backbone": {"learning_rate": 2e-4}},
                },
                "text": FROM_TEXT,
                "repeats": REPEATS,
            },
            "models": models,
        }
    )


def _base() -> ml_collections.ConfigDict:
    """From scratch, two layers of width 128."""
    config = default_config.get_config()
    config.data.format = "p5"
    config.semantic_ids.embeddings.names = ("tfidf", "interactions")
    config.semantic_ids.quantizer.update({"name": "residual_kmeans", "levels": 4})
    # Short rows, so that a small shop gives enough steps.
    config.training.update({"epochs": 3, "batch_rows": 4, "row_length": 64})
    config.evaluation.batch_size = 128
    return config
