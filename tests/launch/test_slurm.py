"""launch/slurm.sh: the job that it submits, and the command that the job runs."""

from __future__ import annotations

import signal
import subprocess
import time

import pytest

# Like srun, runs the command after its own options.
SRUN = """
rest = sys.argv[1:]
while rest[0].startswith("--"):
    rest = rest[1:]
os.execv(rest[0], rest)
"""


@pytest.fixture
def python(launch):
    """A stand-in for the checkout's interpreter."""
    launch.record("python")
    folder = launch.root / ".venv" / "bin"
    folder.mkdir(parents=True)
    (launch.bin / "python").rename(folder / "python")
    return folder / "python"


def submitted(launch, *arguments):
    """sbatch's options by name, and the job's command."""
    launch.record("sbatch", then="print('4711;cluster')")
    told = launch("slurm.sh", *arguments)
    assert told.returncode == 0, told.stderr
    assert "job 4711;" in told.stdout and "workdirs/slurm/4711.log" in told.stdout and "scancel 4711" in told.stdout
    [[_, *call]] = launch.calls()
    script = call.index(str(launch.root / "launch" / "slurm_job.sh"))
    return dict(option.lstrip("-").partition("=")[::2] for option in call[:script]), call[script:]


def job(launch, command, **env):
    return subprocess.Popen(["bash", *command], env=launch.env() | {"SLURM_JOB_ID": "4711"} | env, cwd=launch.root)


def test_each_gpu_of_each_node_gets_one_process(launch, python, hard_arguments):
    options, command = submitted(
        launch, "--name=llm", "--nodes=2", "--gpus_per_node=8", "--time=4:00:00", "--partition=gpu",
        "--extra=--account=us and them", "--", *hard_arguments,
    )  # fmt: skip
    assert options | {"output": ""} == {
        "parsable": "", "job-name": "llm", "nodes": "2", "ntasks-per-node": "8", "gpus-per-node": "8",
        "time": "4:00:00", "partition": "gpu", "account": "us and them", "requeue": "", "signal": "B:USR1@120",
        "open-mode": "append", "output": "", "chdir": str(launch.root),
    }  # fmt: skip
    assert command[1:] == [str(python), *hard_arguments]


def test_each_node_without_gpus_gets_one_process(launch, python):
    options, _ = submitted(launch, "--nodes=3", "--gpus_per_node=0", "--", "--config=c", "--workdir=w")
    assert options["ntasks-per-node"] == "1" and "gpus-per-node" not in options


def test_the_logs_folder_is_created(launch, python):
    options, _ = submitted(launch, "--", "--config=c", "--workdir=w")
    folder, _, file = options["output"].rpartition("/")
    assert file == "%j.log" and (launch.root / "workdirs" / "slurm").samefile(folder)


@pytest.mark.parametrize("code", [0, 1, 2, 137])
def test_the_job_trains_with_unchanged_arguments_and_returns_trainings_exit_code(launch, python, hard_arguments, code):
    _, command = submitted(launch, "--", *hard_arguments)
    launch.record("srun", then=SRUN)
    python.write_text(python.read_text() + f"sys.exit({code})")
    assert job(launch, command, SLURM_CPUS_PER_TASK="12").wait(timeout=20) == code
    _, [*srun], train = launch.calls()
    assert srun[:3] == ["srun", "--kill-on-bad-exit=1", "--cpus-per-task=12"]
    assert train == ["python", "-m", "simgr_jax.train", *hard_arguments]


def test_a_job_at_its_time_limit_is_requeued(launch, python):
    _, command = submitted(launch, "--", "--config=c", "--workdir=w")
    wait = "import time\nfor _ in range(1000):\n    if os.path.exists('end'): break\n    time.sleep(0.02)"
    launch.record("srun", then=wait)
    launch.record("scontrol", then="open('end', 'w')")
    running = job(launch, command)
    while len(launch.calls()) < 2 and running.poll() is None:
        time.sleep(0.02)
    running.send_signal(signal.SIGUSR1)
    # It waits for training to end; in reality SLURM ends it when it requeues the job.
    assert running.wait(timeout=20) == 0
    assert launch.calls()[2:] == [["scontrol", "requeue", "4711"]]


def test_dry_run_prints_the_command_that_would_run(launch, python, same_when_printed, hard_arguments):
    launch.record("sbatch", then="print('4711')")
    same_when_printed("slurm.sh", "--nodes=2", "--", *hard_arguments)
