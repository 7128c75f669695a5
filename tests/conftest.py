"""Fixtures that more than one folder of tests uses."""

from __future__ import annotations

import fcntl
import gc
import importlib
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import jax
import pytest
from absl import app
from absl.testing import flagsaver

from simgr_jax import cli
from tests import virtual_devices

ROOT = Path(__file__).resolve().parents[1]

TINY = f"--config={ROOT}/tests/tiny_config.py"


def pytest_configure(config):
    """Tests compile much, many programs again and again, and compute little; half of compiling is optimizing."""
    # XLA's emitters of fused loops take half of what is left; small programs aren't worth many parallel compilations.
    flags = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    # Tracing makes so many objects that Python would look for garbage all the time.
    gc.set_threshold(100_000, 20, 50)
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR")  # The workers of pytest-xdist share their parent's.
    if not (folder and hasattr(config, "workerinput")):
        temporary = tempfile.TemporaryDirectory(prefix="compiled-")
        config.add_cleanup(temporary.cleanup)
        folder = temporary.name
    options = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_traceback_in_locations_limit": 0,
    }
    for option in options.items():
        set_option(*option)


def set_option(name: str, value: object) -> None:
    """One of JAX's, which has read the environment; what the tests start has not."""
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)


@pytest.fixture(scope="module")
def optimized_programs():
    """For modules that look at compiled programs: they are what users get."""
    set_option("jax_disable_most_optimizations", False)
    yield
    set_option("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real datasets beside the repository; what needs it is skipped where it is absent."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real datasets are not here")
    return folder


@pytest.fixture(scope="session")
def tiny_options() -> tuple[str, ...]:
    """The flags of `simgr_jax.train`, without --workdir, for a run that takes seconds: SimGR on the embedded data."""
    return (TINY,)


@pytest.fixture(scope="session")
def run_binary() -> Callable[..., int]:
    """A function (name, *arguments) -> exit code that runs `python -m simgr_jax.NAME ARGUMENTS` within this process.

    A process of its own would import JAX anew, which takes longer than most of what is tested. flagsaver forgets the
    flags that the binary defined; what `cli.run` does to the process as a whole is left out.
    """

    def run(name: str, *arguments: object) -> int:
        # Libraries define flags of their own when first imported, absl those for help once and never again.
        importlib.import_module(f"simgr_jax.{name}")
        app.define_help_flags()
        with pytest.MonkeyPatch.context() as patch, flagsaver.flagsaver(), warnings.catch_warnings():
            patch.setattr(sys, "argv", [name, *map(str, arguments)])
            patch.setattr(cli, "_silence_libraries", lambda: None)
            patch.setattr(cli, "_end_at_once", lambda: None)
            warnings.filterwarnings("ignore", message=".*found in sys.modules", category=RuntimeWarning)
            try:
                runpy.run_module(f"simgr_jax.{name}", run_name="__main__")
            except SystemExit as end:
                return end.code or 0
            return 0

    return run


@pytest.fixture(scope="session")
def on_eight_devices() -> Callable[..., str]:
    """A function (module, *arguments) -> what `python -m MODULE ARGUMENTS` prints on eight virtual devices."""

    def run(module: str, *arguments: object) -> str:
        command = [sys.executable, "-m", module, *map(str, arguments)]
        environment = virtual_devices.environment(8)
        ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr[-3000:]
        return ended.stdout

    return run


@pytest.fixture(
    params=[(2, 2, 2), pytest.param((8, 1, 1), marks=pytest.mark.slow), pytest.param((1, 8, 1), marks=pytest.mark.slow)]
)
def mesh(request) -> tuple[int, int, int]:
    """For programs of eight devices: the sizes of the mesh's axes. One cuts along all of them, others along one."""
    return request.param


@pytest.fixture(scope="session")
def make_once(tmp_path_factory) -> Callable[[str, Callable[[Path], None]], Path]:
    """A function (name, make) -> a folder that `make(folder)` has made, for all workers of pytest-xdist once.

    Copy it before using it, because they use it at the same time.
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent

    def once(name: str, make: Callable[[Path], None]) -> Path:
        folder, finished = shared / name, shared / f"{name}.finished"
        with (shared / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not finished.exists():
                make(folder)
                finished.touch()
        return folder

    return once


@pytest.fixture(scope="session")
def trained_workdir(run_binary, make_once, tmp_path_factory) -> Path:
    """The workdir of a finished run of one epoch on the embedded data. Copy it before changing anything in it."""

    def train(workdir: Path) -> None:
        assert run_binary("train", TINY, f"--workdir={workdir}") == 0

    return shutil.copytree(make_once("trained", train), tmp_path_factory.mktemp("trained") / "workdir")


@pytest.fixture(scope="session")
def transformers_4(request) -> str:
    """A Python with Transformers 4.57, which can't be installed beside 5: $TRANSFORMERS_4_PYTHON, or one that is made
    once in pytest's cache. It finds the other packages, like torch, in the environment of this one."""
    pytest.importorskip("torch")
    if given := os.environ.get("TRANSFORMERS_4_PYTHON"):
        return given
    folder = request.config.cache.mkdir("transformers-4.57")
    python, finished = folder / "bin" / "python", folder / "finished"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not finished.exists():
            install = [python, "-m", "pip", "install", "--quiet", "transformers==4.57.*"]
            for command in ([sys.executable, "-m", "venv", folder], install):
                ended = subprocess.run(command, capture_output=True, text=True)
                if ended.returncode:
                    reason = ended.stderr.strip().splitlines()[-1:]
                    pytest.skip(f"Transformers 4.57 can't be installed {reason}; give $TRANSFORMERS_4_PYTHON")
            packages = folder / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
            (packages / "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
            finished.touch()
    return str(python)
