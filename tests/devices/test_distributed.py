"""Processes on this machine that connect over loopback, and cluster environments."""

import json
import os
import socket
import subprocess
import sys
from typing import NamedTuple

import jax
import pytest

from simgr_jax.devices import distributed
from simgr_jax.errors import UserError

CLUSTERS = ("JAX_", "SLURM_", "TPU_", "JOB_", "NNODES", "NODE_RANK", "PROCESSES_IN_JOB", "CUDA_VISIBLE_DEVICES")


@pytest.fixture
def port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def start(root, tmp_path):
    """A function (case, *flags, **variables) -> Popen of one process of tests/devices/together.py."""
    processes = []

    def start(case, *flags, **variables):
        env = {name: value for name, value in os.environ.items() if not name.startswith(CLUSTERS)}
        env |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)} | variables
        command = [sys.executable, str(root / "tests" / "devices" / "together.py"), case, str(tmp_path), *flags]
        processes.append(subprocess.Popen(command, env=env, stdout=-1, stderr=-1, text=True))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def flags(port, number, count=2):
    return f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}", f"--process_id={number}"


def ends(process):
    """Exit code, stdout and stderr."""
    out, err = process.communicate(timeout=90)
    return process.returncode, out, err


def by_flags(port):
    return [(flags(port, number), {}) for number in range(2)]


def by_kubeflow(port):
    env = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"}
    return [((), env | {"JAX_PROCESS_ID": str(number)}) for number in range(2)]


def by_slurm(port):
    # JAX derives the port from the job's number.
    env = {"SLURM_JOB_ID": str(port % 4096), "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "2"}
    return [((), env | {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)}) for number in range(2)]


@pytest.mark.parametrize(
    "by", [by_flags, *(pytest.param(by, marks=pytest.mark.slow) for by in (by_kubeflow, by_slurm))]
)
def test_processes_connect_and_agree(start, port, tmp_path, by):
    processes = [start("agree", *options, **env) for options, env in by(port)]
    (code, out, err), (other_code, other_out, other_err) = map(ends, processes)
    assert (code, other_code) == (0, 0), err + other_err
    # Gloo prints lines of its own.
    assert [line for line in out.splitlines() if "Gloo" not in line] == ["hello", "rich hello", "hello from below"]
    assert other_out == ""
    for number in range(2):
        assert json.loads((tmp_path / f"{number}.json").read_text()) == {
            "processes": 2,
            "main": number == 0,
            "found_prepared": number == 1,
            "values": [["", "xxx"], [{"0": [0]}, {"1": [1]}]],
        }


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("disagree", "config.cache_dir: the semantic IDs differ between the processes; give all processes the same"),
        pytest.param("fail_in_preparation", "file: is wrong; mend it", marks=pytest.mark.slow),
    ],
)
def test_a_mistake_shared_by_all_processes_is_reported_once(start, port, case, message):
    processes = [start(case, *flags(port, number)) for number in range(2)]
    (code, _, err), (other_code, _, other_err) = map(ends, processes)
    assert (code, other_code) == (2, 2)
    assert err.startswith(f"error: {message}") and err.count("\n") == 1
    assert other_err == ""


@pytest.mark.parametrize(
    ("case", "expected", "message"),
    [
        ("fail_alone", 2, "error: this machine's file: is wrong; mend it\n"),
        pytest.param("crash_alone", 1, "ZeroDivisionError: ours\n", marks=pytest.mark.slow),
    ],
)
def test_a_process_that_fails_alone_reports_it_and_does_not_wait(start, port, case, expected, message):
    start(case, *flags(port, 0))
    code, _, err = ends(start(case, *flags(port, 1)))
    assert code == expected
    assert err.endswith(message)


def test_a_single_process_runs_alone(start, port, tmp_path):
    code, out, _ = ends(start("agree", *flags(port, 0, count=1)))
    assert (code, out) == (0, "hello\nrich hello\nhello from below\n")
    assert json.loads((tmp_path / "0.json").read_text()) == {
        "processes": 1, "main": True, "found_prepared": False, "values": [[""], [{"0": [0]}]],
    }  # fmt: skip


def test_a_port_in_use_is_refused(start):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        code, _, err = ends(start("agree", *flags(port, 0)))
    assert code == 2
    assert f"error: --coordinator=127.0.0.1:{port}: process 0 can't listen there (" in err


@pytest.fixture
def initialize(monkeypatch):
    """Calls `distributed.initialize` in an environment; returns the options passed to JAX, or None if not called."""

    def initialize(*given, platforms=None, **environment):
        asked = []
        for name in os.environ:
            if name.startswith(CLUSTERS):
                monkeypatch.delenv(name)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(jax.distributed, "initialize", lambda **options: asked.append(options))
        monkeypatch.setattr(distributed, "_await_coordinator", lambda *address: None)
        monkeypatch.setattr(distributed, "START_SECONDS", 600)
        before = {name: jax.config.values[name] for name in ("jax_platforms", "jax_enable_preemption_service")}
        jax.config.update("jax_platforms", platforms)
        try:
            distributed.initialize(*(given or (None, None, None)))
        finally:
            for option in before.items():
                jax.config.update(*option)
        if not asked:
            return None
        assert asked[0].pop("initialization_timeout") == 600
        return asked[0]

    return initialize


def connection(address, count, number, bound=None):
    return {
        "coordinator_address": address,
        "num_processes": count,
        "process_id": number,
        "cluster_detection_method": "deactivate",
        "coordinator_bind_address": bound,
    }


def test_flags_override_the_environment(initialize):
    assert initialize("host:1234", 4, 3) == connection("host:1234", 4, 3)
    assert initialize("host:1234", 4, 3, SLURM_NTASKS="2", JAX_NUM_PROCESSES="2") == connection("host:1234", 4, 3)
    # A coordinator on loopback accepts no connections from other machines.
    for address in ("127.0.0.1:80", "localhost:80", "[::1]:80"):
        assert initialize(address, 2, 1) == connection(address, 2, 1, bound=address)
    assert initialize("[fe80::1]:80", 2, 1) == connection("[fe80::1]:80", 2, 1)


KUBEFLOW = {"JAX_COORDINATOR_ADDRESS": "job-node-0-0.job:29500", "JAX_COORDINATOR_PORT": "29500"}
XPK = {"JAX_COORDINATOR_ADDRESS": "run-slice-job-0-0.run"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (KUBEFLOW | {"JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}, ("job-node-0-0.job:29500", 4, 3)),
        # xpk, GPUs
        (
            XPK | {"JAX_COORDINATOR_PORT": "6002", "NNODES": "2", "NODE_RANK": "1"},
            ("run-slice-job-0-0.run:6002", 2, 1),
        ),
        # xpk, CPUs: process 1 of 2 in the second of two Jobs
        (
            XPK | {"JAX_PROCESS_COUNT": "4", "PROCESSES_IN_JOB": "2", "JOB_INDEX": "1", "JOB_COMPLETION_INDEX": "1"},
            ("run-slice-job-0-0.run:1234", 4, 3),
        ),
        # A plain indexed Job
        (
            {"JAX_COORDINATOR_ADDRESS": "job-0.jobs", "JAX_NUM_PROCESSES": "8", "JOB_COMPLETION_INDEX": "0"},
            ("job-0.jobs:1234", 8, 0),
        ),
    ],
)
def test_kubernetes(initialize, environment, expected):
    assert initialize(**environment) == connection(*expected)


SLURM = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}


@pytest.mark.parametrize(
    ("environment", "gpus"),
    [
        # Two tasks in all, or two on each node, see the same GPUs: each task uses one.
        ({"SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "1"}, None),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_NODES": "2", "CUDA_VISIBLE_DEVICES": "0,1"}, None),
        # A single task on each node uses all GPUs.
        ({"SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "2", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, [0, 1, 2, 3]),
        # Each task sees only its own GPUs.
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_NODES": "2", "CUDA_VISIBLE_DEVICES": "3"}, [0]),
        (
            {
                "SLURM_NTASKS": "4",
                "SLURM_STEP_NUM_NODES": "2",
                "SLURM_GPUS_PER_TASK": "2",
                "CUDA_VISIBLE_DEVICES": "2,3",
            },
            [0, 1],
        ),
    ],
)
def test_slurm(initialize, environment, gpus):
    assert initialize(**SLURM, **environment) == {"local_device_ids": gpus}


@pytest.mark.parametrize("platforms", ["tpu", "tpu,cpu"])
def test_tpus(initialize, platforms):
    assert initialize(platforms=platforms) == {}  # JAX asks Google's metadata server.
    assert initialize(platforms=platforms, TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="a,b", TPU_WORKER_ID="1") == {}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"platforms": "cpu"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"},  # Possibly one of many independent runs.
        {**SLURM, "SLURM_NTASKS": "1"},
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"},  # A batch script without srun.
        {"platforms": "cpu", "TPU_WORKER_HOSTNAMES": "a,b"},
        {"platforms": "tpu", "TPU_SKIP_MDS_QUERY": "1"},
        KUBEFLOW | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"},
    ],
)
def test_a_single_process_does_not_initialize_jax_distributed(initialize, environment):
    assert initialize(**environment) is None
    assert distributed.is_main() and not distributed.several()


@pytest.mark.parametrize(
    ("given", "environment", "message"),
    [
        ((None, 2, 0), {}, "--coordinator: is missing; give --coordinator, --num_processes, --process_id together"),
        (("h:1", None, 0), {}, "--num_processes: is missing"),
        (("h:1", 2, None), {}, "--process_id: is missing"),
        (("h:1", 0, 0), {}, "--num_processes: can't be 0; give the number of processes in the run"),
        (("h:1", 2, 2), {}, "--process_id: 2 is out of range for 2 processes; count from 0 to 1"),
        (("h:1", 2, -1), {}, "--process_id: -1 is out of range for 2 processes"),
        (("host", 2, 0), {}, '--coordinator: "host" is not an address; give the HOST:PORT'),
        (("host:", 2, 0), {}, '--coordinator: "host:" is not an address'),
        (("host:99999", 2, 0), {}, '--coordinator: "host:99999" is not an address'),
        (("a b:1", 2, 0), {}, '--coordinator: "a b:1" is not an address'),
        (("::1:80", 2, 0), {}, '--coordinator: "::1:80" is not an address'),
        ((), KUBEFLOW | {"JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"}, 'JAX_NUM_PROCESSES: "two" is not a num'),
        ((), XPK | {"NNODES": "2", "NODE_RANK": "2"}, "NODE_RANK: 2 is out of range for 2 processes"),
        ((), SLURM | {"SLURM_NTASKS": "x"}, 'SLURM_NTASKS: "x" is not a number'),
        ((), KUBEFLOW | {"JAX_NUM_PROCESSES": "2"}, "JAX_COORDINATOR_ADDRESS: is set without the number of processes"),
    ],
)
def test_invalid_flags_and_variables_are_refused(initialize, given, environment, message):
    with pytest.raises(UserError) as error:
        initialize(*given, **environment)
    assert str(error.value).startswith(message)


def test_a_missing_process_0_is_reported(monkeypatch, port):
    monkeypatch.setattr(distributed, "START_SECONDS", 0.5)
    with pytest.raises(UserError, match=rf"^--coordinator=127\.0\.0\.1:{port}: process 0 does not answer \(.*; start"):
        distributed.initialize(f"127.0.0.1:{port}", 2, 1)
    assert not jax.distributed.is_initialized()


class Device(NamedTuple):
    id: int
    process_index: int


class Rows:
    """A sharding, given the rows that each device of each process holds."""

    def __init__(self, *processes):
        self._held = [(process, rows) for process, held in enumerate(processes) for rows in held]

    def devices_indices_map(self, shape):
        return {Device(id, process): (slice(*rows, None),) for id, (process, rows) in enumerate(self._held)}


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        (Rows([(None, None)]), [(0, 1)]),
        (Rows([(0, 2), (2, 4)], [(4, 6), (6, 8)]), [(0, 2), (1, 2)]),
        (Rows([(4, 6), (6, 8)], [(0, 2), (2, 4)]), [(1, 2), (0, 2)]),
        (Rows([(0, 2), (4, 6)], [(2, 4), (6, 8)]), [(0, 2), (1, 2)]),
        # Processes that hold different parts of the parameters and the same rows: all rows, or half of them.
        (Rows([(0, 4), (4, 8)], [(0, 4), (4, 8)]), [(0, 1), (0, 1)]),
        (Rows([(0, 4)], [(4, 8)], [(0, 4)], [(4, 8)]), [(0, 2), (1, 2), (0, 2), (1, 2)]),
    ],
)
def test_each_process_reads_the_rows_its_devices_hold(monkeypatch, rows, parts):
    for number, part in enumerate(parts):
        monkeypatch.setattr(jax, "process_index", lambda number=number: number)
        assert distributed.input_part(rows, 8) == part


def test_partly_overlapping_rows_are_refused():
    with pytest.raises(UserError, match=r"^config\.mesh: two processes share some, but not all, of their rows"):
        distributed.input_part(Rows([(0, 4), (4, 8)], [(4, 8), (8, 12)], [(8, 12), (0, 4)]), 12)
