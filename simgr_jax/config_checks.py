"""Checks the values of a run's config before any work is done."""

from __future__ import annotations

import ml_collections
import numpy as np

from simgr_jax.config_keys import flat, unread
from simgr_jax.data.readers import where
from simgr_jax.errors import UserError
from simgr_jax.evaluation.metrics import SELECTION_K
from simgr_jax.huggingface.token_init import TOKEN_INITS
from simgr_jax.inputs import prompts
from simgr_jax.models import registry

_POSITIVE = (
    "data.max_items",
    "prompt.max_title_tokens",
    "item_reader.max_tokens",
    "item_reader.lora_rank",
    "backbone.rope_theta",
    "backbone.norm_epsilon",
    "lora.alpha",
    "optimizer.learning_rate",
    "optimizer.backbone.learning_rate",
    "optimizer.item_reader.learning_rate",
    "optimizer.accumulate_steps",
    "training.epochs",
    "training.log_every_steps",
    "training.evaluate_every_epochs",
    "training.patience",
    "training.max_bad_steps",
    "evaluation.batch_size",
)
_NOT_NEGATIVE = (
    "seed",
    "lora.rank",
    "backbone.first_layers",
    "training.batch_rows",
    "training.row_length",
    "training.input_streams",
    "training.checkpoint_every_steps",
    "optimizer.restart_epoch",
    "optimizer.weight_decay",
    "optimizer.clip_norm",
    "optimizer.backbone.weight_decay",
    "optimizer.backbone.clip_norm",
    "optimizer.item_reader.weight_decay",
    "optimizer.item_reader.clip_norm",
    "training.freeze_epochs",
)
_SHARES = (
    "item_reader.depth",
    "item_reader.whitening",
    "optimizer.warmup_fraction",
    "optimizer.backbone.warmup_fraction",
    "optimizer.item_reader.warmup_fraction",
    "optimizer.final_fraction",
)
_DECAYS = ("optimizer.beta1", "optimizer.beta2", "training.ema_decay")
_CHOICES = {
    "backbone.token_init": TOKEN_INITS,
    "backbone.dtype": ("auto", "float32", "bfloat16"),
    "lora.base_dtype": ("float32", "bfloat16"),
}


def check(config: ml_collections.ConfigDict) -> None:
    """Checks every value that the run reads.

    Raises:
      UserError: a value is invalid, or there is no such model.
    """
    options, ignored = registry.options_of(config), unread(config)
    values = {key: value for key, value in flat(config).items() if key not in ignored}
    rules = (
        ([key for key, value in values.items() if isinstance(value, float)], np.isfinite, "give a finite number"),
        (_POSITIVE, lambda value: value > 0, "give a number above 0"),
        (_NOT_NEGATIVE, lambda value: value >= 0, "give 0 or more"),
        (_SHARES, lambda value: 0 <= value <= 1, "give a number from 0 to 1"),
        (_DECAYS, lambda value: 0 <= value < 1, "give a number from 0 to below 1"),
        (("evaluation.ks",), _are_ks, f"give different whole numbers from 1, with {SELECTION_K} among them"),
        *(((key,), choices.__contains__, f"choose one of {', '.join(choices)}") for key, choices in _CHOICES.items()),
    )
    for keys, allows, remedy in rules:
        for key in keys:
            if key in values and not allows(values[key]):
                raise UserError(f"config.{key}: can't be {values[key]!r}; {remedy}")
    where.parse(values.get("data.log.where", ""))
    if values.get("optimizer.restart_epoch", 0) >= values.get("training.epochs", 1):
        raise UserError(
            f"config.optimizer.restart_epoch: {config.optimizer.restart_epoch} leaves no epoch of "
            f"config.training.epochs = {config.training.epochs}; give fewer, or 0 for no restart"
        )
    if values.get("training.freeze_epochs", 0) > values.get("training.epochs", 0):
        raise UserError(
            f"config.training.freeze_epochs: {config.training.freeze_epochs} is more than "
            f"config.training.epochs = {config.training.epochs}; give at most that, or 0"
        )
    row_length, max_items = values.get("training.row_length"), config.data.max_items
    if row_length and options.history == "item" and row_length < max_items:
        raise UserError(
            f"config.training.row_length: {row_length} is shorter than config.data.max_items = {max_items}, so a "
            "sequence would not fit in a row; raise it, or give 0"
        )
    if values.get("data.log.keep_cold_items") and set(values.get("semantic_ids.embeddings.names", ())) == {
        "interactions"
    }:
        raise UserError(
            'config.data.log.keep_cold_items: "interactions" alone gives all items without interactions the same '
            'semantic ID; add "tfidf" to config.semantic_ids.embeddings.names'
        )
    if options.takes_checkpoint and config.lora.rank and not config.backbone.checkpoint:
        raise UserError("config.lora.rank: adapters need a checkpoint; give config.backbone.checkpoint, or rank 0")
    if options.prompt_keys:
        prompts.check(config.prompt, options.history, has_tokenizer=bool(config.backbone.checkpoint))


def _are_ks(ks: tuple[int, ...]) -> bool:
    numbers = all(isinstance(k, int) and not isinstance(k, bool) and k >= 1 for k in ks)
    return numbers and len(set(ks)) == len(ks) and SELECTION_K in ks
