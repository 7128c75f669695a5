"""launch/tpu_vm.sh and launch/tpu_worker.sh on a fake TPU with two workers; see fake_gcloud.py."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import fake_gcloud
import pytest

POD = ("--name=pod", "--zone=us-west4-a")
UP = ("up", *POD, "--type=v5litepod-16", "--spot", "--poll=0")
TRAIN = ("--", "--config=configs/llm.py", "--workdir=/mnt/bucket/llm")

# A worker's fake Python: each training run does what the next word of the file `plan` says.
PYTHON = """
import time
cloud = os.environ["CLOUD"]
worker = os.path.basename(os.environ["HOME"])
with open(cloud + "/runs.jsonl", "a") as file:
    file.write(json.dumps({"worker": worker, "folder": os.path.basename(os.getcwd()), "argv": sys.argv[1:]}) + "\\n")
with open(cloud + "/runs.jsonl") as file:
    nth = sum(json.loads(line)["worker"] == worker for line in file)
with open(cloud + "/plan") as file:
    what = file.read().split()[nth - 1]
print("doing", what, flush=True)
for word, name, state in (("preempted", "request", "SUSPENDED"), ("vanished", "node", "PREEMPTED")):
    if what == word and worker == "0":
        with open(cloud + "/new", "w") as file:
            file.write(state)
        os.replace(cloud + "/new", cloud + "/" + name)  # So that no reader sees it empty.
if what == "alone" and worker == "0":
    sys.exit(1)
if what.isdigit():
    sys.exit(int(what) if worker == "0" or what != "1" else 0)
time.sleep(60)
"""


@dataclass
class Cloud:
    """The fake TPU, and calls of launch/tpu_vm.sh that use it."""

    folder: Path
    launch: object
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Starts tpu_vm.sh without waiting for its end; its output goes to pipes."""
        command = [f"{self.launch.root}/launch/tpu_vm.sh", *arguments]
        pipe = subprocess.PIPE
        self.started.append(subprocess.Popen(command, env=self.launch.env(), stdout=pipe, stderr=pipe, text=True))
        return self.started[-1]

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.launch("tpu_vm.sh", *arguments)

    def plan(self, *runs: str) -> None:
        (self.folder / "plan").write_text(" ".join(runs))

    def runs(self, worker: str = "0") -> list[dict]:
        file = self.folder / "runs.jsonl"
        lines = map(json.loads, file.read_text().splitlines() if file.exists() else [])
        return [line for line in lines if line["worker"] == worker]

    def await_runs(self, number: int) -> None:
        """Waits until each worker has started training `number` times."""
        deadline = time.monotonic() + 20
        while min(len(self.runs("0")), len(self.runs("1"))) < number:
            assert time.monotonic() < deadline, "training has not started"
            time.sleep(0.02)

    def status_without(self, word: str) -> str:
        """The output of `status` once no worker's line contains the word."""
        for _ in range(50):
            told = self("status", *POD).stdout
            if word not in told:
                return told
        raise AssertionError(told)

    def verbs(self) -> list[str]:
        """The verbs of the calls of gcloud that create or delete something."""
        calls = [json.loads(line) for line in (self.folder / "calls.jsonl").read_text().splitlines()]
        return [call[4] for call in calls if call[4] in ("create", "delete")]

    def home(self, worker: int = 0) -> Path:
        return self.folder / "workers" / str(worker)


@pytest.fixture
def cloud(launch, tmp_path):
    folder = tmp_path / "cloud"
    folder.mkdir()
    fake = Path(__file__).with_name("fake_gcloud.py")
    gcloud = launch.bin / "gcloud"
    gcloud.write_text(f'#!/usr/bin/env bash\nexec "{sys.executable}" -IS "{fake}" "{folder}" "$@"\n')
    gcloud.chmod(0o755)
    worker = tmp_path / "worker"
    worker.mkdir()
    (folder / "worker_path").write_text(f"{worker}:{launch.path.removeprefix(f'{launch.bin}:')}")

    launch.record("python", then=PYTHON)
    (launch.bin / "python").rename(tmp_path / "python")
    make_python = f"os.makedirs(sys.argv[-1] + '/bin'); os.symlink('{tmp_path}/python', sys.argv[-1] + '/bin/python')"
    launch.record("uv", then=f"if sys.argv[1] == 'venv': {make_python}")
    launch.record("mountpoint", then="sys.exit(not os.path.exists(os.environ['HOME'] + '/mounted'))")
    launch.record("findmnt", then="print(open(os.environ['HOME'] + '/mounted').read())")
    launch.record("gcsfuse", then="open(os.environ['HOME'] + '/mounted', 'w').write(sys.argv[-2])")
    launch.record("sudo")
    for name in ("uv", "mountpoint", "findmnt", "gcsfuse", "sudo"):
        (launch.bin / name).rename(worker / name)

    (launch.root / "requirements.txt").write_text("jax\n")
    (launch.root / ".gitignore").write_text("workdirs/\n")
    for command in (["init", "--quiet"], ["add", "--all"]):
        subprocess.run(["git", *command], cwd=launch.root, check=True)
    cloud = Cloud(folder, launch)
    yield cloud
    for process in cloud.started:
        process.kill()
    fake_gcloud.delete(folder)  # Ends any run that is still active.
    for process in cloud.started:
        process.communicate(timeout=20)


@pytest.fixture
def pod(cloud):
    """The fake TPU after setup."""
    assert cloud("create", *POD, "--type=v5litepod-16").returncode == 0
    told = cloud("setup", *POD)
    assert told.returncode == 0, told.stderr
    return cloud


def test_setup_copies_the_working_tree(cloud):
    cloud("create", *POD, "--type=v5litepod-16")
    root = cloud.launch.root
    (root / "launch" / "Dockerfile").unlink()
    (root / "requirements.txt").write_text("jax>=1\n")
    (root / "configs").mkdir()
    (root / "configs" / "my own.py").write_text("new")
    (root / "workdirs").mkdir()
    (root / "workdirs" / "ignored").write_text("large")
    (cloud.home() / "simgr_jax").mkdir()
    (cloud.home() / "simgr_jax" / "left_over.py").write_text("of an older setup")
    assert cloud("setup", *POD).returncode == 0
    for worker in (0, 1):
        copy = cloud.home(worker) / "simgr_jax"
        assert (copy / "requirements.txt").read_text() == "jax>=1\n"
        assert (copy / "configs" / "my own.py").read_text() == "new"
        assert {path.name for path in copy.iterdir()} == {".gitignore", "configs", "launch", "requirements.txt"}
        assert not (copy / "launch" / "Dockerfile").exists()


def test_setup_installs_the_requirements(pod):
    venv = f"{pod.home()}/simgr_jax_venv"
    made, installed = [call for call in pod.launch.calls() if any(venv in word for word in call)]
    assert made == ["uv", "venv", "--quiet", "--python=3.12", venv]
    assert installed == [
        "uv", "pip", "install", "--quiet", f"--python={venv}/bin/python", "jax[tpu]",
        f"--requirements={pod.home()}/simgr_jax/requirements.txt",
    ]  # fmt: skip


def test_setup_installs_uv_and_gcsfuse_on_a_bare_machine(cloud):
    cloud("create", *POD, "--type=v5litepod-16")
    worker = Path((cloud.folder / "worker_path").read_text().split(":")[0])
    uv = worker.rename(worker.with_name("later")) / "uv"
    worker.mkdir()
    later = uv.parent
    for name in ("mountpoint", "findmnt"):
        (later / name).rename(worker / name)
    launch = cloud.launch
    install = f"mkdir -p ~/.local/bin && ln -s '{uv}' ~/.local/bin"
    launch.record("curl", then=f"print('a key' if 'apt-key.gpg' in sys.argv[-1] else \"{install}\")")
    launch.record("lsb_release", then="print('jammy')")
    launch.record(
        "sudo",
        then=f"""
if sys.argv[1] == "tee":
    open(os.environ["HOME"] + "/" + os.path.basename(sys.argv[2]), "w").write(sys.stdin.read())
if sys.argv[-1] == "gcsfuse" and not os.path.exists("{worker}/gcsfuse"):
    os.symlink("{later}/gcsfuse", "{worker}/gcsfuse")
""",
    )
    for name in ("curl", "lsb_release", "sudo"):
        (launch.bin / name).rename(worker / name)
    tools = Path(launch.path.rpartition(":")[2])
    for name in ("ln", "tee"):
        (tools / name).symlink_to(shutil.which(name))
    told = cloud("setup", *POD, "--bucket=mine")
    assert told.returncode == 0, told.stderr
    assert (cloud.home() / ".local" / "bin" / "uv").exists()
    assert (cloud.home() / "cloud.google.asc").read_text() == "a key\n"
    source = (cloud.home() / "gcsfuse.list").read_text()
    assert source.startswith(
        "deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt "
    )
    assert source.endswith(" gcsfuse-jammy main\n")
    assert (cloud.home() / "mounted").read_text() == "mine"


def test_setup_mounts_a_bucket_once(pod):
    mount = ["gcsfuse", "--implicit-dirs", "--metadata-cache-ttl-secs=0", "mine", "/mnt/bucket"]
    for _ in range(2):
        assert pod("setup", *POD, "--bucket=mine").returncode == 0
        assert [call for call in pod.launch.calls() if call[0] == "gcsfuse"] == [mount, mount], "once per worker"
    other = pod("setup", *POD, "--bucket=other")
    assert other.returncode == 2 and "/mnt/bucket has another bucket" in other.stderr


def test_all_workers_train_with_unchanged_arguments(pod, hard_arguments):
    pod.plan("0")
    assert pod("run", *POD, "--", *hard_arguments).returncode == 0
    pod.await_runs(1)
    for worker in ("0", "1"):
        [run] = pod.runs(worker)
        assert run["argv"] == ["-m", "simgr_jax.train", *hard_arguments]
        assert run["folder"] == "simgr_jax"


def test_a_run_continues_without_the_connection_until_it_is_stopped(pod):
    pod.plan("on", "on")
    assert pod("run", *POD, *TRAIN).returncode == 0
    pod.await_runs(1)
    assert pod("status", *POD).stdout.count("simgr_jax: running on ") == 2
    again = pod("run", *POD, *TRAIN)
    assert again.returncode == 2 and "a run is already active" in again.stderr
    setup = pod("setup", *POD)
    assert setup.returncode == 2 and "a run is active; stop it first" in setup.stderr
    assert (pod.home() / "simgr_jax" / "launch").exists()

    assert pod("stop", *POD).stdout.count("simgr_jax: ended stopped on ") == 2
    assert pod("run", *POD, *TRAIN).returncode == 0, "it must be able to run again"


def test_status_shows_how_a_run_ended(pod):
    assert pod("status", *POD).stdout.count("simgr_jax: none on ") == 2
    pod.plan("1", "killed")
    pod("run", *POD, *TRAIN)
    pod.await_runs(1)
    told = pod.status_without("running")
    assert told.startswith("READY\n") and "simgr_jax: ended 1 on " in told and "simgr_jax: ended 0 on " in told
    pod("run", *POD, *TRAIN)
    pod.await_runs(2)
    for worker in (0, 1):
        pod.launch.bash(f'kill -KILL -- "-$(<"{pod.home(worker)}/simgr_jax_run/pid")"')
    assert pod.status_without("running").count("simgr_jax: lost on ") == 2


def test_logs_follow_until_the_run_ends(pod):
    assert "nothing has run here" in pod("logs", *POD).stderr
    pod.plan("on")
    pod("run", *POD, *TRAIN)
    pod.await_runs(1)
    logs = pod.start("logs", *POD, "--worker=1")
    assert "python -m simgr_jax.train --config=configs/llm.py" in logs.stdout.readline()
    assert logs.stdout.readline() == "doing on\n"
    assert logs.poll() is None
    pod("stop", *POD)
    assert "simgr_jax: " in logs.stdout.read()
    assert "doing on\n" in pod("logs", *POD).stdout, "the log must remain after the run"


def test_up_does_everything(cloud, hard_arguments):
    cloud.plan("0")
    told = cloud(*UP, "--bucket=mine", "--delete", "--", *hard_arguments)
    assert told.returncode == 0, told.stderr
    assert cloud.verbs() == ["create", "delete"]
    created = [json.loads(line) for line in (cloud.folder / "calls.jsonl").read_text().splitlines()][1]
    assert created == [
        "gcloud", "compute", "tpus", "queued-resources", "create", "pod", "--node-id=pod",
        "--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--spot", "--zone=us-west4-a",
    ]  # fmt: skip
    assert "WAITING_FOR_RESOURCES" in told.stderr and "finished" in told.stderr
    assert [run["argv"] for run in cloud.runs()] == [["-m", "simgr_jax.train", *hard_arguments]]
    assert [call[-2] for call in cloud.launch.calls() if call[0] == "gcsfuse"] == ["mine", "mine"]


@pytest.mark.parametrize("how", ["preempted", pytest.param("vanished", marks=pytest.mark.slow)])
def test_up_restarts_on_a_new_tpu_after_a_preemption(cloud, how):
    cloud.plan(how, how, "0")
    told = cloud(*UP, *TRAIN)
    assert told.returncode == 0, told.stderr
    assert cloud.verbs() == ["create", "delete", "create", "delete", "create"]
    assert [run["argv"] for run in cloud.runs()] == [["-m", "simgr_jax.train", *TRAIN[1:]]] * 3
    assert "delete it: launch/tpu_vm.sh delete --name=pod --zone=us-west4-a" in told.stderr


def test_up_restarts_after_a_crash_but_not_forever(cloud):
    cloud.plan("1", "alone", "0")
    assert cloud(*UP, *TRAIN).returncode == 0
    assert cloud.verbs() == ["create"] and len(cloud.runs("0")) == len(cloud.runs("1")) == 3

    shutil.rmtree(cloud.home() / "simgr_jax_run")
    (cloud.folder / "runs.jsonl").unlink()
    cloud.plan("1", "1")
    told = cloud(*UP, "--max_failures=1", *TRAIN)
    assert told.returncode == 1 and "crashed (2)" in told.stderr
    assert "doing 1\n" in told.stdout, "it must show the end of the log"


def test_up_begins_again_after_a_signal_and_does_not_count_it_as_a_failure(cloud):
    cloud.plan("75", "75", "0")
    told = cloud(*UP, "--max_failures=0", *TRAIN)
    assert told.returncode == 0, told.stderr
    assert len(cloud.runs()) == 3 and told.stderr.count("stopped with its checkpoint saved") == 2


def test_up_does_not_repeat_a_users_mistake(cloud):
    cloud.plan("2")
    told = cloud(*UP, "--delete", *TRAIN)
    assert told.returncode == 2 and "a user's mistake" in told.stderr
    assert "doing 2\n" in told.stdout
    assert cloud.verbs() == ["create", "delete"] and len(cloud.runs()) == 1


def test_up_continues_the_run_it_finds(cloud):
    cloud.plan("on")
    first = cloud.start(*UP, *TRAIN)
    cloud.await_runs(1)
    first.terminate()
    other = cloud(*UP, *TRAIN, "--config.training.epochs=9")
    assert other.returncode == 2 and "another run is active" in other.stderr
    second = cloud.start(*UP, *TRAIN)
    assert "running" in second.stderr.readline()
    cloud("stop", *POD)
    assert "was stopped" in second.stderr.read()
    assert second.wait(timeout=20) == 1
    assert cloud.verbs() == ["create"] and len(cloud.runs()) == 1


def test_up_does_not_repeat_a_finished_run(cloud):
    cloud.plan("0", "0")
    assert cloud(*UP, *TRAIN).returncode == 0
    assert cloud(*UP, *TRAIN).returncode == 0
    assert len(cloud.runs()) == 1, "a finished run must not start again"
    assert cloud(*UP, *TRAIN, "--config.training.epochs=9").returncode == 0
    assert len(cloud.runs()) == 2


@pytest.mark.parametrize("verb", ["list", "create"])
def test_up_ends_at_once_if_gclouds_first_call_fails(cloud, verb):
    (cloud.folder / "fails").write_text(verb)
    told = cloud(*UP, *TRAIN)
    assert told.returncode == 1 and "failed on request" in told.stderr


def test_up_survives_temporary_failures_of_gcloud(cloud):
    cloud.plan("on")
    up = cloud.start(*UP, *TRAIN)
    cloud.await_runs(1)
    for verb, said in (("list", "gcloud does not answer"), ("ssh", "the workers don't answer; the TPU is READY")):
        (cloud.folder / "fails").write_text(verb)
        while said not in up.stderr.readline():
            assert up.poll() is None
    (cloud.folder / "fails").unlink()
    while "running" not in up.stderr.readline():
        assert up.poll() is None
    assert cloud.verbs() == ["create"]


def test_up_ends_if_the_request_failed(cloud):
    (cloud.folder / "request").write_text("FAILED")
    told = cloud(*UP, *TRAIN)
    assert told.returncode == 1 and "the request failed" in told.stderr


def test_delete_works_for_queued_and_created_tpus(cloud):
    cloud("create", *POD, "--type=v5litepod-16")
    assert cloud("delete", *POD).returncode == 0
    cloud("queue", *POD, "--type=v5litepod-16")
    assert cloud("delete", *POD).returncode == 0
    calls = [json.loads(line) for line in (cloud.folder / "calls.jsonl").read_text().splitlines()]
    assert [call[3] for call in calls if call[4] == "delete"] == ["tpu-vm", "queued-resources"]


@pytest.mark.parametrize(
    ("kind", "version"),
    [
        ("v4-32", "tpu-ubuntu2204-base"),
        ("v5litepod-256", "v2-alpha-tpuv5-lite"),
        ("v5p-128", "v2-alpha-tpuv5"),
        ("v6e-16", "v2-alpha-tpuv6e"),
    ],
)
def test_each_type_has_its_runtime_version(launch, kind, version):
    launch.record("gcloud")
    launch("tpu_vm.sh", "create", *POD, f"--type={kind}", "--project=mine", "--extra=--network=a b")
    launch("tpu_vm.sh", "queue", *POD, f"--type={kind}", "--version=mine")
    tpus = ["gcloud", "compute", "tpus"]
    assert launch.calls() == [
        [*tpus, "tpu-vm", "create", "pod", f"--accelerator-type={kind}", f"--version={version}", "--network=a b",
         "--zone=us-west4-a", "--project=mine"],
        [*tpus, "queued-resources", "create", "pod", "--node-id=pod", f"--accelerator-type={kind}",
         "--runtime-version=mine", "--zone=us-west4-a"],
    ]  # fmt: skip


@pytest.mark.parametrize("command", ["create", "queue", "setup", "run", "logs", "status", "stop"])
def test_dry_run_prints_the_commands_that_would_run(launch, same_when_printed, hard_arguments, command):
    launch.record("gcloud", then="print('READY')")
    subprocess.run(["git", "init", "--quiet", launch.root], check=True)
    arguments = {"create": ["--type=v6e-8"], "queue": ["--type=v6e-8", "--spot"], "setup": ["--bucket=mine"]}
    train = ["--", *hard_arguments] if command == "run" else []
    same_when_printed("tpu_vm.sh", command, *POD, *arguments.get(command, []), *train)


def test_dry_run_of_up_prints_all_its_steps(launch):
    launch.record("gcloud")
    printed = launch("tpu_vm.sh", *UP[:-1], "--delete", "--dry_run", *TRAIN)
    assert printed.returncode == 0 and not launch.calls()
    verbs = [line.split()[3:5] for line in printed.stdout.splitlines() if line.startswith("gcloud")]
    request, vm = "queued-resources", "tpu-vm"
    assert verbs == [
        [request, "list"], [request, "create"], [vm, "scp"], [vm, "ssh"], [vm, "ssh"], [vm, "ssh"],
        [request, "delete"], [vm, "delete"],
    ]  # fmt: skip
