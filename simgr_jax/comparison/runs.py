"""Trains what a comparison still needs: trials, then full runs, each in its own process.

A process frees its memory when it ends, and one that fails does not affect the others.
"""

from __future__ import annotations

import contextlib
import datetime
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
from rich.console import Console
from rich.markup import escape

from simgr_jax import saved_config
from simgr_jax.comparison.rows import Row
from simgr_jax.config_keys import unread, with_values
from simgr_jax.errors import Stopped, UserError
from simgr_jax.evaluation.metrics import SELECTION_METRIC
from simgr_jax.run import LEARNED_FILES, Run
from simgr_jax.training.stop_request import SIGNALS
from simgr_jax.workdir import config_file
from simgr_jax.workdir.atomic_write import atomic_path, write_json
from simgr_jax.workdir.read_files import read_json_object, read_log

SCORE = f"validation/{SELECTION_METRIC}"
_TRIAL_FILE = "trial.json"
# Short trials, and the best of them trained in full.
_STAGES = ("trials", "finals")
# In the workdir of a run that was trained to its end and reported on.
FINISHED_FILE = "finished.json"


class RunFailed(Exception):
    """A run's process ended with an error.

    Attributes:
      by_user: whether it was a user's mistake, a `UserError`; otherwise it was a bug, or the process was killed.
    """

    def __init__(self, reason: str, by_user: bool):
        super().__init__(reason)
        self.by_user = by_user


class Trial(NamedTuple):
    """
    Attributes:
      values: what it changed, by full key.
      score: its best validation NDCG@10; None if it failed.
      failure: why it failed.
      full_score: the score of the same values trained in full; None if they were not, or if that failed.
      full_failure: why training in full failed.
    """

    values: dict[str, Any]
    score: float | None
    failure: str | None = None
    full_score: float | None = None
    full_failure: str | None = None


class Tuning(NamedTuple):
    """A row's trials and the index of the chosen one, None if there are no trials."""

    trials: tuple[Trial, ...] = ()
    chosen: int | None = None

    @property
    def values(self) -> dict[str, Any]:
        """The chosen trial's values for the row's runs, by full key."""
        return {} if self.chosen is None else self.trials[self.chosen].values

    @property
    def is_final(self) -> bool:
        """Whether the chosen trial has already been trained in full."""
        return self.chosen is not None and self.trials[self.chosen].full_score is not None


def finished_runs(folder: Path, places: Mapping[str, str]) -> dict[str, Run]:
    """The finished runs below a comparison's folder, by name.

    Args:
      places: see `load_finished`.
    """
    return {name: load_finished(workdir, places) for name, workdir in finished_workdirs(folder).items()}


def load_finished(workdir: Path, places: Mapping[str, Any]) -> Run:
    """A finished run, to measure more than its report has.

    Args:
      places: config values, by full key, that have changed since the run was trained: where its files are now, or how
        many users are ranked at once. Keys that the run's model does not read are ignored.

    Raises:
      UserError: the run's files or data are missing, or it was judged on other data.
    """
    run = Run.load(workdir)
    ignored = unread(run.config).keys()
    if not run.config.backbone.checkpoint:
        ignored |= {"backbone.checkpoint"}
    run = Run.load(workdir, {key: value for key, value in places.items() if key not in ignored})
    if not run.saved_ranking().is_of(run.split.test):
        raise UserError(f"{workdir}: was judged on other data; give the data that it was judged on, or train it again")
    return run


def finished_workdirs(folder: Path) -> dict[str, Path]:
    """The finished runs' workdirs, by name. Runs whose model was taken over from a removed run are left out."""
    workdirs = {file.parent.name: file.parent for file in sorted((folder / "runs").glob(f"*/{FINISHED_FILE}"))}
    finished = {name: _finished(workdir) for name, workdir in workdirs.items()}
    known = {None, *(one["finished"] for one in finished.values())}
    return {name: workdirs[name] for name, one in finished.items() if one.get("source") in known}


class Runs:
    """The runs below a comparison's folder.

    `trials/ROW-NUMBER` are short trials, and `finals/ROW-NUMBER` are the best of them trained in full. `runs/ROW` is
    the run of the row's first seed, which takes over the best final, and `runs/ROW-SEED` are the runs of further seeds.

    Each is an ordinary workdir. All share one cache, so that rows with the same semantic IDs make them only once.
    """

    def __init__(self, folder: Path, config: ml_collections.ConfigDict, rows: Sequence[Row]):
        """config, rows: the comparison's config, and all of its rows."""
        self._folder = folder.resolve()
        self._rows = {row.name: row for row in rows}
        self._cache_dir = config.base.cache_dir or str(self._folder / "cache")
        self._data_path = config.base.data.path
        self._trial_epochs, self._num_finalists = config.trial_epochs, config.finalists

    @property
    def places(self) -> dict[str, str]:
        """Where data and cache are now, by full key; a run's own config says where they were when it began."""
        return {"data.path": self._data_path, "cache_dir": self._cache_dir}

    def workdir(self, row: Row, seed: int) -> Path:
        return self._folder / "runs" / (row.name if seed == row.seeds[0] else f"{row.name}-{seed}")

    def finished(self, row: Row) -> dict[int, Run]:
        """The row's finished runs, by seed."""
        seeds = [seed for seed in row.seeds if self._is_finished(row, seed)]
        return {seed: Run.load(self.workdir(row, seed)) for seed in seeds}

    def check(self, row: Row) -> None:
        """Checks that the row's trials and runs that were begun before had the same config.

        Raises:
          UserError: one had another config.
        """
        if not row.trained_as:
            for stage in _STAGES:
                for number, values in enumerate(row.trials, start=1):
                    _check_same(self._trial_config(stage, row, values), self._trial_workdir(stage, row, number))
        tuning = self.tuning(row)
        if tuning is not None:
            for seed in row.seeds:
                # A run that was taken over from a removed run will be replaced, so its config does not matter.
                if not row.trained_as or self._is_finished(row, seed):
                    _check_same(self._config(row, seed, tuning), self.workdir(row, seed))

    def tuning(self, row: Row) -> Tuning | None:
        """The row's tuning, or None while it is not finished."""
        if row.trained_as:
            return self.tuning(self._rows[row.trained_as])
        if not row.trials:
            return Tuning()
        trials = self._read_trials("trials", row, range(1, len(row.trials) + 1))
        if None in trials.values():
            return None
        finals = self._read_trials("finals", row, self._finalists(trials))
        if None in finals.values():
            return None
        best = _best_first(finals or trials)
        if not best:
            return None
        for number, final in finals.items():
            trials[number] = trials[number]._replace(full_score=final.score, full_failure=final.failure)
        return Tuning(tuple(trials.values()), best[0] - 1)

    def tune(self, row: Row) -> Tuning:
        """Trains the row's missing trials and finals. A row that takes over another row's models trains none.

        A trial that fails because of its settings, e.g. when a high learning rate makes the loss explode, is never the
        best. But if all fail, they are tried again next time.

        Raises:
          RunFailed: all of them failed; or one failed for another reason than its settings; or the models to take over
            are missing.
        """
        if row.trained_as:
            return self._taken_over_tuning(row)
        trials = self._try("trials", row, range(1, len(row.trials) + 1))
        self._try("finals", row, self._finalists(trials))
        return self.tuning(row)

    def train(self, row: Row, seed: int, tuning: Tuning) -> None:
        """Trains and reports on a run that is not finished.

        Raises:
          RunFailed: it failed.
          UserError: the workdir holds a run of another config.
        """
        workdir, config = self.workdir(row, seed), self._config(row, seed, tuning)
        is_finished = self._is_finished(row, seed)
        if is_finished or not row.trained_as:
            _check_same(config, workdir)
        if is_finished:
            return
        title = workdir.name + (f" ({describe(tuning.values)})" if tuning.values else "")
        _begin(config, workdir)
        source = {}
        if row.trained_as:
            source = self._take_over(row, seed)
        elif seed == row.seeds[0] and tuning.is_final:
            _copy_learned(self._trial_workdir("finals", row, tuning.chosen + 1), workdir)
        launch(["simgr_jax.train", f"--workdir={workdir}"], workdir, title)
        write_json(workdir / FINISHED_FILE, {"finished": _now()} | source)
        report = read_json_object(workdir / "report" / "metrics.json")
        print(f"{title}: NDCG@10 {report['NDCG@10']:.4f}, trained {report['train_seconds']:,.0f} s", flush=True)

    def _taken_over_tuning(self, row: Row) -> Tuning:
        tuning = self.tuning(row)
        if tuning is None or not self.finished(self._rows[row.trained_as]):
            raise RunFailed(f"takes over the models of {row.trained_as}, which is not trained; train that too", True)
        return tuning

    def _is_finished(self, row: Row, seed: int) -> bool:
        finished = _finished(self.workdir(row, seed))
        if finished is None or not row.trained_as:
            return finished is not None
        # The other row's run may have been removed, and another trained.
        source = _finished(self.workdir(self._rows[row.trained_as], seed))
        return source is not None and source["finished"] == finished.get("source")

    def _take_over(self, row: Row, seed: int) -> dict[str, Any]:
        """Copies what the other row's run learned. Returns a record of which run it was."""
        source, workdir = self.workdir(self._rows[row.trained_as], seed), self.workdir(row, seed)
        finished = _finished(source)
        if finished is None:
            raise RunFailed(f"takes over {source.name}, which is not trained; train that too", True)
        _copy_learned(source, workdir)
        return {"source": finished["finished"]}

    def _try(self, stage: str, row: Row, numbers: Sequence[int]) -> dict[int, Trial]:
        """Trains the given trials that are missing, and returns all of them."""
        for number in numbers:
            values, workdir = row.trials[number - 1], self._trial_workdir(stage, row, number)
            if _read_trial(workdir, values) is None:
                in_full = " in full" if stage == "finals" else ""
                title = f"{row.name}, trial {number} of {len(row.trials)}{in_full} ({describe(values)})"
                try:
                    score = _train_trial(self._trial_config(stage, row, values), workdir, title)
                    write_json(workdir / _TRIAL_FILE, {SCORE: score})
                    print(f"{title}: {SCORE} {score:.4f}", flush=True)
                except RunFailed as failure:
                    # Not the settings' fault, e.g. a missing file: the trial is tried again next time.
                    if not failure.by_user or not str(failure).startswith("config."):
                        raise
                    write_json(workdir / _TRIAL_FILE, {"failed": str(failure)})
                    print(f"{title}: failed: {failure}", flush=True)
        tried = self._read_trials(stage, row, numbers)
        if tried and not _best_first(tried):
            for number in numbers:
                (self._trial_workdir(stage, row, number) / _TRIAL_FILE).unlink()
            raise RunFailed(tried[numbers[0]].failure, by_user=True)
        return tried

    def _read_trials(self, stage: str, row: Row, numbers: Sequence[int]) -> dict[int, Trial | None]:
        return {
            number: _read_trial(self._trial_workdir(stage, row, number), row.trials[number - 1]) for number in numbers
        }

    def _finalists(self, trials: dict[int, Trial]) -> list[int]:
        """The numbers of the trials to train in full; none if there is nothing to choose between."""
        best = _best_first(trials)[: self._num_finalists]
        return best if len(best) > 1 else []

    def _trial_workdir(self, stage: str, row: Row, number: int) -> Path:
        return self._folder / stage / f"{row.name}-{number}"

    def _trial_config(self, stage: str, row: Row, values: dict[str, Any]) -> ml_collections.ConfigDict:
        short = {"training.epochs": self._trial_epochs} if stage == "trials" else {}
        return with_values(row.config, values | short | {"seed": row.seeds[0], "cache_dir": self._cache_dir})

    def _config(self, row: Row, seed: int, tuning: Tuning) -> ml_collections.ConfigDict:
        return with_values(row.config, tuning.values | {"seed": seed, "cache_dir": self._cache_dir})


def describe(values: dict[str, Any]) -> str:
    """Like "optimizer.learning_rate = 0.001, backbone.dropout = 0.5"."""
    return ", ".join(f"{key} = {value}" for key, value in values.items())


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _finished(workdir: Path) -> dict[str, Any] | None:
    file = workdir / FINISHED_FILE
    return read_json_object(file) if file.exists() else None


def _check_same(config: ml_collections.ConfigDict, workdir: Path) -> None:
    # A run with none of these has not begun training, so its config may still be corrected.
    if any((workdir / name).exists() for name in ("checkpoints", "report", "report_validation", _TRIAL_FILE)):
        saved_config.check_same(config, workdir, f"remove {workdir}, and it will be trained again")


def _begin(config: ml_collections.ConfigDict, workdir: Path, chosen_in: Path | None = None) -> None:
    """
    Args:
      chosen_in: the workdir of a run that has made the choices which the config leaves open; by default `workdir`.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    config_file.save(saved_config.with_choices(config, chosen_in or workdir).to_dict(), workdir)


def _train_trial(config: ml_collections.ConfigDict, workdir: Path, title: str) -> float:
    """Trains a trial without reading its test split. Returns its score."""
    _check_same(config, workdir)
    _begin(config, workdir)
    launch(["simgr_jax.train", "--noreport", f"--workdir={workdir}"], workdir, title)
    log = workdir / "metrics.jsonl"
    if log.exists():
        return max(line[SCORE] for line in read_log(log) if SCORE in line)
    # A model without parameters is not evaluated during training.
    launch(["simgr_jax.evaluate", "--split=validation", f"--workdir={workdir}"], workdir, title)
    return read_json_object(workdir / "report_validation" / "metrics.json")[SELECTION_METRIC]


def _copy_learned(source: Path, workdir: Path) -> None:
    """Copies what another run learned, if anything, so that nothing is left to train; and what it chose."""
    if (source / "checkpoints").exists():
        _begin(saved_config.load(workdir), workdir, source)
        shutil.rmtree(workdir / "checkpoints", ignore_errors=True)
        for name in ("metrics.jsonl", *LEARNED_FILES):
            (workdir / name).unlink(missing_ok=True)
            if (source / name).exists():
                shutil.copy2(source / name, workdir)
        with atomic_path(workdir / "checkpoints") as temporary:
            shutil.copytree(source / "checkpoints", temporary)


def _best_first(trials: dict[int, Trial]) -> list[int]:
    """The numbers of the trials that did not fail, best first."""
    scores = {number: trial.score for number, trial in trials.items() if trial.score is not None}
    return sorted(scores, key=lambda number: -scores[number])


def _read_trial(workdir: Path, values: dict[str, Any]) -> Trial | None:
    file = workdir / _TRIAL_FILE
    if not file.exists():
        return None
    result = read_json_object(file)
    return Trial(values, result.get(SCORE), result.get("failed"))


def launch(arguments: Sequence[str], workdir: Path, title: str) -> None:
    """Runs `python -m ARGUMENTS` to its end. Its output goes to `workdir/output.log`; a terminal shows its last line.

    Raises:
      RunFailed: the process failed.
      Stopped: a signal asked it to stop.
    """
    last = ""
    with (
        (workdir / "output.log").open("a", encoding="utf-8") as log,
        Console().status(escape(title)) as status,
        # Unbuffered, so that the error is the last line of the output.
        _process([sys.executable, "-u", "-m", *arguments]) as process,
    ):
        for line in process.stdout:
            log.write(line)
            log.flush()
            last = line.strip() or last
            status.update(escape(f"{title}: {last}"))
    if process.returncode == Stopped.EXIT_CODE:
        raise Stopped(f"{title}: stopped by a signal")
    if code := process.returncode:
        reason = f"was ended by {signal.Signals(-code).name}" if code < 0 else last.removeprefix("error: ")
        raise RunFailed(reason, by_user=code == 2)


@contextlib.contextmanager
def _process(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """A process whose output is read here. It is terminated when this process is, and may save a checkpoint first."""
    before = {number: signal.signal(number, lambda number, _: sys.exit(128 + number)) for number in SIGNALS}
    try:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8", "errors": "replace"}
        # In a group of its own, so that a terminal's Ctrl-C does not reach it as well: a second signal ends it at once.
        with subprocess.Popen(command, process_group=0, **pipes) as process:
            try:
                yield process
            except BaseException:
                process.terminate()
                raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
