"""The rows of a comparison: turns its config into one run config per row, with trials and seeds."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import ml_collections

from simgr_jax import default_config
from simgr_jax.config_checks import check
from simgr_jax.config_files import ConfigKind
from simgr_jax.config_keys import check_overrides, flat, unread
from simgr_jax.errors import UserError

# Keys that all rows of a table share, so that they can be compared.
_SAME = ("data.", "evaluation.ks", "cache_dir")
_NOT_SAME = ("data.max_items",)


class Row(NamedTuple):
    """A row of the table.

    Attributes:
      name: also names its folders.
      family: the kind of model, in words.
      config: its runs' config, before a seed and a trial are set.
      overrides: the values that differ from the comparison's `base`, by full key.
      seeds: its runs' seeds, at least one.
      trials: what each trial changes in `config`, by full key.
      trained_as: the row whose trials and trained models it takes over; "" if it trains its own.
    """

    name: str
    family: str
    config: ml_collections.ConfigDict
    overrides: dict[str, Any]
    seeds: tuple[int, ...]
    trials: tuple[dict[str, Any], ...]
    trained_as: str


def _keys(config: ml_collections.ConfigDict) -> tuple[ml_collections.ConfigDict, ml_collections.ConfigDict]:
    """The keys that a comparison's config may have, and those that it must have.

    `config.base` has all keys of a run's config; `shared`, `overrides` and `trials` have some of them.
    """
    run = default_config.get_config()
    top = {
        "base": run,
        "rows": (),
        "reference": "",
        "trial_epochs": 0,
        "finalists": 0,
        "inference": {"batch_size": 0, "batches": 0, "rounds": 0},
    }
    shared, models = (_groups(config, name) for name in ("shared", "models"))
    row = {"family": "", "shares": (), "seeds": (), "overrides": {}, "trials": {}, "trained_as": ""}
    known_rows = {
        name: row | {"overrides": run, "trials": dict.fromkeys(_groups(values, "trials"), run)}
        for name, values in models.items()
    }
    known = top | {"shared": dict.fromkeys(shared, run), "models": known_rows}
    required = top | {"shared": {}, "models": dict.fromkeys(models, row)}
    return ml_collections.ConfigDict(known), ml_collections.ConfigDict(required)


def _check_base_overrides(config: ml_collections.ConfigDict, keys: Collection[str]) -> None:
    """Refuses an override of `base` that every row ignores or replaces. Overrides of rows are checked in `read`."""
    keys = [key.removeprefix("base.") for key in keys if key.startswith("base.")]
    ignored = [unread(row.config).keys() | _set_by(config, row.name) for row in read(config)] if keys else []
    for key in keys:
        if all(key in one for one in ignored):
            raise UserError(f"config.base.{key}: has no effect, as every row ignores or replaces it; leave it out")


def _set_by(config: ml_collections.ConfigDict, name: str) -> set[str]:
    """The keys that a row sets itself."""
    row = config.models[name]
    groups = (row.overrides, *(config.shared[share] for share in row.shares))
    return {key for group in groups for key in flat(group)}


# For `cli.run`.
COMPARISON_CONFIG = ConfigKind(_keys, _check_base_overrides)


def _groups(config: Any, name: str) -> dict[str, Any]:
    """The groups of keys in `config[name]`, empty if it does not exist."""
    values = config.get(name) if isinstance(config, ml_collections.ConfigDict) else None
    return dict(values.items()) if isinstance(values, ml_collections.ConfigDict) else {}


def read(config: ml_collections.ConfigDict) -> list[Row]:
    """The rows of a comparison's config, in order.

    Raises:
      UserError: a row is invalid, or the rows can't be compared.
    """
    _check_base(config.base)
    rows: dict[str, Row] = {}
    for name in config.rows:
        if name not in config.models:
            raise UserError(f'config.rows: "{name}" is not in config.models; choose from {", ".join(config.models)}')
        row = _row(config, name)
        rows[name] = _taken_over(row, rows) if row.trained_as else row
    if config.reference not in rows:
        raise UserError(
            f'config.reference: "{config.reference}" is not in config.rows; choose one of {", ".join(rows)}'
        )
    counts = {name: len(row.trials) for name, row in rows.items() if row.trials}
    for name, count in counts.items():
        first = next(iter(counts))
        if count != counts[first]:
            raise UserError(
                f"config.models.{name}.trials: there are {count}, but {first} has {counts[first]}; give all the same "
                "number, or none to a model with nothing to tune"
            )
    limits = {"trial_epochs": 0, "finalists": 1} | {f"inference.{key}": 1 for key in config.inference}
    for key, value in flat(config).items():
        if key in limits and value < limits[key]:
            raise UserError(f"config.{key}: can't be {value}; give at least {limits[key]}")
    return list(rows.values())


def _row(config: ml_collections.ConfigDict, name: str) -> Row:
    key, values = f"config.models.{name}", config.models[name]
    if not re.fullmatch(r"\w+", name):
        raise UserError(f'{key}: "{name}" can\'t name a folder; use letters, digits and _')
    if unknown := [share for share in values.shares if share not in config.shared]:
        known = ", ".join(config.shared)
        raise UserError(f'{key}.shares: "{unknown[0]}" is not in config.shared; choose from {known or "nothing"}')
    seeds = tuple(values.seeds) or (config.base.seed,)
    if len(set(seeds)) < len(seeds) or not all(isinstance(seed, int) and seed >= 0 for seed in seeds):
        raise UserError(f"{key}.seeds: can't be {seeds}; give different whole numbers of 0 or more")

    run, given = config.base, {f"{key}.overrides.": values.overrides}
    for share in values.shares:
        run = override(run, config.shared[share], f"config.shared.{share}")
        given[f"config.shared.{share}."] = config.shared[share]
    run = override(run, values.overrides, f"{key}.overrides")
    _check_run(run, f"{key}.overrides")
    for where, changes in given.items():
        check_overrides(run, flat(changes), where)
    before, now = flat(config.base), flat(run)
    overrides = {key: now[key] for key in now if now[key] != before[key]}
    numbers = sorted(values.trials, key=lambda number: (len(number), number)) if config.trial_epochs else ()
    trials = {number: values.trials[number] for number in numbers}
    for number, trial in trials.items():
        if "training.epochs" in flat(trial):
            raise UserError(
                f"{key}.trials.{number}.training.epochs: is the same in all trials; set config.trial_epochs"
            )
        changed = override(run, trial, f"{key}.trials.{number}")
        _check_run(changed, f"{key}.trials.{number}")
        check_overrides(changed, flat(trial), f"{key}.trials.{number}.")
    flat_trials = tuple(flat(trial) for trial in trials.values())
    return Row(name, values.family, run, overrides, seeds, flat_trials, values.trained_as)


def _taken_over(row: Row, above: Mapping[str, Row]) -> Row:
    """The row with the seeds and trials of the row that it is trained as."""
    key, source = f"config.models.{row.name}", above.get(row.trained_as)
    if source is None or source.trained_as:
        raise UserError(f'{key}.trained_as: "{row.trained_as}" is not a trained row above it; name one, or give ""')
    if row.trials:
        raise UserError(f"{key}.trials: are those of {source.name}, whose models it takes over; leave them out")
    before, now = flat(source.config), flat(row.config)
    for name in now:
        if now[name] != before[name] and not name.startswith((f"{row.config.model}.", "evaluation.")):
            raise UserError(
                f"{key}: {name} differs from that of {source.name}, whose models it takes over; make it the same"
            )
    return row._replace(seeds=source.seeds, trials=source.trials)


def _check_base(config: ml_collections.ConfigDict) -> None:
    try:
        check(config)
    except UserError as error:
        raise UserError(str(error).replace("config.", "config.base.")) from error


def _check_run(config: ml_collections.ConfigDict, where: str) -> None:
    try:
        check(config)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def override(
    config: ml_collections.ConfigDict, changes: ml_collections.ConfigDict, where: str
) -> ml_collections.ConfigDict:
    """A run's config with `changes`.

    Args:
      where: the key of `changes`, for messages.

    Raises:
      UserError: a value has the wrong type, or is one that all rows share.
    """
    for key in flat(changes):
        if key.startswith(_SAME) and key not in _NOT_SAME:
            raise UserError(f"{where}.{key}: is the same in all rows; change config.base.{key}")
        if key == "seed":
            raise UserError(f"{where}.seed: has no effect; give the row's seeds, like config.models.simgr.seeds")
    changed = copy.deepcopy(config)
    try:
        changed.update(changes)
    except (TypeError, AttributeError) as error:
        raise UserError(f"{where}: {error}; fix the config file") from error
    return changed
