"""A real full disk: a small tmpfs, where an ordinary user may mount one."""

import os
import shutil
import subprocess
import sys

import pytest

MOUNT = ["unshare", "--map-root-user", "--mount", "sh", "-c", 'mount -t tmpfs -o size=8m none "$0" && exec "$@"']


@pytest.mark.slow
def test_a_checkpoint_on_a_full_disk_is_one_line_and_loses_nothing(root, tmp_path):
    if not shutil.which("unshare") or subprocess.run([*MOUNT, tmp_path, "true"], capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    program = [sys.executable, root / "tests" / "training" / "full_disk.py", tmp_path]
    env = os.environ | {"PYTHONPATH": str(root)}
    ended = subprocess.run([*MOUNT, tmp_path, *program], env=env, capture_output=True, text=True, timeout=600)
    assert (ended.returncode, ended.stderr) == (0, "")
    told = [line for line in ended.stdout.splitlines() if line.startswith(("error: ", "kept: "))]
    error, kept, continued = told
    full = f"error: {tmp_path}/workdir: No space left on device; free some space, and give the same command again"
    assert (error, kept) == (full, "kept: 5")
    assert continued.split()[-1] == "20"
