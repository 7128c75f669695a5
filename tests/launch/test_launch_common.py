"""The functions that the launch scripts share."""

from __future__ import annotations

import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

WORDS = st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12), max_size=8)
SHELL_WORDS = st.lists(st.text(st.sampled_from("$()'\"\\`{}a4 \n\t!~*"), max_size=8), max_size=8)


@pytest.fixture(scope="module")
def shell_words(root):
    """A function (function of common.sh, words) -> the line that it prints, and the words that bash reads from it."""

    def run(script, *arguments):
        return subprocess.run(
            ["bash", "-c", script, "bash", *arguments], capture_output=True, check=True
        ).stdout.decode()

    def read(function, words, change=lambda line: line):
        line = run(f'source "{root}/launch/common.sh"; {function} "$@"', *words).removesuffix("\n")
        return line, run(f"for word in {change(line)}; do printf '%s\\0' \"$word\"; done").split("\0")[:-1]

    return read


@pytest.mark.parametrize("function", ["quote", "show"])
@settings(max_examples=30, deadline=None)
@given(words=WORDS | SHELL_WORDS)
def test_bash_reads_quoted_words_back_unchanged(shell_words, function, words):
    assert shell_words(function, words)[1] == words


@settings(max_examples=30, deadline=None)
@given(words=SHELL_WORDS)
def test_quoted_words_pass_kubernetes_on_one_line(shell_words, expanded_by_kubernetes, words):
    line, read = shell_words("quote", words, expanded_by_kubernetes)
    assert read == words
    assert "\n" not in line


def test_quote_protects_dollars_that_bashs_own_quoting_does_not(shell_words, expanded_by_kubernetes):
    word = "\n$(HOME)"
    assert expanded_by_kubernetes("$'\\n$(HOME)'") != "$'\\n$(HOME)'"
    assert shell_words("quote", [word], expanded_by_kubernetes)[1] == [word]


@pytest.mark.parametrize("script", ["tpu_vm.sh", "xpk.sh", "slurm.sh"])
def test_help_shows_the_usage(launch, script):
    shown = launch(script, "--help")
    assert shown.returncode == 0
    assert f"launch/{script}" in shown.stdout and "--dry_run" in shown.stdout
    assert "set -euo" not in shown.stdout and not shown.stderr


TRAIN = ("--", "--config=configs/llm.py", "--workdir=runs/llm")
POD = ("--name=pod", "--zone=us-west4-a")
NEW_POD = (*POD, "--type=v5litepod-16")
WORKLOAD = ("--name=llm", "--cluster=c", "--image=i", "--type=v5litepod-16")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tpu_vm.sh"], "COMMAND: is missing"),
        (["tpu_vm.sh", "launch", *POD], "launch: is not a command"),
        (["tpu_vm.sh", "run", "--zone=us-west4-a", *TRAIN], "--name: is missing"),
        (["tpu_vm.sh", "run", "--name=My_pod", "--zone=us-west4-a", *TRAIN], "--name=My_pod: is not a valid name"),
        (["tpu_vm.sh", "run", "--name=pod", *TRAIN], "--zone: is missing"),
        (["tpu_vm.sh", "run", "--name", "pod"], "--name: is not an option"),
        (["tpu_vm.sh", "queue", *POD], "--type: is missing"),
        (["tpu_vm.sh", "queue", *POD, "--type=v9-8"], "--version: has no default for --type=v9-8"),
        (["tpu_vm.sh", "queue", *POD, "--type=tpu7x-8"], "--type=tpu7x-8: is only available on GKE"),
        (["tpu_vm.sh", "setup", *POD, "--bucket=gs://mine"], "--bucket=gs://mine: is not a bucket"),
        (["tpu_vm.sh", "setup", *POD], "is not a git checkout"),
        (["tpu_vm.sh", "logs", *POD, "--worker=first"], "--worker=first: is not a worker"),
        (["tpu_vm.sh", "up", *NEW_POD, "--poll=often", *TRAIN], "--poll=often: is not a number"),
        (["tpu_vm.sh", "run", *POD, *TRAIN[:2]], "--workdir: is missing"),
        (["tpu_vm.sh", "stop", *POD, *TRAIN], "--: stop takes no arguments"),
        (["xpk.sh"], "COMMAND: is missing"),
        (["xpk.sh", "stop"], "stop: is not a command"),
        (["xpk.sh", "run", *WORKLOAD[1:], *TRAIN], "--name: is missing"),
        (["xpk.sh", "run", "--name=llm", *TRAIN], "--cluster: is missing"),
        (["xpk.sh", "run", *WORKLOAD], "--workdir: is missing"),
        (["xpk.sh", "run", *WORKLOAD, "--num_slices=two", *TRAIN], "--num_slices=two: is not a number"),
        (["xpk.sh", "build"], "--image: is missing"),
        (["xpk.sh", "delete", "--cluster=c"], "--name: is missing"),
        (["slurm.sh"], "--workdir: is missing"),
        (["slurm.sh", "--workdir=runs/llm"], "--workdir=runs/llm: is not an option"),
        (["slurm.sh", "--nodes=few", *TRAIN], "--nodes=few: is not a number"),
        (["slurm.sh", *TRAIN], ".venv/bin/python: is not a program"),
    ],
)
def test_a_mistake_is_reported_in_one_line(launch, arguments, message):
    launch.record("gcloud", "xpk", "docker", "sbatch")
    told = launch(*arguments)
    assert told.returncode == 2
    assert message in told.stderr and told.stderr.startswith("error: ") and told.stderr.count("\n") == 1
    assert not told.stdout and not launch.calls()


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("gcloud", ["tpu_vm.sh", "run", *POD, *TRAIN]),
        ("xpk", ["xpk.sh", "run", *WORKLOAD, *TRAIN]),
        ("docker", ["xpk.sh", "build", "--image=i"]),
        ("kubectl", ["xpk.sh", "logs", "--name=llm"]),
        ("sbatch", ["slurm.sh", *TRAIN]),
    ],
)
def test_a_missing_tool_is_named(launch, tool, arguments):
    told = launch(*arguments)
    assert told.returncode == 2
    assert told.stderr.startswith(f"error: {tool}: is not installed; get it from https://")
