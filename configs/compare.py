"""SimGR and its rivals on one dataset, in one table.

    python -m simgr_jax.compare --config=configs/compare.py:beauty --config.base.data.path=DIR --workdir=DIR

`beauty`, `toys` and `instruments` are configs/amazon.py's, `synthetic` is the embedded data. All models begin with the
same config, `base`: the data, the backbone, the training budget. A row of `models` says what is different, and
`shared` what several rows have: SimGR and the generative rivals are compared with equal semantic IDs, so there is a
SimGR row with those that the parallel rival needs (long ones) and one with those that the others spell (short ones).
A third, whose logits are a sum over the levels as the parallel rival's are, tells what an item encoder that is more
than a sum gains.

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

# Each model has as many trials; their settings are what matters most for it, so wide that the best is seldom at an end.
LEARNING_RATES = [{"optimizer": {"learning_rate": rate}} for rate in (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)]
# HSTU does best at .004 to .008, GRU4Rec at .008 to .016.
HIGHER_LEARNING_RATES = [{"optimizer": {"learning_rate": rate}} for rate in (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)]
# RPG's own are a rate of 0.01 and, for Beauty, a temperature of 0.03.
PARALLEL = [
    {"optimizer": {"learning_rate": rate}, "parallel": {"temperature": temperature}}
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
            # A run's config, that all rows begin with.
            "base": _base(dataset),
            # The table's rows, of `models`.
            "rows": tuple(models),
            # The one that the others are tested against.
            "reference": "simgr",
            # A row's trials are trained so long; 0 does without.
            "trial_epochs": 2,
            # So many of them, those with the best validation NDCG@10, are then trained in full, and the best of these
            # is the row's: what learns fastest at first need not be best in the end.
            "finalists": 2,
            # Speed is measured on so many batches of so many users, in so many rounds.
            "inference": {"batch_size": 256, "batches": 16, "rounds": 5},
            # What several rows have: overrides of `base` by name.
            "shared": {"short_ids": {"semantic_ids": short}, "long_ids": {"semantic_ids": long}},
            "models": models,
        }
    )


def _base(dataset: str) -> ml_collections.ConfigDict:
    file, arguments = ("quickstart.py", ()) if dataset == "synthetic" else ("amazon.py", (dataset,))
    return runpy.run_path(str(Path(__file__).with_name(file)))["get_config"](*arguments)


def _semantic_ids(dataset: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Short ones: three levels and a fourth that tells apart the items they don't, as TIGER has them, or what the
    dataset was published with. Long ones: OPQ codes, as RPG has them."""
    fitted = {"source": "fit", "collisions": "level"}
    if dataset == "instruments":  # Without texts.
        long = fitted | {"embeddings": {"names": ("interactions",)}, "quantizer": {"name": "opq", "levels": 32}}
        return {"source": "given", "collisions": "level"}, long
    short = fitted | {"quantizer": {"name": "residual_kmeans", "levels": 3}}
    long = fitted | {"quantizer": {"name": "opq", "levels": 16 if dataset == "synthetic" else 32}}
    return short, long


def _models(dataset: str) -> dict[str, Any]:
    # A batch then holds about as many items as one of item positions, four tokens each. Rows as short as the longest
    # history allows: attention looks at a whole row, and what it costs grows with its length.
    tokens = {"model": {"history": "tokens"}, "training": {"row_length": 2 * 64, "batch_rows": 2 * 16}}
    # TIGER's encoder reads both ways, and so reads a history anew for each of its targets: five times the time.
    causal = tokens | {"encoder_decoder": {"encoder": "causal"}}
    few_codes, many_codes = {"model": {"item_encoder": "mean_mlp"}}, {"model": {"item_encoder": "mean"}}
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
    additive = {"model": {"item_encoder": "mean", "similarity": "dot"}}
    return simgr | {
        "simgr_additive": _row(SIMGR, "simgr", additive, shares=("long_ids",)),
        "autoregressive": _row(GENERATIVE, "autoregressive", tokens, shares=("short_ids",)),
        "encoder_decoder": _row(GENERATIVE, "encoder_decoder", causal, shares=("short_ids",)),
        "parallel": _row(
            *(GENERATIVE, "parallel", {"parallel": {"decoding": "exhaustive"}}),
            shares=("long_ids",),
            trials=PARALLEL,
        ),
        "parallel_graph": _row(
            *(GENERATIVE, "parallel", {"parallel": {"decoding": "graph"}}),
            shares=("long_ids",),
            trials=(),
            trained_as="parallel",
        ),
        # A quarter of the work, as RPG's repository first had it for Beauty.
        "parallel_graph_narrow": _row(
            *(GENERATIVE, "parallel"),
            {"parallel": {"decoding": "graph", "beam_width": 10, "graph_neighbors": 100}},
            shares=("long_ids",),
            trials=(),
            trained_as="parallel",
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
    overrides = {**changes, "model": {"name": name, **changes.get("model", {})}}
    # Copies, because a ConfigDict keeps what is one dictionary one: overriding a row's key would change other rows'.
    return {
        # What kind of model it is, in words.
        "family": family,
        # Keys of `shared`, and what else is not as in `base`.
        "shares": shares,
        "overrides": copy.deepcopy(overrides),
        # Of its runs, the first of them also of its trials; () is base's.
        "seeds": (),
        "trials": {f"trial{number}": copy.deepcopy(trial) for number, trial in enumerate(trials, start=1)},
        # A row above it whose trained models this one takes over, to decode them in another way.
        "trained_as": trained_as,
    }
