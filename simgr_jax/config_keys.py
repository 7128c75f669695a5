"""A config's keys: their values by full name, and which of them the chosen model reads."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from simgr_jax.errors import UserError
from simgr_jax.inputs.item_texts import has_title
from simgr_jax.models import registry
from simgr_jax.models.options import SHAPE_KEYS, ModelOptions
from simgr_jax.semantic_ids import build

# The shared groups of which a model reads only some keys.
_SHARED = ("backbone", "item_reader", "prompt", "lora", "semantic_ids", "optimizer", "training")
# Groups of `config.data` that only one format reads.
_FORMAT_GROUPS = ("log", "recbole", "amazon_reviews", "synthetic")


def flat(config: ml_collections.ConfigDict, prefix: str = "") -> dict[str, Any]:
    """The config's values by full key, like `data.path`."""
    values = {}
    for key, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            values |= flat(value, f"{prefix}{key}.")
        else:
            values[prefix + key] = value
    return values


def with_values(config: ml_collections.ConfigDict, values: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """A copy of the config with other values, given by full key, like {"training.epochs": 2}.

    Raises:
      UserError: there is no such key, or a value has the wrong type.
    """
    changed, known = copy.deepcopy(config), flat(config)
    for key, value in values.items():
        if key not in known:
            nearest = difflib.get_close_matches(key, known, 1, cutoff=0)[0]
            raise UserError(f"config.{key}: the config has no such key; did you mean {nearest}?")
        if isinstance(known[key], tuple) and isinstance(value, list):
            value = tuple(value)
        elif isinstance(value, Path):
            value = str(value)
        elif isinstance(value, np.generic):
            value = value.item()
        try:
            if value is None or (isinstance(value, bool) and not isinstance(known[key], bool)):
                raise TypeError("ml_collections would take it")
            changed.update_from_flattened_dict({key: value})
        except (TypeError, ValueError) as error:
            kind = type(known[key]).__name__
            raise UserError(
                f"config.{key}: {value!r} is not of type {kind}; give a value like {known[key]!r}"
            ) from error
    return changed


def unread(config: ml_collections.ConfigDict) -> dict[str, str]:
    """The keys that the run does not read, each with the setting that would make it read them, or "" if none would.

    Raises:
      UserError: there is no such model, or one of its options is invalid.
    """
    options, keys = registry.options_of(config), flat(config)
    found = {}

    def all_of(group: str, read: Iterable[str] = (), why: str = "") -> None:
        names = {key: key.removeprefix(f"{group}.") for key in keys if key.startswith(f"{group}.")}
        found.update({key: why for key, name in names.items() if name not in read})

    for name in registry.MODELS:
        if name != config.model:
            all_of(name)
    found |= {f"{config.model}.{key}": f"config.{config.model}.{why}" for key, why in options.unread().items()}
    _unread_backbone(config, options, all_of)
    if not options.reads_semantic_ids:
        all_of("semantic_ids")
    else:
        found |= {f"semantic_ids.{key}": why for key, why in build.unread(config.semantic_ids).items()}
    if not reads_item_texts(config):
        all_of("item_reader", why="config.semantic_ids.embeddings.names=llm" if options.reads_semantic_ids else "")
    if not options.trains_item_reader:
        why = "config.simgr.item_text=trained" if options.name == "simgr" else ""
        found.setdefault("item_reader.lora_rank", why)
        all_of("optimizer.item_reader", why=why)
    if not options.is_trained:
        all_of("optimizer")
        all_of("training")
    for group in _FORMAT_GROUPS:
        if config.data.format != group:
            all_of(f"data.{group}", why=f"config.data.format={group}")
    if not config.data.log.items_file:
        for key in ("data.log.items_id", "data.log.items_text", "data.log.keep_cold_items"):
            found.setdefault(key, "config.data.log.items_file")
    if config.data.split != "temporal":
        found |= dict.fromkeys(("data.validation_fraction", "data.test_fraction"), "config.data.split=temporal")
    return found


def reads_item_texts(config: ml_collections.ConfigDict) -> bool:
    """Whether an LLM reads the items' texts (`config.item_reader`) before training."""
    options = registry.options_of(config)
    return (
        options.reads_item_texts
        or (options.reads_semantic_ids and build.reads_llm(config.semantic_ids))
        or (registry.has_checkpoint(config) and config.backbone.token_init == "reading")
    )


def _unread_backbone(config: ml_collections.ConfigDict, options: ModelOptions, all_of) -> None:
    """The keys of `backbone`, `lora` and `prompt`, and the rates of a checkpoint's backbone."""
    has_checkpoint = registry.has_checkpoint(config)
    a_checkpoint = "config.backbone.checkpoint" if options.takes_checkpoint else ""
    if has_checkpoint:
        all_of("backbone", [key for key in config.backbone if key not in SHAPE_KEYS], 'config.backbone.checkpoint=""')
    else:
        read = (*options.backbone_keys, "checkpoint") if options.takes_checkpoint else options.backbone_keys
        of_checkpoints = ("token_init", "first_layers")
        all_of("backbone", (*read, *of_checkpoints))
        all_of("backbone", [key for key in config.backbone if key not in of_checkpoints], a_checkpoint)
    if not has_checkpoint and not options.trains_item_reader:
        all_of("training", [key for key in config.training if key != "freeze_epochs"], a_checkpoint)
    of_reader = ("targets",) if options.trains_item_reader else ()  # Its adapters sit on the same projections.
    if not has_checkpoint:
        all_of("lora", of_reader, a_checkpoint)
        all_of("optimizer.backbone", (), a_checkpoint)
    elif not config.lora.rank:
        all_of("lora", ("rank", *of_reader), "config.lora.rank above 0")

    if options.history != "tokens":
        all_of("prompt", (), f"config.{options.name}.history=tokens" if options.prompt_keys else "")
    elif not has_checkpoint:
        all_of("prompt", (), a_checkpoint if options.prompt_keys else "")
    else:
        all_of("prompt", options.prompt_keys)
        if "max_title_tokens" in options.prompt_keys and not has_title(config.prompt.item):
            all_of("prompt", ("prefix", "item"), "{title} in config.prompt.item")


def check_overrides(config: ml_collections.ConfigDict, keys: Iterable[str], where: str = "config.") -> None:
    """Refuses overrides of keys that the run does not read.

    Args:
      config: with the overrides.
      keys: the keys that are overridden.
      where: what a message puts before a key.

    Raises:
      UserError: a key is not read; the message says what the model reads.
    """
    ignored = unread(config)
    for key in keys:
        if key in ignored:
            if ignored[key]:
                raise UserError(f"{where}{key}: is not read without {ignored[key]}; set that, too, or leave this out")
            raise UserError(
                f'{where}{key}: is not read by model "{config.model}"; leave it out: the model reads '
                f"{_read_by(config, ignored)}"
            )


def _read_by(config: ml_collections.ConfigDict, ignored: Mapping[str, str]) -> str:
    """The keys of the groups that describe a model, like "sasrec.{loss, label_smoothing}, optimizer.*"."""
    texts = []
    for group in (config.model, *_SHARED):
        keys = flat(config.get(group, ml_collections.ConfigDict()), f"{group}.")
        read = [key.removeprefix(f"{group}.") for key in keys if key not in ignored]
        if read:
            texts.append(f"{group}.*" if len(read) == len(keys) else f"{group}.{{{', '.join(read)}}}")
    return ", ".join(texts) or "the data alone"
