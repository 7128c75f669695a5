"""launch/local.sh: what it runs, and how it ends."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections import Counter

import pytest

ARGUMENTS = ("--config=c", "--workdir=w")
# Which process the stand-in is.
NUMBER = "number = int(sys.argv[-1].removeprefix('--process_id='))\n"
# It tells its pid, and goes on until it is ended.
STAYS = "import time\nopen(f'{sys.argv[0]}.{number}', 'w').write(str(os.getpid()))\ntime.sleep(60)\n"


@pytest.fixture(autouse=True)
def mktemp(launch):
    (launch.bin / "mktemp").symlink_to(shutil.which("mktemp"))


def pids(launch, count):
    """Of the processes that stay, when so many have said so."""
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
def test_as_many_processes_with_the_arguments_as_they_were(launch, hard_arguments, options, binary):
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


def test_what_dry_run_prints_is_what_runs(launch, hard_arguments):
    launch.record("python")
    assert launch("local.sh", "2", *hard_arguments).returncode == 0
    called = launch.calls()
    printed = launch("local.sh", "2", "--dry_run", *hard_arguments)
    assert printed.returncode == 0
    assert launch.calls() == called, "it has called something"
    launch.bash(printed.stdout)

    def without_port(calls):
        return Counter(tuple(word.partition("127.0.0.1:")[0] for word in call) for call in calls)

    assert without_port(launch.calls()[2:]) == without_port(called)


def test_the_environment(launch):
    """The checkout's package, by the interpreter that is asked for, on the CPU unless something else is."""
    launch.record("other", then="print(os.environ['PYTHONPATH'], os.environ['JAX_PLATFORMS'])")
    command = [str(launch.root / "launch" / "local.sh"), "1", *ARGUMENTS]
    for given, expected in (({}, "cpu"), ({"JAX_PLATFORMS": "cuda"}, "cuda")):
        env = launch.env() | {"PYTHON": "other"} | given
        told = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=True)
        assert told.stdout == f"{launch.root} {expected}\n"


def test_only_process_0_is_shown(launch):
    launch.record("python", then=NUMBER + "print('out', number)\nprint('err', number, file=sys.stderr)")
    ended = launch("local.sh", "3", *ARGUMENTS)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "out 0\n", "err 0\n")


@pytest.mark.parametrize("failing", [0, 2])
def test_the_first_failure_ends_all(launch, failing):
    says = f"if number == {failing}:\n    import time; time.sleep(0.5)\n    print('trouble', file=sys.stderr)\n"
    launch.record("python", then=NUMBER + says + f"    sys.exit(3)\n{STAYS}")
    ended = launch("local.sh", "3", *ARGUMENTS)
    assert ended.returncode == 3
    assert ended.stderr == ("trouble\n" if failing == 0 else "process 2 ended with exit code 3:\ntrouble\n")
    assert all(gone(pid) for pid in pids(launch, 2))
    assert not logs(launch)


def test_everybodys_mistake_is_said_once(launch):
    launch.record("python", then=NUMBER + "print('error: a: is wrong', file=sys.stderr)\nsys.exit(2)")
    ended = launch("local.sh", "3", *ARGUMENTS)
    assert (ended.returncode, ended.stderr) == (2, "error: a: is wrong\n")


def test_a_process_that_is_killed_ends_all(launch):
    launch.record("python", then=NUMBER + f"if number == 1: os.kill(os.getpid(), 9)\n{STAYS}")
    assert launch("local.sh", "2", *ARGUMENTS).returncode == 128 + signal.SIGKILL
    assert all(gone(pid) for pid in pids(launch, 1))


def test_who_does_not_listen_is_killed(launch):
    launch.record("python", then=NUMBER + f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n{STAYS}")
    running = start(launch)
    stubborn = pids(launch, 2)
    running.terminate()
    assert running.wait(timeout=20) == 128 + signal.SIGTERM
    assert all(gone(pid) for pid in stubborn)


def test_interruption_ends_all(launch):
    launch.record("python", then=NUMBER + STAYS)
    running = start(launch)
    interrupted = pids(launch, 2)
    running.send_signal(signal.SIGINT)
    assert running.wait(timeout=20) == 128 + signal.SIGINT
    assert all(gone(pid) for pid in interrupted)
    assert not logs(launch)


def start(launch):
    return subprocess.Popen([str(launch.root / "launch" / "local.sh"), "2", *ARGUMENTS], env=launch.env())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "N: is missing, or no number; give launch/local.sh the number of processes first"),
        (("0", *ARGUMENTS), "N: is missing, or no number"),
        (ARGUMENTS, "N: is missing, or no number"),
        (("2", "--binary=compare", *ARGUMENTS), "--binary=compare: is none; give train, evaluate or recommend"),
        (("2", "--config=c"), "--workdir: is missing"),
    ],
)
def test_bad_arguments(launch, arguments, message):
    launch.record("python")
    ended = launch("local.sh", *arguments)
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"error: {message}") and ended.stderr.count("\n") == 1
    assert not launch.calls()
