"""A training run that takes seconds, on sequences in which one item mostly follows another."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import jax
import ml_collections
import numpy as np
from flax import nnx

from simgr_jax import default_config
from simgr_jax.data.dataset import EvaluationCases, Sequences, Split
from simgr_jax.evaluation.metrics import summarize
from simgr_jax.evaluation.ranking import Ranker
from simgr_jax.inputs import prompts
from simgr_jax.inputs.prompts import ItemContents
from simgr_jax.inputs.training_windows import TrainingWindows
from simgr_jax.models import popularity, registry
from simgr_jax.models.model_inputs import ModelInputs
from simgr_jax.models.recommender import Recommender
from simgr_jax.models.scratch import scratch_backbone
from simgr_jax.semantic_ids.codes import SemanticIds
from simgr_jax.training import loop
from simgr_jax.training.state import make_train_step

NUM_ITEMS = 30
SEMANTIC_IDS = SemanticIds(np.stack(np.divmod(np.arange(NUM_ITEMS), 6), axis=1).astype(np.int32), (5, 6))


def config(model: str = "simgr", **training) -> ml_collections.ConfigDict:
    """The config of a small model. training: changes of `config.training`."""
    tiny = default_config.get_config()
    tiny.model = model
    tiny.data.max_items = 6
    tiny.simgr.item_encoder_width = 8
    tiny.backbone.update(
        {"width": 16, "layers": 1, "heads": 2, "kv_heads": 1, "head_width": 8, "mlp_width": 16, "dropout": 0.2}
    )
    tiny.optimizer.learning_rate = 2e-2
    tiny.training.update({"epochs": 4, "batch_rows": 4, "row_length": 12, "log_every_steps": 4} | training)
    tiny.evaluation.batch_size = 32
    return tiny


def pretrained_config(**training) -> ml_collections.ConfigDict:
    """A run whose backbone is treated as that of a checkpoint. training: changes of `config.training`."""
    tiny = config(**training)
    tiny.backbone.checkpoint = "llm"
    return tiny


def split() -> Split:
    generator = np.random.default_rng(0)
    circle = generator.permutation(NUM_ITEMS)  # Shuffled, so that codes say nothing about what follows an item.
    users = []
    for length in generator.integers(5, 9, 64):
        steps = np.where(generator.random(length) < 0.9, 1, generator.integers(0, NUM_ITEMS, length))
        users.append(circle[(generator.integers(NUM_ITEMS) + np.cumsum(steps)) % NUM_ITEMS])

    def cases(end):
        histories = Sequences.from_lists(user[:end] for user in users)
        return EvaluationCases(np.arange(64), histories, np.array([user[end] for user in users]))

    return Split(Sequences.from_lists(user[:-2] for user in users), cases(-2), cases(-1))


def make_model(
    config: ml_collections.ConfigDict, semantic_ids: SemanticIds = SEMANTIC_IDS, train: Sequences | None = None
) -> Recommender:
    """The config's untrained model. train: the training sequences; None takes those of `split`."""
    rngs = nnx.Rngs(config.seed)
    train = split().train if train is None else train
    backbone = partial(scratch_backbone, config, rngs)
    return registry.create(config, ModelInputs(semantic_ids.num_items, semantic_ids, train, backbone, rngs))


def prompt(config: ml_collections.ConfigDict) -> prompts.Prompt:
    history = registry.options_of(config).history
    return prompts.create(history, config.prompt, ItemContents(NUM_ITEMS, SEMANTIC_IDS), tokenizer=None)


def make_ranker(config: ml_collections.ConfigDict, model: Recommender) -> Ranker:
    """Ranks with models of this one's structure."""
    arguments = config.evaluation.batch_size, config.data.max_items, config.training.row_length
    return Ranker(model, prompt(config), *arguments)


def make_windows(config: ml_collections.ConfigDict, train: Sequences | None = None) -> TrainingWindows:
    """Those of the training sequences; None takes those of `split`."""
    arguments = prompt(config), config.data.max_items, config.training.row_length
    return TrainingWindows(split().train if train is None else train, *arguments, registry.options_of(config).windows)


def evaluate(ranker: Ranker, model: Recommender) -> dict[str, float]:
    """The metrics of the validation cases."""
    ranking = ranker.rank(model, split().validation, 10)
    return summarize(ranking.target_rank, ranking.items, NUM_ITEMS)


def popularity_ndcg() -> float:
    """The validation NDCG@10 of a model that knows nothing about a history."""
    cases = split().validation
    ranking = popularity.rank(split().train, NUM_ITEMS, cases.targets, 10)
    return summarize(ranking.target_rank, ranking.items, NUM_ITEMS)["NDCG@10"]


class Programs:
    """What a run compiles, for other runs whose configs give the same programs. Compiling takes most of their time.

    Attributes:
      ranker: None before the first run.
    """

    def __init__(self) -> None:
        self.ranker: Ranker | None = None
        self._steps: dict[bool, jax.stages.Compiled] = {}

    def make_train_step(self, *arguments):
        """As `state.make_train_step`, for the training loop."""
        jitted, frozen = make_train_step(*arguments), arguments[-1]

        def lower(*arguments):
            return SimpleNamespace(compile=lambda: self._compiled(frozen, jitted, arguments))

        return SimpleNamespace(lower=lower)

    def _compiled(self, frozen, jitted, arguments):
        if frozen not in self._steps:
            self._steps[frozen] = jitted.lower(*arguments).compile()
        return self._steps[frozen]


def train(
    config: ml_collections.ConfigDict, workdir: Path, programs: Programs | None = None
) -> tuple[Recommender, Ranker]:
    """Trains the config's model. Returns the model, whose parameters are used up, and its ranker."""
    workdir.mkdir(exist_ok=True)
    model, programs = make_model(config), programs or Programs()
    programs.ranker = programs.ranker or make_ranker(config, model)
    with mock.patch.object(loop, "make_train_step", programs.make_train_step):
        loop.fit(model, make_windows(config), partial(evaluate, programs.ranker), config, workdir)
    return model, programs.ranker


def log(workdir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
