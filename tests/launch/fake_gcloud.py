"""A fake `gcloud` with one TPU, whose workers are folders on this machine.

Run as `fake_gcloud.py CLOUD ARGUMENTS` with a folder CLOUD that holds

    request        the queued resource's state; absent if there is none
    node           the TPU's state
    workers/N/     the home folder of worker N, while the TPU exists
    worker_path    the workers' PATH
    fails          a verb that fails while this file exists

Each listing moves a queued resource from WAITING_FOR_RESOURCES to PROVISIONING, and then to ACTIVE. A worker's command
is treated as in reality: gcloud splits it at spaces, ssh joins it again, and a shell runs it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

WORKERS = 2
NEXT = {"WAITING_FOR_RESOURCES": "PROVISIONING", "PROVISIONING": "ACTIVE"}


def main(cloud: Path, words: list[str]) -> None:
    with (cloud / "calls.jsonl").open("a") as file:
        file.write(json.dumps(["gcloud", *words]) + "\n")
    flags = dict(word.lstrip("-").partition("=")[::2] for word in words if word.startswith("--"))
    values = [word for word in words if not word.startswith("--")]
    assert values[:2] == ["compute", "tpus"] and flags.pop("zone") == "us-west4-a"
    group, verb, *names = values[2:]
    if (cloud / "fails").exists() and (cloud / "fails").read_text() == verb:
        sys.exit(f"ERROR: (gcloud.compute.tpus.{group}.{verb}) failed on request")
    request = (cloud / "request").read_text() if (cloud / "request").exists() else None
    if (group, verb) == ("queued-resources", "list"):
        _list(cloud, request, flags)
    elif (group, verb) == ("queued-resources", "create"):
        assert request is None and names == [flags["node-id"]] == ["pod"]
        (cloud / "request").write_text("WAITING_FOR_RESOURCES")
    elif verb == "create":
        _make_workers(cloud)
    elif verb == "describe":
        print((cloud / "node").read_text())
    elif verb == "delete":
        assert (request is not None) == (group == "queued-resources") == ("force" in flags) and "quiet" in flags
        delete(cloud)
    else:
        _at_workers(cloud, verb, names, flags)


def _list(cloud: Path, request: str | None, flags: dict[str, str]) -> None:
    pattern = flags["filter"].removeprefix("name~")
    assert re.search(pattern, "projects/p/locations/z/queuedResources/pod")
    assert not re.search(pattern, "projects/p/locations/z/queuedResources/pod-2")
    assert flags["format"] == "value(state.state)"
    if request is None:
        return
    print(request)
    if request in NEXT:
        (cloud / "request").write_text(NEXT[request])
        if NEXT[request] == "ACTIVE":
            _make_workers(cloud)


def _make_workers(cloud: Path) -> None:
    (cloud / "node").write_text("READY")
    for number in range(WORKERS):
        (cloud / "workers" / str(number)).mkdir(parents=True)


def delete(cloud: Path) -> None:
    """Deletes the TPU and its request, and ends the run on it."""
    (cloud / "request").unlink(missing_ok=True)
    for run in (cloud / "workers").glob("*/simgr_jax_run"):
        with (run / "lock").open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # A run is active, and may end in this moment.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(int((run / "pid").read_text()), signal.SIGKILL)
    shutil.rmtree(cloud / "workers", ignore_errors=True)


def _at_workers(cloud: Path, verb: str, names: list[str], flags: dict[str, str]) -> None:
    if (cloud / "node").read_text() != "READY":
        sys.exit("ERROR: the TPU is not READY")
    homes = sorted((cloud / "workers").iterdir())
    running = []
    for home in homes if flags["worker"] == "all" else [homes[int(flags["worker"])]]:
        if verb == "scp":
            source, (name, _, file) = names[0], names[1].partition(":")
            assert name == "pod"
            shutil.copy(source, home / file)
        else:
            assert verb == "ssh" and names == ["pod"]
            line = " ".join(flags["command"].split(" "))
            env = {"HOME": str(home), "PATH": (cloud / "worker_path").read_text(), "CLOUD": str(cloud)}
            env["LC_ALL"] = "C.UTF-8"
            running.append(subprocess.Popen(["bash", "-c", line], cwd=home, env=env, stdin=subprocess.DEVNULL))
    sys.exit(max((worker.wait() for worker in running), default=0))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
