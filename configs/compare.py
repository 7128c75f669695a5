"""SimGR and its rivals on one dataset, in one table.

    python -m simgr_jax.compare --config=configs/compare.py:beauty --config.base.data.path=DIR --workdir=DIR

`beauty`, `toys` and `instruments` are the datasets of configs/amazon.py, `synthetic` is the embedded data. All models
share one config, `base`: the data, the backbone, the training budget. Each row of `models` says what differs from it,
and `shared` holds overrides that several rows have in common. SimGR is compared with the generative rivals on equal
semantic IDs: one SimGR row has RPG's long IDs, and one has the short IDs that LC-Rec and TIGER spell. A third row,
`simgr_additive`, sums its logits over the levels as RPG does; it shows how much a richer item encoder gains.

Any key can be overridden: `--config.base.training.epochs=2` for all rows, `--config.trial_epochs=0` for no tuning,
`--config.models.simgr.seeds="(0,1,2)"` for three runs of one row, `--config.rows="('simgr','sasrec')"` for a smaller
table. To add a model, add its row.
"""

from __future__ import annotations

import copy
import runpy
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_collections

from simgr_jax.errors import UserError

DATASETS = ("beauty", "toys", "instruments", "synthetic")
SIMGR, GENERATIVE, TRADITIONAL = "scores items (SimGR)", "generates semantic IDs", "traditional"

# Each model has the same number of trials of the setting that matters most to it. The ranges are so wide that the best
# value is seldom at an end.
LEARNING_RATES = [{"optimizer": {"learning_rate": rate}} for rate in (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)]
# HSTU does best at .004 to .008, GRU4Rec at .008 to .016.
HIGHER_LEARNING_RATES = [{"optimizer": {"learning_rate": rate}} for rate in (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)]
# RPG's repository uses a rate of 0.01 and, for Beauty, a temperature of 0.03.
RPG = [
    {"optimizer": {"learning_rate": rate}, "rpg": {"temperature": temperature}}
    for rate, temperature in ((1e-3, 0.07), (2e-3, 0.07), (4e-3, 0.07), (1e-2, 0.07), (1e-2, 0.03))
]
SHRINKAGES = [{"item_knn": {"shrinkage": shrinkage}} for shrinkage in (0.0, 10.0, 100.0, 1000.0, 10000.0)]
NOTHING = MappingProxyType({})


def get_config(dataset: str = "") -> ml_collections.ConfigDict:
    """dataset: one of DATASETS."""
    if dataset not in DATASETS:
        raise UserError(f"--config=configs/compare.py:{dataset}: no such dataset; choose one of {', '.join(DATASETS)}")
    short, long = _semantic_ids(dataset)
    models = _models(dataset)
    return ml_collections.ConfigDict(
        {
            # The run config that all rows start from.
            "base": _base(dataset),
            # The table's rows, names of `models`.
            "rows": tuple(models),
            # The row that the others are tested against.
            "reference": "simgr",
            # Epochs of a row's trials; 0 runs no trials.
            "trial_epochs": 2,
            # This many trials, the best by validation NDCG@10, are then trained in full, and the best of these becomes
            # the row's run: what learns fastest at first need not be best in the end.
            "finalists": 2,
            # Speed is measured in rounds of batches of users.
            "inference": {"batch_size": 256, "batches": 16, "rounds": 5},
            # Overrides of `base` that several rows share, by name.
            "shared": {"short_ids": {"semantic_ids": short}, "long_ids": {"semantic_ids": long}},
            "models": models,
        }
    )


def _base(dataset: str) -> ml_collections.ConfigDict:
    file, arguments = ("quickstart.py", ()) if dataset == "synthetic" else ("amazon.py", (dataset,))
    return runpy.run_path(str(Path(__file__).with_name(file)))["get_config"](*arguments)


def _semantic_ids(dataset: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Short IDs: TIGER's three levels, plus a fourth that tells apart items with equal codes; or the IDs that the
    dataset was published with. Long IDs: RPG's OPQ codes."""
    fitted = {"source": "fit", "collisions": "level"}
    if dataset == "instruments":  # Without texts.
        long = fitted | {"embeddings": {"names": ("interactions",)}, "quantizer": {"name": "opq", "levels": 32}}
        return {"source": "given", "collisions": "level"}, long
    short = fitted | {"quantizer": {"name": "residual_kmeans", "levels": 3}}
    long = fitted | {"quantizer": {"name": "opq", "levels": 16 if dataset == "synthetic" else 32}}
    return short, long


def _models(dataset: str) -> dict[str, Any]:
    # With four tokens per item, a batch then holds about as many items as one of item positions. Rows are as short as
    # the longest history allows, because the cost of attention grows with a row's length.
    tokens = {"training": {"row_length": 2 * 64, "batch_rows": 2 * 16}}
    # TIGER's bidirectional encoder reads a history anew for each of its targets, which takes five times as long.
    causal = tokens | {"tiger": {"encoder": "causal"}}
    few_codes, many_codes = {"simgr": {"item_encoder": "mean_mlp"}}, {"simgr": {"item_encoder": "mean"}}
    if dataset == "instruments":
        simgr = {
            "simgr": _row(SIMGR, "simgr", few_codes, shares=("short_ids",)),
            "simgr_long_ids": _row(SIMGR, "simgr", many_codes, shares=("long_ids",)),
        }
    else:
        simgr = {
            "simgr": _row(SIMGR, "simgr", many_codes, shares=("long_ids",)),
            "simgr_short_ids": _row(SIMGR, "simgr", few_codes, shares=("short_ids",)),
        }
    additive = {"simgr": {"item_encoder": "mean", "similarity": "dot"}}
    return simgr | {
        "simgr_additive": _row(SIMGR, "simgr", additive, shares=("long_ids",)),
        "lcrec": _row(GENERATIVE, "lcrec", tokens, shares=("short_ids",)),
        "tiger": _row(GENERATIVE, "tiger", causal, shares=("short_ids",)),
        "rpg": _row(
            *(GENERATIVE, "rpg", {"rpg": {"decoding": "exhaustive"}}),
            shares=("long_ids",),
            trials=RPG,
        ),
        "rpg_graph": _row(
            *(GENERATIVE, "rpg", {"rpg": {"decoding": "graph"}}),
            shares=("long_ids",),
            trials=(),
            trained_as="rpg",
        ),
        # A quarter of the work: the search that RPG's repository first had for Beauty.
        "rpg_graph_narrow": _row(
            *(GENERATIVE, "rpg"),
            {"rpg": {"decoding": "graph", "beam_width": 10, "graph_neighbors": 100}},
            shares=("long_ids",),
            trials=(),
            trained_as="rpg",
        ),
        "hstu": _row(TRADITIONAL, "hstu", trials=HIGHER_LEARNING_RATES),
        "sasrec": _row(TRADITIONAL, "sasrec", {"sasrec": {"loss": "full"}}),
        "sasrec_binary": _row(TRADITIONAL, "sasrec", {"sasrec": {"loss": "binary"}}),
        "bert4rec": _row(TRADITIONAL, "bert4rec"),
        "gru4rec": _row(TRADITIONAL, "gru4rec", trials=HIGHER_LEARNING_RATES),
        "item_knn": _row(TRADITIONAL, "item_knn", trials=SHRINKAGES),
        "popularity": _row(TRADITIONAL, "popularity", trials=()),
    }


def _row(
    family: str, name: str, changes: Mapping[str, Any] = NOTHING, *, shares=(), trials=LEARNING_RATES, trained_as=""
) -> dict[str, Any]:
    overrides = {"model": name, **changes}
    # Copies, because rows that share a dictionary would also share changes to it.
    return {
        # The kind of model, in words.
        "family": family,
        # Names of `shared`, and the row's own overrides of `base`.
        "shares": shares,
        "overrides": copy.deepcopy(overrides),
        # The seeds of the row's runs; trials use the first. () is the seed of `base`.
        "seeds": (),
        "trials": {f"trial{number}": copy.deepcopy(trial) for number, trial in enumerate(trials, start=1)},
        # A row above this one whose trained models this row takes over, to decode them in another way.
        "trained_as": trained_as,
    }
