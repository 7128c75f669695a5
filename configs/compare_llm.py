"""What a pretrained LLM adds: SimGR on it, on its shape with random weights, without each part, and without an LLM.

    python -m simgr_jax.compare --config=configs/compare_llm.py --config.base.data.path=DIR --workdir=DIR \\
        --config.shared.llm.backbone.checkpoint=LLM --config.shared.random.backbone.checkpoint=RANDOM \\
        --config.models.small_with_text.overrides.item_reader.checkpoint=LLM

LLM is a checkpoint, and RANDOM the same model with random weights (`python -m benchmarks.llm_variant --random`). The
data are in the P5 format, with titles. All rows have the same epochs and batches. A row reads texts with the LLM that
it trains.

`configs/compare_llm.py:depth` compares the LLM's first layers and their random twins, which benchmarks.llm_variant
writes to workdirs/llm_6_layers, workdirs/random_6_layers and so on. All of them read texts with LLM, or with RANDOM.

    python -m simgr_jax.compare --config=configs/compare_llm.py:depth --config.base.data.path=DIR --workdir=DIR \\
        --config.shared.llm.item_reader.checkpoint=LLM --config.shared.random.item_reader.checkpoint=RANDOM

`configs/compare_llm.py:prompts` compares what the LLM reads of an item: one position, its codes, or its title as well,
in several templates and lengths.

    python -m simgr_jax.compare --config=configs/compare_llm.py:prompts --config.base.data.path=DIR --workdir=DIR \\
        --config.shared.llm.backbone.checkpoint=LLM
"""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import ml_collections

from simgr_jax import default_config
from simgr_jax.errors import UserError

TABLES = ("parts", "depth", "prompts")
LAYERS = (6, 12, 18, 24, 30)
SEEDS = (0, 1, 2)

LLM, SCRATCH, TRADITIONAL = "SimGR on an LLM", "SimGR from scratch", "traditional"

RATES = [{"optimizer": {"learning_rate": rate}} for rate in (1e-3, 2e-3, 4e-3)]
SHRINKAGES = [{"item_knn": {"shrinkage": shrinkage}} for shrinkage in (100.0, 1000.0, 10000.0)]
FROM_TEXT = {
    "semantic_ids": {"embeddings": {"names": ("llm", "interactions")}},
    "simgr": {"item_text": "read"},
}
REPEATS = {"simgr": {"repeat_bias": True}}

_row = runpy.run_path(str(Path(__file__).with_name("compare.py")))["_row"]


def get_config(table: str = "parts") -> ml_collections.ConfigDict:
    """table: one of TABLES."""
    if table not in TABLES:
        raise UserError(f"--config=configs/compare_llm.py:{table}: no such table; choose one of {', '.join(TABLES)}")
    models = {"parts": _parts, "depth": _depths, "prompts": _prompts}[table]()
    return ml_collections.ConfigDict(
        {
            "base": _base(),
            "rows": tuple(models),
            "reference": next(iter(models)),
            "trial_epochs": 2,
            "finalists": 1,
            "inference": {"batch_size": 256, "batches": 1, "rounds": 3},
            "shared": {
                "llm": _llm(table) | {"lora": {"rank": 16}, "optimizer": {"backbone": {"learning_rate": 3e-4}}},
                "random": _llm(table) | {"optimizer": {"backbone": {"learning_rate": 2e-4}}},
                "text": FROM_TEXT,
                "repeats": REPEATS,
            },
            "models": models,
        }
    )


def _llm(table: str) -> dict[str, Any]:
    """What the LLM and its random twin share."""
    backbone = {"checkpoint": "", "token_init": "reading", "dropout": 0.0, "remat": "dots"}
    return {"backbone": backbone} | ({"item_reader": {"checkpoint": ""}} if table == "depth" else {})


def _parts() -> dict[str, dict[str, Any]]:
    """The whole recipe, its rivals, and the recipe without each of its parts."""
    models = {
        "pretrained": _row(LLM, "simgr", shares=("repeats", "text", "llm"), trials=()),
        # All weights are trained: adapters on random weights would be no rival.
        "random": _row(LLM, "simgr", shares=("repeats", "text", "random"), trials=()),
        # The LLM that reads the texts is a second one, as the first is trained to read histories.
        "trained_reader": _row(
            LLM,
            "simgr",
            {"simgr": {"item_text": "trained", "item_text_tokens": 2048}, "training": {"freeze_epochs": 1.0}},
            shares=("repeats", "text", "llm"),
            trials=(),
        ),
        "without_readout": _row(
            *(LLM, "simgr", {"simgr": {"readout": "state"}}), shares=("repeats", "text", "llm"), trials=()
        ),
        "without_repeats": _row(LLM, "simgr", shares=("text", "llm"), trials=()),
        "without_text": _row(
            *(LLM, "simgr", {"backbone": {"token_init": "mean"}}), shares=("repeats", "llm"), trials=()
        ),
        "small": _row(SCRATCH, "simgr", shares=("repeats",), trials=RATES),
        "small_with_text": _row(
            *(SCRATCH, "simgr", {"item_reader": {"checkpoint": ""}}), shares=("repeats", "text"), trials=RATES
        ),
        "sasrec": _row(TRADITIONAL, "sasrec", {"sasrec": {"loss": "full"}}, trials=RATES),
        "item_knn": _row(TRADITIONAL, "item_knn", trials=SHRINKAGES),
        "popularity": _row(TRADITIONAL, "popularity", trials=()),
    }
    for name in ("pretrained", "random", "small", "small_with_text", "sasrec"):
        models[name]["seeds"] = SEEDS
    return models


def _depths() -> dict[str, dict[str, Any]]:
    """The LLM's first layers and their random twins, deepest first."""
    return {
        f"{name}_{layers}": _row(
            *(LLM, "simgr", {"backbone": {"checkpoint": f"workdirs/{folder}_{layers}_layers"}}),
            shares=("repeats", "text", folder),
            trials=(),
        )
        for layers in reversed(LAYERS)
        for name, folder in (("pretrained", "llm"), ("random", "random"))
    }


def _prompts() -> dict[str, dict[str, Any]]:
    """What the LLM reads of an item."""

    def tokens(item: str, title_tokens: int = 12, prefix: str = "", **data: int) -> dict[str, Any]:
        prompt = {"item": item, "prefix": prefix} | ({"max_title_tokens": title_tokens} if "{title}" in item else {})
        # A row has room for the longest prompt.
        training = {"row_length": 0, "batch_rows": 0}
        return {"simgr": {"history": "tokens"}, "prompt": prompt, "training": training, "data": data}

    prompts = {
        "item": {},
        "codes": tokens("{codes}"),
        "title_6": tokens("\n{title} {codes}", 6),
        "title_12": tokens("\n{title} {codes}"),
        "title_24": tokens("\n{title} {codes}", 24),
        "title_12_of_8_items": tokens("\n{title} {codes}", max_items=8),
        "title_12_after_words": tokens("\n{title} {codes}", prefix="A customer bought, oldest first:"),
    }
    return {
        name: _row(LLM, "simgr", overrides, shares=("repeats", "text", "llm"), trials=())
        for name, overrides in prompts.items()
    }


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
