"""Runs of several processes on this machine, which must equal the run of a single process."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys

import pytest
import tiny_run

from tests import virtual_devices

# A batch has four parts for any number of processes. There are 24 steps, each with a log line, and two checkpoints.
TRAINING = {"input_streams": 4, "log_every_steps": 1, "batch_rows": 8, "epochs": 8, "evaluate_every_epochs": 4}


@pytest.fixture(scope="module")
def run(root):
    """A function (workdir, count, devices, **flags) that runs `count` processes of tiny_process.py.

    It returns (exit code, stdout, stderr) of each.
    """

    def run(workdir, count, devices=1, **flags):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{listener.getsockname()[1]}"
        env = virtual_devices.environment(devices) | virtual_devices.UNCACHED | {"PYTHONPATH": str(root)}
        flags |= {"workdir": workdir, "training": json.dumps(TRAINING)}
        command = [sys.executable, str(root / "tests" / "training" / "tiny_process.py")]
        command += [f"--{name}={value}" for name, value in flags.items()]
        command += [f"--coordinator={address}", f"--num_processes={count}"]
        processes = [
            subprocess.Popen([*command, f"--process_id={number}"], env=env, stdout=-1, stderr=-1, text=True)
            for number in range(count)
        ]
        try:
            outputs = [process.communicate(timeout=300) for process in processes]
        finally:
            for process in processes:
                process.kill()
        return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]

    return run


def finishes(ended):
    """Checks that every process finished and only the first printed anything."""
    assert [code for code, _, _ in ended] == [0] * len(ended), "\n".join(err for _, _, err in ended)
    assert [out for _, out, _ in ended[1:]] == [""] * (len(ended) - 1)
    assert "step 24/" in ended[0][1]


def lines(workdir):
    """The log without its speeds."""
    return [
        {name: value for name, value in line.items() if name != "train/targets_per_second"}
        for line in tiny_run.log(workdir)
    ]


def assert_same(lines, expected):
    """Compares losses, gradients and metrics."""
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    for line, other in zip(lines, expected, strict=True):
        assert line == pytest.approx(other, rel=1e-5)


@pytest.fixture(scope="module")
def alone(run, tmp_path_factory):
    """The log of a run of one process."""
    workdir = tmp_path_factory.mktemp("alone") / "workdir"
    finishes(run(workdir, 1))
    return lines(workdir)


@pytest.mark.slow
def test_a_killed_run_of_four_processes_continues_with_two(run, alone, tmp_path):
    workdir = tmp_path / "workdir"
    assert all(code for code, _, _ in run(workdir, 4, kill_at=23))
    assert lines(workdir)[-1]["step"] >= 20  # The first to be killed ends the others, which may be a step behind.
    assert_same(lines(workdir), alone[: len(lines(workdir))])
    finishes(run(workdir, 2))  # From step 12.
    assert_same(lines(workdir), alone)


@pytest.mark.slow
@pytest.mark.parametrize("only", [{}, {"kill_only": 1}])
def test_a_preempted_run_of_two_processes_loses_no_step(run, alone, tmp_path, only):
    """SIGTERM comes to both, or to the one that writes nothing; both stop at the same step."""
    workdir = tmp_path / "workdir"
    ended = run(workdir, 2, kill_at=14, kill_with="SIGTERM", **only)
    assert [code for code, _, _ in ended] == [75, 75], "\n".join(err for _, _, err in ended)
    step = int(re.search(r"stopped after step (\d+) of 24, which is saved", ended[0][2])[1])
    assert 14 <= step < 24 and (workdir / "checkpoints" / str(step)).is_dir()
    (continued,) = run(workdir, 1)
    assert continued[0] == 0, continued[2]
    logged = [int(number) for number in re.findall(r"step (\d+)/24", continued[1])]
    assert min(logged) == step + 2, "the line of a step is logged after the next step"
    # The line at the stop also has the step that the next line would have had.
    others = [[line for line in log if line["step"] not in (step, step + 1)] for log in (lines(workdir), alone)]
    assert_same(*others)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "devices", "mesh"),
    [
        (1, 4, {}),
        (2, 1, {}),
        (4, 1, {}),
        (2, 2, {"data": 2}),
        # The processes have different parts of the parameters, and read the same batches.
        (2, 2, {"tensor": 4}),
    ],
)
def test_several_train_as_one(run, alone, tmp_path, count, devices, mesh):
    finishes(run(tmp_path / "workdir", count, devices, mesh=json.dumps(mesh)))
    assert_same(lines(tmp_path / "workdir"), alone)
