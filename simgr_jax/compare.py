"""Trains several models on one dataset and compares them: one split, one table, pictures.

    python -m simgr_jax.compare --config=configs/compare.py:beauty --config.base.data.path=DIR --workdir=DIR

To continue a comparison that was cut off, give the same command again; finished models are not trained again. Each
model's run is an ordinary workdir, DIR/runs/MODEL. --only=sasrec,simgr trains only those models; the table has all that
are finished. A model that fails does not stop the others: the table says why, and the exit code is 2, or 1 for a bug.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import ml_collections
from absl import flags

from simgr_jax import cli
from simgr_jax.comparison import figures as figures_lib
from simgr_jax.comparison import pictures, speed, table
from simgr_jax.comparison import rows as rows_lib
from simgr_jax.comparison.rows import COMPARISON_CONFIG, Row
from simgr_jax.comparison.runs import FINISHED_FILE, RunFailed, Runs, load_finished
from simgr_jax.comparison.speed import Speeds
from simgr_jax.config_keys import flat, with_values
from simgr_jax.data.dataset import EvaluationCases
from simgr_jax.errors import UserError
from simgr_jax.run import Run
from simgr_jax.workdir import lock
from simgr_jax.workdir.atomic_write import write_json, write_text
from simgr_jax.workdir.read_files import read_json_object

# The keys of the shared config that the table shows.
SHOWN = (
    *(f"training.{key}" for key in ("epochs", "batch_rows", "row_length", "patience")),
    *(f"backbone.{key}" for key in ("checkpoint", "width", "layers", "heads", "mlp_width", "dropout")),
    *("data.max_items", "optimizer.learning_rate", "semantic_ids.source", "semantic_ids.embeddings.names"),
    *(f"semantic_ids.quantizer.{key}" for key in ("name", "levels", "codebook_size")),
)


def main() -> None:
    cli.required("config")
    config, folder = flags.FLAGS.config, cli.open_workdir(cli.required("workdir"))
    # Two comparisons in one folder would train the same runs.
    with lock.locked(folder, "a comparison is at work"):
        compare(config, folder, flags.FLAGS.only)


def compare(config: ml_collections.ConfigDict, folder: Path, only: Sequence[str]) -> None:
    """Trains what is missing and writes the table.

    Args:
      only: names of the rows to train; an empty list trains all.

    Raises:
      UserError: the config or the data can't be used, or differ from those of the folder's runs; or, once all else is
        done, a row failed because of a user's mistake, or the speeds could not be measured.
      SystemExit: a row failed because of a bug.
    """
    rows = rows_lib.read(config)
    chosen = _chosen(rows, only)
    runs = Runs(folder, config, rows)
    for row in rows:
        runs.check(row)
    _check_judged_on(_load_test(config, folder), runs, rows)
    failures = _train(runs, chosen)
    is_finished = any(runs.tuning(row) is not None and runs.finished(row) for row in rows)
    unmeasured = _report(folder, config, runs, rows, failures) if is_finished else None
    if failures:
        _exit(failures)
    if unmeasured:
        raise UserError(f"users/s: not measured: {unmeasured}")


def _load_test(config: ml_collections.ConfigDict, folder: Path) -> EvaluationCases:
    """The test split, read before any process is started, so that unreadable data fail once."""
    # Data do not depend on it, and choosing it would start JAX's devices, which the rows' processes need.
    base = with_values(config.base, {"backbone.dtype": "float32"})
    try:
        return Run(base, folder).split.test
    except UserError as error:
        raise UserError(str(error).replace("config.data.", "config.base.data.")) from error


def _check_judged_on(cases: EvaluationCases, runs: Runs, rows: Sequence[Row]) -> None:
    """The data may have changed since a run was trained."""
    for row in rows:
        for run in runs.finished(row).values():
            if not run.saved_ranking().is_of(cases):
                raise UserError(
                    f"{run.workdir}: was judged on other data than config.base.data; give the old data, or remove the "
                    "folder and its trials to train them again"
                )


def _exit(failures: Mapping[str, RunFailed]) -> NoReturn:
    """Exits with code 1 if any row failed because of a bug, else with code 2."""
    names, bugs = ", ".join(failures), [name for name, failure in failures.items() if not failure.by_user]
    if bugs:
        print(f"error: {names}: failed; see the output.log of {bugs[0]}", file=sys.stderr)
        sys.exit(1)
    raise UserError(f"{names}: failed: {next(iter(failures.values()))}")


def _chosen(rows: Sequence[Row], only: Sequence[str]) -> list[Row]:
    """only: names; an empty list chooses all rows."""
    names = [row.name for row in rows]
    for name in only:
        if name not in names:
            raise UserError(f'--only: "{name}" is not in config.rows; choose from {", ".join(names)}')
    return [row for row in rows if not only or row.name in only]


def _train(runs: Runs, rows: Sequence[Row]) -> dict[str, RunFailed]:
    """Trains what is missing, further seeds last. Returns the failures by run name."""
    failures = {}
    tunings = {}
    for number in range(max(len(row.seeds) for row in rows)):
        for row in rows:
            if number >= len(row.seeds) or row.name in failures:
                continue
            seed = row.seeds[number]
            try:
                if number == 0:
                    tunings[row.name] = runs.tune(row)
                runs.train(row, seed, tunings[row.name])
            except (RunFailed, UserError) as error:
                name = runs.workdir(row, seed).name
                failures[name] = error if isinstance(error, RunFailed) else RunFailed(str(error), by_user=True)
                print(f"{name}: failed: {error}", flush=True)
    return failures


def _report(
    folder: Path,
    config: ml_collections.ConfigDict,
    runs: Runs,
    rows: Sequence[Row],
    failures: Mapping[str, RunFailed],
) -> UserError | None:
    """Writes and shows the table of all finished rows. Returns the error if speed could not be measured."""
    base = flat(config.base)
    finished = {row.name: one for row in rows if (one := runs.finished(row)) and runs.tuning(row) is not None}
    workdirs = {name: next(iter(one.values())).workdir for name, one in finished.items()}
    inference, speeds, unmeasured = {}, {}, None
    try:
        inference, speeds = _inference(folder, workdirs, runs.places, config.inference)
    except UserError as error:
        unmeasured = UserError(str(error).replace("config.evaluation.batch_size", "config.inference.batch_size"))
    figures = figures_lib.collect(rows, runs, config.reference, speeds, config.base.evaluation.ks) | {
        "base": {key: base[key] for key in SHOWN if base[key] != ""},
        "trial_epochs": config.trial_epochs,
        "finalists": config.finalists,
        "inference": inference,
        "failed": {name: str(failure) for name, failure in failures.items()},
        "not_trained": [row.name for row in rows if row.name not in finished and row.name not in failures],
    }
    write_json(folder / "comparison.json", figures, allow_nan=False)
    write_text(folder / "comparison.md", table.markdown(figures))
    pictures.write(folder, figures)
    table.console().print(table.terminal(figures))
    print(f"the table, its notes and pictures are in {folder}")
    return unmeasured


def _inference(
    folder: Path, workdirs: Mapping[str, Path], places: Mapping[str, str], config: ml_collections.ConfigDict
) -> tuple[dict[str, Any], dict[str, Speeds]]:
    """How speed was measured, and the speeds. Earlier speeds are kept if nothing has changed since."""
    file = folder / "inference.json"
    settings = config.to_dict()
    if file.exists():
        before = read_json_object(file)
        is_newest = all(
            (workdir / FINISHED_FILE).stat().st_mtime < file.stat().st_mtime for workdir in workdirs.values()
        )
        if is_newest and before["settings"] == settings and before["speeds"].keys() == workdirs.keys():
            return settings | {"users": before["users"]}, {
                name: Speeds(**one) for name, one in before["speeds"].items()
            }
    print(f"measuring inference: {', '.join(workdirs)}", flush=True)
    values = {**places, "evaluation.batch_size": config.batch_size}
    models = {name: load_finished(workdir, values) for name, workdir in workdirs.items()}
    users, speeds = speed.measure(models, batches=config.batches, rounds=config.rounds)
    kept = {name: one._asdict() for name, one in speeds.items()}
    write_json(file, {"settings": settings, "users": users, "speeds": kept})
    return settings | {"users": users}, speeds


if __name__ == "__main__":
    cli.define_config()
    flags.DEFINE_string("workdir", None, "The comparison's folder: runs, trials, table, pictures.")
    flags.DEFINE_list("only", [], "Names of the models to train, separated by commas; all if left out.")
    cli.run(main, COMPARISON_CONFIG)
