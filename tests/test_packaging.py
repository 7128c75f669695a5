"""The package that `pip install .` makes holds all that it needs away from the clone; `make wheel` tries it there."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import simgr_jax

ROOT = Path(__file__).resolve().parents[1]


def sources() -> set[str]:
    """What the wheel should hold, by its paths there."""
    files = [*(ROOT / "simgr_jax").rglob("*"), *(ROOT / "configs").glob("*.py")]
    names = {file.relative_to(ROOT).as_posix() for file in files if file.is_file() and "__pycache__" not in file.parts}
    return {re.sub(r"^configs/", "simgr_jax/configs/", name) for name in names}


def test_the_list_of_packages_is_complete():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted({name.rpartition("/")[0].replace("/", ".") for name in sources()})


def test_the_changelog_begins_with_the_version():
    assert re.search(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)[1] == (
        simgr_jax.__version__
    )


def test_a_wheel_built_from_the_source_distribution_holds_every_file(tmp_path):
    pytest.importorskip("build", reason="make test installs it")
    command = [sys.executable, "-m", "build", "--no-isolation", "--skip-dependency-check", "--outdir", str(tmp_path)]
    ended = subprocess.run([*command, str(ROOT)], capture_output=True, text=True)
    assert ended.returncode == 0, (ended.stdout + ended.stderr)[-3000:]
    (wheel,), (sdist,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == sources()
    assert wheel.name.split("-")[1] == simgr_jax.__version__
    with tarfile.open(sdist) as archive:
        assert f"simgr_jax-{simgr_jax.__version__}/CHANGELOG.md" in archive.getnames()
