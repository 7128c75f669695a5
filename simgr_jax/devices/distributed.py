"""Several processes as one run: how they connect, what they must agree on, and which goes first."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import re
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from simgr_jax.devices import sharding
from simgr_jax.errors import UserError
from simgr_jax.workdir.cache import fingerprint

# How long processes wait for all to start, and at a barrier while one works for all.
START_SECONDS = 600
BARRIER_SECONDS = 24 * 3600
# How long a failed process waits for the others to fail as well.
FAILURE_SECONDS = 10

# The port of xpk's containers, whose coordinator address has none.
_DEFAULT_PORT = "1234"

_barriers = itertools.count()


class Process(NamedTuple):
    """One of a run's processes.

    Attributes:
      coordinator: the HOST:PORT that process 0 listens on.
    """

    coordinator: str
    num_processes: int
    process_id: int


def initialize(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Connects this process to the run's other processes, if there are any. Call it before any other use of JAX.

    The flags decide. Without flags, the environment of Kubernetes (Kubeflow's or xpk's variables), SLURM or a Cloud TPU
    decides. If there is only one process, nothing happens. Otherwise only process 0 keeps its standard output.

    Args:
      coordinator, num_processes, process_id: the flags' values; None for flags that are not given.

    Raises:
      UserError: flags or environment variables are incomplete or invalid, or process 0 cannot be reached.
    """
    process = _from_flags(coordinator, num_processes, process_id) or _from_kubernetes(os.environ)
    if process:
        if process.num_processes > 1:
            _connect(process)
    elif _on_slurm(os.environ):
        _initialize(local_device_ids=_slurm_gpus(os.environ))
    elif _on_tpu(os.environ):
        _initialize()
    elif "JAX_COORDINATOR_ADDRESS" in os.environ:
        raise UserError(
            "JAX_COORDINATOR_ADDRESS: is set without the number of processes and this process's number; also set "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID, or unset it"
        )
    if not is_main():
        _silence()


def _from_flags(coordinator: str | None, num_processes: int | None, process_id: int | None) -> Process | None:
    given = {"--coordinator": coordinator, "--num_processes": num_processes, "--process_id": process_id}
    missing = [flag for flag, value in given.items() if value is None]
    if len(missing) == len(given):
        return None
    if missing:
        raise UserError(f"{missing[0]}: is missing; give {', '.join(given)} together, or none of them")
    return _checked(Process(coordinator, num_processes, process_id), *given)


def _checked(process: Process, *names: str) -> Process:
    """names: the flags or variables that gave the coordinator, the number of processes and this process's number."""
    match = re.fullmatch(r"(?:[^\s:\[\]]+|\[[0-9A-Fa-f:.]+\]):(\d+)", process.coordinator)
    if not match or not 0 < int(match[1]) < 65536:
        raise UserError(f'{names[0]}: "{process.coordinator}" is not an address; give the HOST:PORT of process 0')
    if process.num_processes < 1:
        raise UserError(f"{names[1]}: can't be {process.num_processes}; give the number of processes in the run")
    if not 0 <= process.process_id < process.num_processes:
        raise UserError(
            f"{names[2]}: {process.process_id} is out of range for {process.num_processes} processes; count from 0 to "
            f"{process.num_processes - 1}"
        )
    return process


def _from_kubernetes(env: Mapping[str, str]) -> Process | None:
    """Reads the variables of a pod that Kubeflow Trainer, xpk (on CPUs or GPUs) or a plain indexed Job sets.

    Kubeflow's names are JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. On TPUs xpk sets none of these;
    JAX asks the machines instead.
    """
    address = env.get("JAX_COORDINATOR_ADDRESS")
    counts = [name for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_COUNT", "NNODES") if name in env]
    ids = [name for name in ("JAX_PROCESS_ID", "NODE_RANK", "JOB_COMPLETION_INDEX") if name in env]
    if not address or not counts or not ids:
        return None
    if ":" not in address:
        address = f"{address}:{env.get('JAX_COORDINATOR_PORT', _DEFAULT_PORT)}"
    process_id = _number(env, ids[0])
    if ids[0] == "JOB_COMPLETION_INDEX" and "PROCESSES_IN_JOB" in env:  # This is one of several Jobs.
        process_id += _number(env, "JOB_INDEX") * _number(env, "PROCESSES_IN_JOB")
    process = Process(address, _number(env, counts[0]), process_id)
    return _checked(process, "JAX_COORDINATOR_ADDRESS", counts[0], ids[0])


def _number(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env.get(name, ""))
    except ValueError:
        raise UserError(f'{name}: "{env.get(name, "")}" is not a number; correct the environment variable') from None


def _on_slurm(env: Mapping[str, str]) -> bool:
    """Whether srun started this process as one of several."""
    return "SLURM_STEP_NODELIST" in env and "SLURM_PROCID" in env and _number(env, "SLURM_NTASKS") > 1


def _slurm_gpus(env: Mapping[str, str]) -> list[int] | None:
    """The visible GPUs that this task uses; None leaves JAX's choice, the GPU with the task's local number.

    A task uses all visible GPUs if it is alone on its node or if SLURM shows it only its own.
    """
    visible = env.get("CUDA_VISIBLE_DEVICES")
    alone = env["SLURM_NTASKS"] == env.get("SLURM_STEP_NUM_NODES")
    if visible and (alone or "SLURM_GPUS_PER_TASK" in env or "," not in visible):
        return list(range(visible.count(",") + 1))
    return None


def _on_tpu(env: Mapping[str, str]) -> bool:
    """Whether this process uses TPUs that can find each other, through Google's metadata server or GKE's variables."""
    # On a Cloud TPU, JAX sets this at import unless the user has set it.
    if "tpu" not in (jax.config.jax_platforms or "").split(","):
        return False
    on_gke = "TPU_WORKER_HOSTNAMES" in env or "TPU_PROCESS_ADDRESSES" in env
    return on_gke or "TPU_SKIP_MDS_QUERY" not in env


def _connect(process: Process) -> None:
    host, _, port = process.coordinator.rpartition(":")
    if process.process_id:
        _await_coordinator(process.coordinator, host.strip("[]"), int(port))
    # The coordination service trusts everyone who connects, so a run on one machine listens on loopback only.
    loopback = host in ("localhost", "127.0.0.1", "[::1]")
    if not process.process_id:
        _check_port(process.coordinator, host.strip("[]") if loopback else "", int(port))
    _initialize(
        coordinator_address=process.coordinator,
        num_processes=process.num_processes,
        process_id=process.process_id,
        cluster_detection_method="deactivate",
        coordinator_bind_address=process.coordinator if loopback else None,
    )


def _check_port(address: str, host: str, port: int) -> None:
    """Refuses a port that is in use. JAX would crash without a message."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise UserError(
            f"--coordinator={address}: process 0 can't listen there ({error}); give an address of its machine and a "
            "free port"
        ) from error


def _await_coordinator(address: str, host: str, port: int) -> None:
    """Waits until process 0 answers. JAX would abort the whole process if nobody did."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            socket.create_connection((host, port), timeout=10).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"--coordinator={address}: process 0 does not answer ({error}); start it there, and check that all "
                    "machines can reach that port"
                ) from error
        time.sleep(0.2)


def _initialize(**options) -> None:
    """Calls JAX's own initialisation, which detects the options that are not given."""
    # With JAX's preemption service, SIGTERM would no longer end a process.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(initialization_timeout=START_SECONDS, **options)


def _silence() -> None:
    """Discards standard output, including what libraries print from C++."""
    sys.stdout.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


def is_main() -> bool:
    """Whether this is process 0, which writes and prints for all."""
    return not several() or jax.process_index() == 0


def warn(logger: str, message: str) -> None:
    """Logs a warning in process 0, for all. logger: its name."""
    if is_main():
        logging.getLogger(logger).warning(message)


def several() -> bool:
    """Whether the run has more than one process."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def barrier() -> None:
    """Waits until all processes have reached this point."""
    if several():
        key = f"simgr_jax.{next(_barriers)}"  # A key cannot be used twice.
        multihost.get_barrier_sync_fn()(key=key, timeout_ms=BARRIER_SECONDS * 1000)


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Process 0 runs the block first; the others then find its results in a shared cache.

    Each process runs the block alone, on one device. If process 0 fails, the others still run the block, so that a
    user's mistake makes all of them fail in the same way.
    """
    if not is_main():
        barrier()
    try:
        with jax.set_mesh(sharding.one_device()):
            yield
    finally:
        if is_main():
            barrier()


@contextlib.contextmanager
def main_holds(context: contextlib.AbstractContextManager[Any]) -> Iterator[None]:
    """Process 0 is in the context during the block. All processes must call it.

    Raises:
      UserError: in all processes, if the context raises one in process 0 when it is entered.
    """
    with contextlib.ExitStack() as held:
        problem = ""
        if is_main():
            try:
                held.enter_context(context)
            except UserError as error:
                problem = str(error)
        if problem := all_gather(problem)[0]:
            raise UserError(problem)
        yield


def all_gather(value: Any) -> list[Any]:
    """Gives every process the values of all processes, in order. All processes must call it.

    Args:
      value: any JSON value; an object's keys become strings.
    """
    mine = np.frombuffer(json.dumps(value).encode(), np.uint8)
    if not several():
        return [json.loads(mine.tobytes())]
    lengths = multihost_utils.process_allgather(np.array([len(mine)], np.int32))[:, 0]
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: len(mine)] = mine
    gathered = multihost_utils.process_allgather(padded)
    return [json.loads(row[:length].tobytes()) for row, length in zip(gathered, lengths, strict=True)]


def check_same(what: str, *parts: Any) -> None:
    """Checks that all processes made or read the same values. All processes must call it.

    Args:
      what: a plural noun for the message, e.g. "the semantic IDs".
      parts: as in `cache.fingerprint`.

    Raises:
      UserError: in all processes, if the values differ between any two.
    """
    if several() and len(set(all_gather(fingerprint(*parts)))) > 1:
        raise UserError(
            f"config.cache_dir: {what} differ between the processes; give all processes the same data and a shared "
            "folder"
        )


def input_part(placement: jax.sharding.Sharding, rows: int) -> tuple[int, int]:
    """(p, P): this process's devices hold the p-th of P parts of a batch's rows.

    Processes whose devices hold the same rows, with different parts of the parameters, have the same p.

    Raises:
      UserError: two processes share some, but not all, of their rows.
    """
    held = defaultdict(set)
    for device, (row, *_) in placement.devices_indices_map((rows,)).items():
        held[device.process_index].update(range(*row.indices(rows)))
    parts = sorted({tuple(sorted(part)) for part in held.values()})
    if sum(map(len, parts)) != rows:
        raise UserError(
            "config.mesh: two processes share some, but not all, of their rows of a batch; choose a tensor size that "
            "divides the number of devices per process, or is a multiple of it"
        )
    return parts.index(tuple(sorted(held[jax.process_index()]))), len(parts)


def fail_together() -> bool:
    """Whether all processes fail now, as they do after a user's mistake; false if only this one fails."""
    if not several():
        return True
    try:
        multihost.get_barrier_sync_fn()(key="simgr_jax.failure", timeout_ms=FAILURE_SECONDS * 1000)
    except jax.errors.JaxRuntimeError:
        return False
    return True


def leave(code: int, together: bool = False) -> None:
    """Ends this process with an exit code.

    Args:
      together: whether all processes end. If not, one of several ends at once, because an ordinary exit would wait for
        the others.
    """
    if together or not several():
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
