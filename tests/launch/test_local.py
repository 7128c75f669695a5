"""launch/local.sh: the processes that it runs, and how they end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections import Counter

import pytest

ARGUMENTS = ("--config=c", "--workdir=w")
# The stand-in's process number.
NUMBER = "number = int(sys.argv[-1].removeprefix('--process_id='))\n"
# Writes its pid to a file and runs until it is ended.
STAYS = "import time\nopen(f'{sys.argv[0]}.{number}', 'w').write(str(os.getpid()))\ntime.sleep(60)\n"


@pytest.fixture(autouse=True)
def mktemp(launch):
    (launch.bin / "mktemp").symlink_to(shutil.which("mktemp"))


def pids(launch, count):
    """The pids of the running processes, once `count` of them have written theirs."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        files = [file for file in launch.bin.glob("python.*") if file.read_text()]
        if len(files) == count:
            return [int(file.read_text()) for file in files]
        time.sleep(0.02)
    raise AssertionError(f"{len(files)} processes, not {count}")


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def logs(launch):
    return list(launch.root.parent.glob("tmp.*"))


@pytest.mark.parametrize(
    ("options", "binary"), [((), "train"), (("--",), "train"), (("--binary=recommend", "--"), "recommend")]
)
def test_n_processes_get_the_unchanged_arguments(launch, hard_arguments, options, binary):
    launch.record("python")
    ended = launch("local.sh", "3", *options, *hard_arguments)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    calls = sorted(launch.calls(), key=lambda call: call[-1])
    address = calls[0][-3]
    assert address.startswith("--coordinator=127.0.0.1:")
    assert calls == [
        ["python", "-m", f"simgr_jax.{binary}", *hard_arguments, address, "--num_processes=3", f"--process_id={number}"]
        for number in range(3)
    ]
    assert not logs(launch)


def test_dry_run_prints_the_commands_that_would_run(launch, hard_arguments):
    launch.record("python")
    assert launch("local.sh", "2", *hard_arguments).returncode == 0
    called = launch.calls()
    printed = launch("local.sh", "2", "--dry_run", *hard_arguments)
    assert printed.returncode == 0
    assert launch.calls() == called, "--dry_run must not run anything"
    launch.bash(printed.stdout)

    def without_port(calls):
        return Counter(tuple(word.partition("127.0.0.1:")[0] for word in call) for call in calls)

    assert without_port(launch.calls()[2:]) == without_port(called)


def test_the_environment_selects_interpreter_and_platform(launch):
    """Runs the checkout's package with the requested interpreter, on the CPU by default."""
    launch.record("other", then="print(os.environ['PYTHONPATH'], os.environ['JAX_PLATFORMS'])")
    command = [str(launch.root / "launch" / "local.sh"), "1", *ARGUMENTS]
    for given, expected in (({}, "cpu"), ({"JAX_PLATFORMS": "cuda"}, "cuda")):
        env = launch.env() | {"PYTHON": "other"} | given
        told = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=True)
        assert told.stdout == f"{launch.root} {expected}\n"


def test_only_process_0_writes_to_the_terminal(launch):
    launch.record("python", then=NUMBER + "print('out', number)\nprint('err', number, file=sys.stderr)")
    ended = launch("local.sh", "3", *ARGUMENTS)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "out 0\n", "err 0\n")


@pytest.mark.parametrize("failing", [0, 2])
def test_the_first_failure_ends_all_processes(launch, failing):
    says = f"if number == {failing}:\n    import time; time.sleep(0.5)\n    print('trouble', file=sys.stderr)\n"
    launch.record("python", then=NUMBER + says + f"    sys.exit(3)\n{STAYS}")
    ended = launch("local.sh", "3", *ARGUMENTS)
    assert ended.returncode == 3
    assert ended.stderr == ("trouble\n" if failing == 0 else "process 2 ended with exit code 3:\ntrouble\n")
    assert all(gone(pid) for pid in pids(launch, 2))
    assert not logs(launch)


def test_a_mistake_shared_by_all_processes_is_reported_once(launch):
    launch.record("python", then=NUMBER + "print('error: a: is wrong', file=sys.stderr)\nsys.exit(2)")
    ended = launch("local.sh", "3", *ARGUMENTS)
    assert (ended.returncode, ended.stderr) == (2, "error: a: is wrong\n")


def test_a_killed_process_ends_all_others(launch):
    launch.record("python", then=NUMBER + f"if number == 1: os.kill(os.getpid(), 9)\n{STAYS}")
    assert launch("local.sh", "2", *ARGUMENTS).returncode == 128 + signal.SIGKILL
    assert all(gone(pid) for pid in pids(launch, 1))


@pytest.mark.slow  # After 15 seconds.
def test_a_process_that_ignores_sigterm_is_killed(launch):
    launch.record("python", then=NUMBER + f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n{STAYS}")
    running = start(launch)
    stubborn = pids(launch, 2)
    running.terminate()
    assert running.wait(timeout=60) == 128 + signal.SIGTERM
    assert all(gone(pid) for pid in stubborn)


def test_an_interrupt_ends_all_processes(launch):
    launch.record("python", then=NUMBER + STAYS)
    running = start(launch)
    interrupted = pids(launch, 2)
    running.send_signal(signal.SIGINT)
    assert running.wait(timeout=20) == 128 + signal.SIGINT
    assert all(gone(pid) for pid in interrupted)
    assert not logs(launch)


def test_a_killed_script_leaves_no_process_behind(launch):
    launch.record("python", then=NUMBER + STAYS)
    running = start(launch)
    orphans = pids(launch, 2)
    running.kill()
    running.wait()
    deadline = time.monotonic() + 10
    while not all(gone(pid) for pid in orphans):
        assert time.monotonic() < deadline, "they still run"
        time.sleep(0.05)


def test_training_may_save_a_checkpoint_when_it_is_told_to_end(launch):
    """It takes longer than a process that just ends."""
    saves = (
        "import signal, time\n"
        "def save(*_):\n    time.sleep(7)\n    open(f'{sys.argv[0]}.saved{number}', 'w').close()\n    os._exit(75)\n"
        "signal.signal(signal.SIGTERM, save)\n"
    )
    launch.record("python", then=NUMBER + saves + STAYS)
    running = start(launch)
    pids(launch, 2)
    running.terminate()
    assert running.wait(timeout=30) == 128 + signal.SIGTERM
    assert sorted(file.name for file in launch.bin.glob("python.saved*")) == ["python.saved0", "python.saved1"]


def start(launch):
    return subprocess.Popen([str(launch.root / "launch" / "local.sh"), "2", *ARGUMENTS], env=launch.env())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "N: is missing or not a number; give the number of processes first"),
        (("0", *ARGUMENTS), "N: is missing or not a number"),
        (ARGUMENTS, "N: is missing or not a number"),
        (("2", "--binary=compare", *ARGUMENTS), "--binary=compare: is unknown; give train, evaluate or recommend"),
        (("2", "--config=c"), "--workdir: is missing"),
    ],
)
def test_invalid_arguments_are_refused_in_one_line(launch, arguments, message):
    launch.record("python")
    ended = launch("local.sh", *arguments)
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"error: {message}") and ended.stderr.count("\n") == 1
    assert not launch.calls()
