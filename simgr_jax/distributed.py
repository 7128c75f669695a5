"""Several processes as one run: how they find each other, what they must agree on, and who goes first."""

from __future__ import annotations

import contextlib
import itertools
import json
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

from simgr_jax import sharding
from simgr_jax.cache import fingerprint
from simgr_jax.errors import UserError

# How long processes wait for each other: until all have started, and at a barrier, while one does the others' work.
START_SECONDS = 600
BARRIER_SECONDS = 24 * 3600
# Who has failed waits this long for the others to fail, too.
FAILURE_SECONDS = 10

# Where xpk's containers listen; what it calls the coordinator has no port.
_DEFAULT_PORT = "1234"

_barriers = itertools.count()


class Process(NamedTuple):
    """One of a run's processes.

    Attributes:
      coordinator: HOST:PORT, where process 0 listens.
    """

    coordinator: str
    num_processes: int
    process_id: int


def initialize(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Makes this process one of several, if it is; call it before anything else of JAX.

    What the flags say counts; without flags, what Kubernetes (Kubeflow's or xpk's variables), SLURM or a Cloud TPU say
    of themselves. Else, and where there is only one process, nothing happens. Processes other than the first have no
    standard output from here on.

    Args:
      coordinator, num_processes, process_id: the flags; None where not given.

    Raises:
      UserError: the flags or the variables contradict themselves, or there is no process 0 where they say.
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
            "JAX_COORDINATOR_ADDRESS: is set, but nothing tells how many processes there are, and which this is; set "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID, too, or unset it"
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
    """names: where the coordinator, the number of processes and the process's own number are from."""
    match = re.fullmatch(r"(?:[^\s:\[\]]+|\[[0-9A-Fa-f:.]+\]):(\d+)", process.coordinator)
    if not match or not 0 < int(match[1]) < 65536:
        raise UserError(f'{names[0]}: "{process.coordinator}" is no address; give HOST:PORT, of process 0')
    if process.num_processes < 1:
        raise UserError(f"{names[1]}: can't be {process.num_processes}; give the number of all processes")
    if not 0 <= process.process_id < process.num_processes:
        raise UserError(
            f"{names[2]}: {process.process_id} is none of {process.num_processes} processes; count from 0 to "
            f"{process.num_processes - 1}"
        )
    return process


def _from_kubernetes(env: Mapping[str, str]) -> Process | None:
    """From what Kubeflow Trainer or xpk (in turn for CPUs and GPUs) tells a pod, or an indexed Job that says as much.

    Kubeflow's names: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID. On TPUs xpk tells nothing, but the
    machines do.
    """
    address = env.get("JAX_COORDINATOR_ADDRESS")
    counts = [name for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_COUNT", "NNODES") if name in env]
    ids = [name for name in ("JAX_PROCESS_ID", "NODE_RANK", "JOB_COMPLETION_INDEX") if name in env]
    if not address or not counts or not ids:
        return None
    if ":" not in address:
        address = f"{address}:{env.get('JAX_COORDINATOR_PORT', _DEFAULT_PORT)}"
    process_id = _number(env, ids[0])
    if ids[0] == "JOB_COMPLETION_INDEX" and "PROCESSES_IN_JOB" in env:  # One of several Jobs.
        process_id += _number(env, "JOB_INDEX") * _number(env, "PROCESSES_IN_JOB")
    process = Process(address, _number(env, counts[0]), process_id)
    return _checked(process, "JAX_COORDINATOR_ADDRESS", counts[0], ids[0])


def _number(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env.get(name, ""))
    except ValueError:
        raise UserError(f'{name}: "{env.get(name, "")}" is no number; mend the environment') from None


def _on_slurm(env: Mapping[str, str]) -> bool:
    """Whether srun started this as one of several."""
    return "SLURM_STEP_NODELIST" in env and "SLURM_PROCID" in env and _number(env, "SLURM_NTASKS") > 1


def _slurm_gpus(env: Mapping[str, str]) -> list[int] | None:
    """Which of the GPUs that it sees a task uses; None is JAX's choice, the one of the task's number on its node.

    All, if it is alone on its node, or sees only those that SLURM gave it.
    """
    visible = env.get("CUDA_VISIBLE_DEVICES")
    alone = env["SLURM_NTASKS"] == env.get("SLURM_STEP_NUM_NODES")
    if visible and (alone or "SLURM_GPUS_PER_TASK" in env or "," not in visible):
        return list(range(visible.count(",") + 1))
    return None


def _on_tpu(env: Mapping[str, str]) -> bool:
    """Whether this uses TPUs that know of each other, by Google's metadata server or by GKE's variables."""
    # On a Cloud TPU, JAX sets this when it is imported, unless the user did.
    if "tpu" not in (jax.config.jax_platforms or "").split(","):
        return False
    on_gke = "TPU_WORKER_HOSTNAMES" in env or "TPU_PROCESS_ADDRESSES" in env
    return on_gke or "TPU_SKIP_MDS_QUERY" not in env


def _connect(process: Process) -> None:
    host, _, port = process.coordinator.rpartition(":")
    if process.process_id:
        _await_coordinator(process.coordinator, host.strip("[]"), int(port))
    # The service trusts whoever connects: where nobody else needs to, nobody else can.
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
    """JAX would crash, without a word, where something else listens."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise UserError(
            f"--coordinator={address}: process 0 can't listen there ({error}); give an address of its own, and a free "
            "port"
        ) from error


def _await_coordinator(address: str, host: str, port: int) -> None:
    """JAX would abort the whole process where nobody answers."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            socket.create_connection((host, port), timeout=10).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"--coordinator={address}: no process 0 answers ({error}); start it there, and let all machines "
                    "reach that port"
                ) from error
        time.sleep(0.2)


def _initialize(**options) -> None:
    """What is not given, JAX finds out."""
    # With JAX's service for it, SIGTERM would no longer end a process.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(initialization_timeout=START_SECONDS, **options)


def _silence() -> None:
    """Also of what libraries print in C++."""
    sys.stdout.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


def is_main() -> bool:
    """Whether this is process 0, the one that writes and prints."""
    return not several() or jax.process_index() == 0


def several() -> bool:
    """Whether the run has more than this process."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def barrier() -> None:
    """Waits until all processes have come here."""
    if several():
        key = f"simgr_jax.{next(_barriers)}"  # One can't be used again.
        multihost.get_barrier_sync_fn()(key=key, timeout_ms=BARRIER_SECONDS * 1000)


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Process 0 runs the block before the others do, who then find in a shared cache what it made.

    Each computes it alone, on one device. If process 0 fails, the others run it all the same, and fail likewise: a
    user's mistake is everybody's.
    """
    if not is_main():
        barrier()
    try:
        with jax.set_mesh(sharding.one_device()):
            yield
    finally:
        if is_main():
            barrier()


def all_gather(value: Any) -> list[Any]:
    """The values of all processes, in their order, in each of them. All must call it.

    Args:
      value: anything JSON; keys of objects become strings.
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
    """Checks that all processes have the same of what each made or read for itself. All must call it.

    Args:
      what: in the plural, like "the semantic IDs".
      parts: as of `cache.fingerprint`.

    Raises:
      UserError: in all processes, if one has something else.
    """
    if several() and len(set(all_gather(fingerprint(*parts)))) > 1:
        raise UserError(
            f"config.cache_dir: {what} differ between the processes; give all of them the same data, and a folder "
            "that they share"
        )


def input_part(placement: jax.sharding.Sharding, rows: int) -> tuple[int, int]:
    """(p, P): this process's devices hold the p-th of P parts of a batch's rows.

    Processes whose devices hold the same rows, each with other parameters, have the same p.

    Raises:
      UserError: some rows, but not all, are on the devices of two processes.
    """
    held = defaultdict(set)
    for device, (row, *_) in placement.devices_indices_map((rows,)).items():
        held[device.process_index].update(range(*row.indices(rows)))
    parts = sorted({tuple(sorted(part)) for part in held.values()})
    if sum(map(len, parts)) != rows:
        raise UserError(
            "config.mesh: two processes hold some, but not all, of their rows of a batch in common; give tensor a "
            "number that divides the devices of a process, or is a multiple of it"
        )
    return parts.index(tuple(sorted(held[jax.process_index()]))), len(parts)


def fail_together() -> bool:
    """Whether all processes fail at this time, as they do by a user's mistake, or this one is alone."""
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
      together: whether all do. Else one of several ends at once: an ordinary exit would wait for the others.
    """
    if together or not several():
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
