"""Runs that are killed at any moment, again and again, end as a run does that nobody kills."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from simgr_jax.errors import Stopped
from simgr_jax.workdir.cache import load_arrays

RUNS = 20
# On a busy machine, where a run takes longer than half a minute, a third of its time.
SECONDS_TO_STOP = 10
SECONDS_TO_END = 600
STEPS = 12
# Twelve steps, of which every second is validated. There are checkpoints after these and after every third step.
OPTIONS = ("--config.training.epochs=6", "--config.training.checkpoint_every_steps=3")
OPTIONS += ("--config.training.log_every_steps=1", "--config.training.patience=100")
PHASES = ("importing", "preparing", "compiling", "training", "validating", "saving", "reporting")
TIMES = ("train_seconds", "train_targets_per_second")


class Process:
    """`python -m simgr_jax.train` in a workdir."""

    def __init__(self, root: Path, workdir: Path):
        self.workdir, folder = workdir, workdir.parent
        self._out, self._err = folder / "stdout", folder / "stderr"
        command = [sys.executable, "-m", "simgr_jax.train", f"--config={root}/tests/tiny_config.py", *OPTIONS]
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self._process = subprocess.Popen(
                [*command, f"--workdir={workdir}"], cwd=root, stdout=out, stderr=err, start_new_session=True
            )
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def phase(self) -> str:
        """What the process does now, by what it has printed and what is in the workdir; "" if it has ended."""
        if self._process.poll() is not None:
            return ""
        lock, printed = self.workdir / ".lock", self._out.read_text(errors="replace")
        if not lock.exists() or f"process {self._process.pid} on" not in lock.read_text():
            return "importing"
        if " interactions\n" not in printed:
            return "preparing"
        if any((self.workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*")):
            return "saving"
        steps = [line for line in printed.splitlines() if line.startswith("step ")]
        if not steps:
            latest = max((int(path.name) for path in (self.workdir / "checkpoints").glob("[0-9]*")), default=0)
            return "reporting" if latest == STEPS else "compiling"
        number = int(steps[-1].split()[1].partition("/")[0])
        if number == STEPS:  # The loop may have ended since this was read.
            return "reporting"
        return "validating" if number % 2 == 0 and " validation/" not in steps[-1] else "training"

    def phase_at(self, moment: float) -> str:
        """Waits until this many seconds after the start, or the end. Returns what the process does then."""
        while self._process.poll() is None and (left := moment - self.seconds) > 0:
            time.sleep(min(left, 0.05))
        return self.phase()

    def kill(self, number: signal.Signals, phase: str, seconds: float) -> tuple[int, str]:
        self._process.send_signal(number)
        try:
            return self.end(seconds)
        except subprocess.TimeoutExpired as error:
            raise AssertionError(
                f"{number.name} while {phase}: not ended after {seconds} s ({self._states})"
            ) from error

    def end(self, seconds: float = SECONDS_TO_END) -> tuple[int, str]:
        """Waits for the end. Returns the exit code and what is on stderr. No process may be left."""
        try:
            code = self._process.wait(seconds)
        finally:
            if self._process.poll() is None:
                self._states = self._threads()
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        with pytest.raises(ProcessLookupError):
            os.killpg(self._process.pid, 0)
        return code, self._err.read_text()

    def _threads(self) -> str:
        """What the kernel says of each thread: its state (D waits for the disk), and where it waits."""
        found = []
        for thread in Path(f"/proc/{self._process.pid}/task").iterdir():
            with contextlib.suppress(OSError):
                state = (thread / "stat").read_text().rpartition(")")[2].split()[0]
                found.append(f"{state} {(thread / 'wchan').read_text()}")
        return ", ".join(f"{count} {state}" for state, count in collections.Counter(found).items())


def check_end(number: signal.Signals, phase: str, code: int, err: str) -> int | None:
    """Checks how a process ended that got a signal. Returns the step that it stopped at, if it says one."""
    told = f"{number.name} while {phase}: exit code {code}, stderr {err!r}"
    if code == Stopped.EXIT_CODE and number != signal.SIGKILL:
        first, *rest = err.split(f" of {STEPS}, which is saved; give the same command again to continue\n")
        assert first.startswith("stopped after step ") and rest == [""], told
        return int(first.removeprefix("stopped after step "))
    # A process that had just ended could not be killed.
    assert code in (-number, 0) and not err, told
    # A training loop stops by itself.
    assert number == signal.SIGKILL or phase not in ("validating", "training"), told
    return None


def files(workdir: Path) -> set[str]:
    """The files whose names are the same in every run."""
    found = {str(file.relative_to(workdir)) for file in workdir.rglob("*") if file.is_file()}
    return {name for name in found if not name.startswith("tensorboard/") and "/d/" not in name}


def read(file: Path) -> object:
    """What a file holds, without times."""
    if file.suffix == ".npz":
        return {name: (array.dtype, array.shape, array.tobytes()) for name, array in load_arrays(file).items()}
    value = json.loads(file.read_text())
    return {name: part for name, part in value.items() if name not in TIMES}


def log(workdir: Path, stops: list[int]) -> list[dict]:
    """The lines of metrics.jsonl without speeds. A stop adds a line, which takes a step from the next one, so both are
    left out."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    trained = [line["step"] for line in lines if "train/loss" in line]
    left_out = {step for stop in stops for step in [stop, *sorted(step for step in trained if step > stop)[:1]]}
    return [
        {name: value for name, value in line.items() if name != "train/targets_per_second"}
        for line in lines
        if not (line["step"] in left_out and "train/loss" in line)
    ]


def assert_same_run(workdir: Path, expected: Path, stops: list[int]) -> None:
    """Compares all that a run leaves, to the bit, without times."""
    assert files(workdir) == files(expected)
    for name in sorted(files(expected)):
        if Path(name).suffix in (".npz", ".json") and not name.startswith("checkpoints/"):
            assert read(workdir / name) == read(expected / name), name
    assert log(workdir, stops) == log(expected, stops)
    for checkpoint in (expected / "checkpoints").iterdir():
        other = workdir / "checkpoints" / checkpoint.name
        for item in ("state", "model"):
            found, wanted = (ocp.StandardCheckpointer().restore(folder / item) for folder in (other, checkpoint))
            jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), found, wanted)
        found, wanted = (json.loads((folder / "progress" / "metadata").read_text()) for folder in (other, checkpoint))
        for key in ("best", "since_best", "targets", "input"):
            assert found[key] == wanted[key]


@pytest.fixture(scope="module")
def unkilled(root, tmp_path_factory):
    """The workdir of a run that nobody killed, the seconds after the start of another such run, by phase, and how many
    seconds a run has to stop.

    The first compiles all programs, and the second finds them in the compilation cache, as those that are killed do.
    """
    # A shell's background jobs ignore it, and so would the runs.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    first, second = (tmp_path_factory.mktemp("unkilled") / "workdir" for _ in range(2))
    assert Process(root, first).end() == (0, "")
    process, moments = Process(root, second), collections.defaultdict(list)
    while phase := process.phase():
        moments[phase].append(process.seconds)
        time.sleep(0.02)
    limit = max(SECONDS_TO_STOP, process.seconds / 3)
    assert process.end() == (0, "")
    assert set(moments) == set(PHASES)
    # Python itself answers a signal in its first moments.
    moments["importing"] = [moment for moment in moments["importing"] if moment > 1]
    assert_same_run(second, first, [])
    yield first, moments, limit
    signal.signal(signal.SIGINT, before)


def killed_run(
    root: Path, workdir: Path, moments: dict[str, list[float]], limit: float, seed: int
) -> tuple[list[str], list[int]]:
    """Kills a run two or three times, and lets it end. Returns the phases that it was killed in, and the steps that it
    stopped at.

    Args:
      limit: the most seconds from a signal to the end.
    """
    generator, phases, stops = np.random.default_rng(seed), [], []
    # Every phase is the first of some run. A run that continues is shorter, and may end before a later moment.
    for planned in (PHASES[seed % len(PHASES)], *generator.choice(PHASES, generator.integers(1, 3))):
        process = Process(root, workdir)
        phase = process.phase_at(generator.choice(moments[planned]))
        number = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)[generator.integers(3)]
        if phase:
            phases.append(f"{phase} {number.name}")
            stopped = check_end(number, phase, *process.kill(number, phase, limit))
            stops += [] if stopped is None else [stopped]
        else:
            assert process.end() == (0, "")
        # Others may write to a report, so what a killed run has left there is removed a day later.
        for file in (workdir / "report").glob(".*"):
            os.utime(file, (time.time() - 25 * 3600,) * 2)
    assert Process(root, workdir).end() == (0, "")
    return phases, stops


@pytest.mark.slow
def test_a_run_that_is_killed_at_any_moment_ends_as_if_nothing_had_happened(root, unkilled, tmp_path):
    """As many runs at a time as there are cores."""
    expected, moments, limit = unkilled
    workdirs = [tmp_path / str(number) / "workdir" for number in range(RUNS)]
    for workdir in workdirs:
        workdir.parent.mkdir()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        runs = [
            threads.submit(killed_run, root, workdir, moments, limit, seed) for seed, workdir in enumerate(workdirs)
        ]
    seen = collections.Counter()
    for run, workdir in zip(runs, workdirs, strict=True):
        phases, stops = run.result()
        assert_same_run(workdir, expected, stops)
        seen.update(phases)
    print("killed while:", ", ".join(f"{phase} {count}" for phase, count in sorted(seen.items())))
    assert {phase.split()[0] for phase in seen} == set(PHASES)
