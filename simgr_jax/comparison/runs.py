"""Training what a comparison needs and does not have yet: trials, then full runs, each in a process of its own.

A process gives back its memory, and one that fails takes no other with it.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
from rich.console import Console
from rich.markup import escape

from simgr_jax import run_config
from simgr_jax.cache import atomic_path, write_json
from simgr_jax.comparison.rows import Row, with_values
from simgr_jax.files import read_json_object, read_text
from simgr_jax.training.checkpoints import SELECTION_METRIC

SCORE = f"validation/{SELECTION_METRIC}"
_TRIAL_FILE = "trial.json"
# In the workdir of a run that was trained to its end and reported on.
FINISHED_FILE = "finished.json"


class RunFailed(Exception):
    """A run's process ended with an error.

    Attributes:
      by_user: it was a user's mistake, a `UserError`; else a bug, or something ended the process.
    """

    def __init__(self, reason: str, by_user: bool):
        super().__init__(reason)
        self.by_user = by_user


class Trial(NamedTuple):
    """
    Attributes:
      values: what it changed, by full key.
      score: its best validation NDCG@10, None where it failed.
      failure: why it did.
    """

    values: dict[str, Any]
    score: float | None
    failure: str | None = None


class Tuning(NamedTuple):
    """A row's trials and which of them did best, None where there are none."""

    trials: tuple[Trial, ...] = ()
    chosen: int | None = None

    @property
    def values(self) -> dict[str, Any]:
        """What the row's runs take from it, by full key."""
        return {} if self.chosen is None else self.trials[self.chosen].values


class Runs:
    """The runs below a comparison's folder: `runs/ROW`, `runs/ROW-SEED` of further seeds, and `trials/ROW-NUMBER`.

    Each is an ordinary workdir. All share one cache, so that semantic IDs are made once for all rows with the same.
    """

    def __init__(self, folder: Path, config: ml_collections.ConfigDict, rows: Sequence[Row]):
        """config, rows: the comparison's, all of them."""
        self._folder = folder.resolve()
        self._rows = {row.name: row for row in rows}
        self._cache_dir = config.base.cache_dir or str(self._folder / "cache")
        self._data_path = config.base.data.path
        self._trial_epochs = config.trial_epochs

    @property
    def places(self) -> dict[str, str]:
        """Where data and cache are now, by full key: a run's own config has where they were when it began."""
        return {"data.path": self._data_path, "cache_dir": self._cache_dir}

    def workdir(self, row: Row, seed: int) -> Path:
        return self._folder / "runs" / (row.name if seed == row.seeds[0] else f"{row.name}-{seed}")

    def finished_seeds(self, row: Row) -> list[int]:
        return [seed for seed in row.seeds if self._is_finished(row, seed)]

    def check(self, row: Row) -> None:
        """Checks that what was begun before had the same config.

        Raises:
          UserError: it had another.
        """
        if not row.trained_as:
            for number, values in enumerate(row.trials, start=1):
                _check_same(self._trial_config(row, values), self._trial_workdir(row, number))
        tuning = self.tuning(row)
        if tuning is not None:
            for seed in row.seeds:
                # What was taken over from a run that is there no more will be taken over again, whatever it was.
                if not row.trained_as or self._is_finished(row, seed):
                    _check_same(self._config(row, seed, tuning), self.workdir(row, seed))

    def tuning(self, row: Row) -> Tuning | None:
        """The row's tuning, or None while it is not finished."""
        if row.trained_as:
            return self.tuning(self._rows[row.trained_as])
        trials = tuple(
            _read_trial(self._trial_workdir(row, number), values) for number, values in enumerate(row.trials, start=1)
        )
        if None in trials:
            return None
        scores = [-1.0 if trial.score is None else trial.score for trial in trials]
        if trials and max(scores) < 0:
            return None
        return Tuning(trials, scores.index(max(scores)) if trials else None)

    def tune(self, row: Row) -> Tuning:
        """Trains the trials that are missing, but not another row's.

        A trial that failed by its settings, like a learning rate with which the loss exploded, is one that did not do
        best; but where all failed, they are tried again the next time.

        Raises:
          RunFailed: all of them failed, or one not by its settings; or they are another row's, and missing.
        """
        if row.trained_as:
            return self._taken_over_tuning(row)
        failures = []
        for number, values in enumerate(row.trials, start=1):
            workdir = self._trial_workdir(row, number)
            if _read_trial(workdir, values) is None:
                title = f"{row.name}, trial {number} of {len(row.trials)} ({describe(values)})"
                try:
                    score = _train_trial(self._trial_config(row, values), workdir, title)
                    write_json(workdir / _TRIAL_FILE, {SCORE: score})
                    print(f"{title}: {SCORE} {score:.4f}", flush=True)
                except RunFailed as failure:
                    if not failure.by_user:
                        raise
                    failures.append(failure)
                    write_json(workdir / _TRIAL_FILE, {"failed": str(failure)})
                    print(f"{title}: failed: {failure}", flush=True)
        tuning = self.tuning(row)
        if tuning is None:
            for number in range(1, len(row.trials) + 1):
                (self._trial_workdir(row, number) / _TRIAL_FILE).unlink()
            raise failures[0]
        return tuning

    def train(self, row: Row, seed: int, tuning: Tuning) -> None:
        """Trains and reports on a run that is not finished.

        Raises:
          RunFailed: it failed.
          UserError: there is a run of another config.
        """
        workdir = self.workdir(row, seed)
        if self._is_finished(row, seed):
            return
        config = self._config(row, seed, tuning)
        if not row.trained_as:
            _check_same(config, workdir)
        title = workdir.name + (f" ({describe(tuning.values)})" if tuning.values else "")
        _begin(config, workdir)
        source = self._take_over(row, seed) if row.trained_as else {}
        launch(["simgr_jax.train", f"--workdir={workdir}"], workdir, title)
        write_json(workdir / FINISHED_FILE, {"finished": _now()} | source)
        report = read_json_object(workdir / "report" / "metrics.json")
        print(f"{title}: NDCG@10 {report['NDCG@10']:.4f}, trained {report['train_seconds']:,.0f} s", flush=True)

    def _taken_over_tuning(self, row: Row) -> Tuning:
        tuning = self.tuning(row)
        if tuning is None or not self.finished_seeds(self._rows[row.trained_as]):
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
        """Copies what the other row's run learned; there is then nothing left to train. Returns which run it was."""
        source, workdir = self.workdir(self._rows[row.trained_as], seed), self.workdir(row, seed)
        finished = _finished(source)
        if finished is None:
            raise RunFailed(f"takes over {source.name}, which is not trained; train that too", True)
        if (source / "checkpoints").exists():
            shutil.rmtree(workdir / "checkpoints", ignore_errors=True)
            shutil.copy2(source / "metrics.jsonl", workdir)
            with atomic_path(workdir / "checkpoints") as temporary:
                shutil.copytree(source / "checkpoints", temporary)
        return {"source": finished["finished"]}

    def _trial_workdir(self, row: Row, number: int) -> Path:
        return self._folder / "trials" / f"{row.name}-{number}"

    def _trial_config(self, row: Row, values: dict[str, Any]) -> ml_collections.ConfigDict:
        own = {"training.epochs": self._trial_epochs, "seed": row.seeds[0], "cache_dir": self._cache_dir}
        return with_values(row.config, values | own)

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
    # What has none of these never began, so that its config may be corrected.
    if any((workdir / name).exists() for name in ("checkpoints", "report", "report_validation", _TRIAL_FILE)):
        run_config.check_same(config, workdir)


def _begin(config: ml_collections.ConfigDict, workdir: Path) -> None:
    workdir.mkdir(parents=True, exist_ok=True)
    run_config.save(config, workdir)


def _train_trial(config: ml_collections.ConfigDict, workdir: Path, title: str) -> float:
    """Trains it; its test split stays unread. Returns its score."""
    _check_same(config, workdir)
    _begin(config, workdir)
    launch(["simgr_jax.train", "--noreport", f"--workdir={workdir}"], workdir, title)
    log = workdir / "metrics.jsonl"
    if log.exists():
        lines = map(json.loads, read_text(log).splitlines())
        return max(line[SCORE] for line in lines if SCORE in line)
    # A model without parameters: nothing was evaluated while it trained.
    launch(["simgr_jax.evaluate", "--split=validation", f"--workdir={workdir}"], workdir, title)
    return read_json_object(workdir / "report_validation" / "metrics.json")[SELECTION_METRIC]


def _read_trial(workdir: Path, values: dict[str, Any]) -> Trial | None:
    file = workdir / _TRIAL_FILE
    if not file.exists():
        return None
    result = read_json_object(file)
    return Trial(values, result.get(SCORE), result.get("failed"))


def launch(arguments: Sequence[str], workdir: Path, title: str) -> None:
    """Runs `python -m ARGUMENTS` to its end, its output in `workdir/output.log`, and on a terminal shows its last line.

    Raises:
      RunFailed: the process did.
    """
    last = ""
    with (
        (workdir / "output.log").open("a", encoding="utf-8") as log,
        Console().status(escape(title)) as status,
        # Unbuffered, or what it printed would come after its last words, the error.
        _process([sys.executable, "-u", "-m", *arguments]) as process,
    ):
        for line in process.stdout:
            log.write(line)
            log.flush()
            last = line.strip() or last
            status.update(escape(f"{title}: {last}"))
    if code := process.returncode:
        reason = f"was ended by {signal.Signals(-code).name}" if code < 0 else last.removeprefix("error: ")
        raise RunFailed(reason, by_user=code == 2)


@contextlib.contextmanager
def _process(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """A process whose output is read here; ended, too, when this one is."""
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8", "errors": "replace"}
        with subprocess.Popen(command, **pipes) as process:
            try:
                yield process
            except BaseException:
                process.terminate()
                raise
    finally:
        signal.signal(signal.SIGTERM, before)
