"""A training run of seconds on sequences that can be learned: most of the time one item follows another."""

from __future__ import annotations

import json
from pathlib import Path

import ml_collections
import numpy as np
from flax import nnx

from simgr_jax import default_config
from simgr_jax.data.dataset import EvaluationCases, Sequences, Split
from simgr_jax.evaluation.ranking import Ranker
from simgr_jax.inputs import prompts
from simgr_jax.models.registry import create
from simgr_jax.semantic_ids.codes import SemanticIds
from simgr_jax.training.loop import fit

NUM_ITEMS = 30


def config(**training) -> ml_collections.ConfigDict:
    tiny = default_config.get_config()
    tiny.data.max_items = 6
    tiny.model.item_encoder_width = 8
    tiny.backbone.update(
        {"width": 16, "layers": 1, "heads": 2, "kv_heads": 1, "head_width": 8, "mlp_width": 16, "dropout": 0.2}
    )
    tiny.optimizer.learning_rate = 2e-2
    tiny.training.update({"epochs": 4, "batch_rows": 4, "row_length": 12, "log_every_steps": 4} | training)
    tiny.evaluation.batch_size = 32
    return tiny


def split() -> Split:
    generator = np.random.default_rng(0)
    circle = generator.permutation(NUM_ITEMS)  # What follows an item has nothing to do with its code.
    users = []
    for length in generator.integers(5, 9, 64):
        steps = np.where(generator.random(length) < 0.9, 1, generator.integers(0, NUM_ITEMS, length))
        users.append(circle[(generator.integers(NUM_ITEMS) + np.cumsum(steps)) % NUM_ITEMS])

    def cases(end):
        histories = Sequences.from_lists(user[:end] for user in users)
        return EvaluationCases(np.arange(64), histories, np.array([user[end] for user in users]))

    return Split(Sequences.from_lists(user[:-2] for user in users), cases(-2), cases(-1))


SEMANTIC_IDS = SemanticIds(np.stack(np.divmod(np.arange(NUM_ITEMS), 6), axis=1).astype(np.int32), (5, 6))


def prompt(config: ml_collections.ConfigDict) -> prompts.Prompt:
    return prompts.create(config, SEMANTIC_IDS, item_texts=None, tokenizer=None)


def model_and_ranker(config: ml_collections.ConfigDict):
    model = create(config, SEMANTIC_IDS, split().train)
    ranker = Ranker(
        nnx.graphdef(model),
        prompt=prompt(config),
        batch_size=config.evaluation.batch_size,
        max_items=config.data.max_items,
        row_length=config.training.row_length,
        k=10,
        filter_history=False,
    )
    return model, ranker


def train(config: ml_collections.ConfigDict, workdir: Path):
    """Runs `fit`; returns the model that was given to it and the ranker."""
    workdir.mkdir(exist_ok=True)
    model, ranker = model_and_ranker(config)
    fit(model, split(), prompt(config), config, ranker, workdir)
    return model, ranker


def log(workdir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
