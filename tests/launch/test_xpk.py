"""launch/xpk.sh: the commands that it calls, and the command that the containers run."""

from __future__ import annotations

import re
import subprocess

import yaml

RUN = ("run", "--name=llm", "--cluster=pods", "--project=mine", "--zone=us-west4-a", "--image=registry/simgr_jax:1",
       "--type=v5litepod-16", "--num_slices=2", "--storage=bucket", "--extra=--priority=high")  # fmt: skip


def test_run_creates_a_workload(launch, hard_arguments):
    launch.record("xpk")
    assert launch("xpk.sh", *RUN, "--", *hard_arguments).returncode == 0
    [[*call, command]] = launch.calls()
    assert call == [
        "xpk", "workload", "create", "--cluster=pods", "--project=mine", "--zone=us-west4-a", "--workload=llm",
        "--tpu-type=v5litepod-16", "--num-slices=2", "--docker-image=registry/simgr_jax:1", "--max-restarts=100",
        "--restart-on-exit-codes=1,75", "--storage=bucket", "--priority=high",
    ]  # fmt: skip
    assert command.startswith("--command=exec python -m simgr_jax.train ")


def test_the_container_trains_with_unchanged_arguments(launch, expanded_by_kubernetes, hard_arguments):
    launch.record("xpk")
    launch("xpk.sh", *RUN, "--", *hard_arguments)
    command = launch.calls()[0][-1].removeprefix("--command=")
    # xpk 1.16 inserts the command unchanged into a YAML block that the container's bash runs.
    manifest = f"command:\n- bash\n- -c\n- |\n  echo begin;\n  ({command}) & PID=$!;\n  wait $PID;\n  exit $?\n"
    container = [expanded_by_kubernetes(word) for word in yaml.safe_load(manifest)["command"]]
    launch.record("python", then="sys.exit(42)")
    ended = subprocess.run(container, env=launch.env(), capture_output=True, text=True)
    assert ended.returncode == 42, ended.stderr
    assert launch.calls()[1:] == [["python", "-m", "simgr_jax.train", *hard_arguments]]


def test_the_other_commands_call_their_tools(launch):
    launch.record("xpk", "kubectl", "docker")
    place = ("--cluster=pods", "--zone=us-west4-a")
    for arguments in (("status", "--name=llm", *place), ("delete", "--name=llm", *place), ("logs", "--name=llm"),
                      ("build", "--image=registry/simgr_jax:1")):  # fmt: skip
        assert launch("xpk.sh", *arguments).returncode == 0
    status, delete, logs, build, push = launch.calls()
    assert status == ["xpk", "workload", "list", *place, "--filter-by-job=^llm$"]
    assert delete == ["xpk", "workload", "delete", *place, "--workload=llm"]
    assert logs[:3] == ["kubectl", "logs", "--follow"] and "jobset-name=llm," in logs[-1]
    assert build[:2] == ["docker", "build"] and build[-2:] == ["--tag=registry/simgr_jax:1", str(launch.root)]
    assert push == ["docker", "push", "registry/simgr_jax:1"]


def test_dry_run_prints_the_commands_that_would_run(launch, same_when_printed, hard_arguments):
    launch.record("xpk", "kubectl", "docker")
    same_when_printed("xpk.sh", *RUN, "--", *hard_arguments)
    same_when_printed("xpk.sh", "build", "--image=registry/simgr_jax:1")
    same_when_printed("xpk.sh", "delete", "--name=llm", "--cluster=pods")


def test_the_image_has_the_code_and_nothing_else(root):
    dockerfile = (root / "launch" / "Dockerfile").read_text()
    copied = set(re.findall(r"^COPY (\S+)", dockerfile, re.MULTILINE))
    ignore = (root / "launch" / "Dockerfile.dockerignore").read_text().split()
    assert ignore[0] == "*" and {line[1:] for line in ignore if line.startswith("!")} == copied
    assert all((root / name).exists() for name in copied)
    assert "simgr_jax" in copied and "configs" in copied
