"""From a config to what every binary begins with: the data, their split, the semantic IDs and the untrained model."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from flax import nnx
from transformers import PreTrainedTokenizerBase

from simgr_jax import distributed, run_config, sharding, trained_on
from simgr_jax.data import prompts
from simgr_jax.data.dataset import Dataset, Split
from simgr_jax.data.load import load
from simgr_jax.data.prompts import Prompt
from simgr_jax.errors import UserError
from simgr_jax.evaluation.metrics import LIST_LENGTH
from simgr_jax.evaluation.ranking import Ranker
from simgr_jax.huggingface.checkpoint import Checkpoint
from simgr_jax.huggingface.pretrained import load_pretrained, open_checkpoint
from simgr_jax.huggingface.token_embeddings import TOKEN_INITS
from simgr_jax.huggingface.tokenizer import load_tokenizer
from simgr_jax.models.create import create
from simgr_jax.models.recommender import Recommender
from simgr_jax.semantic_ids.build import build
from simgr_jax.semantic_ids.tokenizer import SemanticIds
from simgr_jax.training.checkpoints import Checkpoints


class Prepared(NamedTuple):
    """What a run begins with.

    Attributes:
      id_quality: how good the semantic IDs are (see `semantic_ids.quality`).
      llm: what the backbone begins as, and None, as its tokenizer, where it is trained from scratch.
      tokenizer: the LLM's, with the semantic-ID tokens.
      prompt: how histories become the backbone's inputs.
      model: with random parameters.
      ranker: ranks evaluation cases with the model's parameters.
    """

    dataset: Dataset
    split: Split
    semantic_ids: SemanticIds
    id_quality: dict[str, Any]
    llm: Checkpoint | None
    tokenizer: PreTrainedTokenizerBase | None
    prompt: Prompt
    model: Recommender
    ranker: Ranker


@contextlib.contextmanager
def open_mesh(config: ml_collections.ConfigDict, devices: Sequence[jax.Device] | None = None) -> Iterator[None]:
    """The context that a run is prepared, trained and evaluated in: its mesh.

    Args: as of `sharding.make_mesh`.

    Raises:
      UserError: the mesh does not fit the devices, or batches do not fit the mesh.
    """
    with jax.set_mesh(sharding.make_mesh(config.mesh, devices)):
        parts = sharding.shards("batch")
        for key, rows in (
            ("training.batch_rows", config.training.batch_rows),
            ("evaluation.batch_size", config.evaluation.batch_size),
        ):
            if rows % parts:
                raise UserError(
                    f"config.{key}: {rows} can't be split over the {parts} devices of config.mesh.data and fsdp; "
                    "give a multiple"
                )
        yield


def cache_dir(config: ml_collections.ConfigDict, workdir: Path) -> Path:
    """Where prepared data and semantic IDs are kept."""
    return Path(os.path.expanduser(config.cache_dir)) if config.cache_dir else workdir / "cache"


def load_data(config: ml_collections.ConfigDict, cache: Path) -> tuple[Dataset, Split]:
    """The dataset and its split.

    Raises:
      UserError: the data are not usable, or too small to fill a list of 10.
    """
    dataset, split = load(config.data, cache)
    if dataset.num_items < LIST_LENGTH:
        raise UserError(
            f"config.data.path: {dataset.name} has {dataset.num_items} items, but lists have {LIST_LENGTH}; "
            "use a larger catalog or a lower config.data.k_core"
        )
    for part in ("validation", "test"):
        if not len(getattr(split, part)):
            raise UserError(f"config.data.split: leaves no {part} case; choose another split or larger fractions")
    return dataset, split


def prepare(config: ml_collections.ConfigDict, workdir: Path, k: int = LIST_LENGTH) -> Prepared:
    """Everything before training; what can be kept is kept in the cache.

    A run that has learned something keeps its semantic IDs, also where new interactions would give others.

    Args:
      k: length of the ranker's lists.

    Raises:
      UserError: a value of the config or the data can't be, or the workdir's run learned from other items.
    """
    check(config)
    cache = cache_dir(config, workdir)
    with distributed.main_first():
        llm = open_checkpoint(config) if config.backbone.checkpoint else None
        dataset, split = load_data(config, cache)
        kept = trained_on.kept_semantic_ids(dataset, workdir)
        semantic_ids, id_quality = kept or build(config.semantic_ids, dataset, split.train, cache, config.seed)
    if k > dataset.num_items:
        raise UserError(f"--k: {k} is more than the {dataset.num_items} items of {dataset.name}; give at most that")
    sequences = (dataset.sequences.values, dataset.sequences.offsets, split.train.values, split.train.offsets)
    distributed.check_same("the data", *sequences, dataset.item_texts)
    distributed.check_same("the semantic IDs", semantic_ids.codes)
    tokenizer = load_tokenizer(llm.folder, semantic_ids.token_strings()) if llm else None
    prompt = prompts.create(config, semantic_ids, dataset.item_texts, tokenizer)
    backbone = None
    if llm:
        backbone = load_pretrained(llm, tokenizer, config, semantic_ids, dataset.item_texts, prompt)
    model = create(config, semantic_ids, split.train, backbone)
    if k > (width := getattr(model, "beam_width", k)):
        raise UserError(f"config.{config.model.name}.beam_width: {width} can't fill a list of {k}; give at least that")
    ranker = Ranker(
        nnx.graphdef(model),
        prompt=prompt,
        batch_size=config.evaluation.batch_size,
        max_items=config.data.max_items,
        row_length=config.training.row_length,
        k=k,
        filter_history=config.evaluation.filter_history,
    )
    return Prepared(dataset, split, semantic_ids, id_quality, llm, tokenizer, prompt, model, ranker)


def restore_best(prepared: Prepared, workdir: Path) -> tuple[nnx.State, nnx.State, dict[str, float | None]]:
    """The parameters that did best on validation, the model's other state, and the training's cost.

    The model's own parameters are given up: their memory is freed. A model without any is as it is.

    Raises:
      UserError: no checkpoint, or one that is damaged, another model's, or of other items or semantic IDs.
    """
    _, params, rest = nnx.split(prepared.model, nnx.Param, ...)
    if not params:
        return params, rest, {"train_seconds": 0.0, "train_targets_per_second": None}
    trained_on.check_items(prepared.dataset, prepared.semantic_ids, prepared.prompt, workdir)
    # Their values are not asked for: two copies of an LLM may be more than there is room for.
    for leaf in jax.tree.leaves(params):
        leaf.delete()
    folder = workdir / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"{folder}: is not there; train in this workdir first")
    with Checkpoints(folder, read_only=True) as checkpoints:
        return checkpoints.restore_best(params), rest, checkpoints.training_cost()


_POSITIVE = (
    "data.max_items",
    "prompt.max_title_tokens",
    "model.item_encoder_width",
    "backbone.rope_theta",
    "backbone.norm_epsilon",
    "lora.alpha",
    "optimizer.learning_rate",
    "optimizer.accumulate_steps",
    "training.epochs",
    "training.batch_rows",
    "training.row_length",
    "training.log_every_steps",
    "training.evaluate_every_epochs",
    "training.patience",
    "evaluation.batch_size",
)
_NOT_NEGATIVE = (
    "seed",
    "lora.rank",
    "training.input_streams",
    "training.checkpoint_every_steps",
    "optimizer.weight_decay",
    "optimizer.clip_norm",
)
_CHOICES = {"backbone.token_init": TOKEN_INITS, "lora.base_dtype": ("float32", "bfloat16")}
_SHARES = ("optimizer.warmup_fraction", "optimizer.final_fraction")
_DECAYS = ("optimizer.beta1", "optimizer.beta2", "training.ema_decay")


def check(config: ml_collections.ConfigDict) -> None:
    """Refuses numbers and prompts that no run can have, before any work is done.

    Raises:
      UserError: naming the key.
    """
    values = run_config.flat(config)
    rules = (
        ([key for key, value in values.items() if isinstance(value, float)], np.isfinite, "give a finite number"),
        (_POSITIVE, lambda value: value > 0, "give a number above 0"),
        (_NOT_NEGATIVE, lambda value: value >= 0, "give 0 or more"),
        (_SHARES, lambda value: 0 <= value <= 1, "give a number from 0 to 1"),
        (_DECAYS, lambda value: 0 <= value < 1, "give a number from 0 to below 1"),
    )
    for keys, allows, remedy in rules:
        for key in keys:
            if not allows(values[key]):
                raise UserError(f"config.{key}: can't be {values[key]}; {remedy}")
    if config.model.history == "item" and config.training.row_length < config.data.max_items:
        raise UserError(
            f"config.training.row_length: {config.training.row_length} is shorter than config.data.max_items = "
            f"{config.data.max_items}, so a sequence would not fit in a row; raise it"
        )
    for key, choices in _CHOICES.items():
        if values[key] not in choices:
            raise UserError(f'config.{key}: "{values[key]}" is unknown; choose one of {", ".join(choices)}')
    if config.lora.rank and not config.backbone.checkpoint:
        raise UserError("config.lora.rank: adapts a checkpoint; give config.backbone.checkpoint, or rank 0")
    prompts.check(config)
