"""Runs that several tests look at."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import jax
import pytest
import tiny_run

from simgr_jax.models.simgr import SimGR


@pytest.fixture(scope="session")
def compiled_programs(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module", autouse=True)
def quick_compilation(compiled_programs):
    """The runs here compile the same programs again and again: plainly, and kept on disk, for subprocesses too."""
    options = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": compiled_programs,
        "jax_persistent_cache_min_compile_time_secs": 0.1,
    }
    before = {name: jax.config.values[name] for name in options}
    for option in options.items():
        jax.config.update(*option)
    yield options
    for option in before.items():
        jax.config.update(*option)


class Finished(NamedTuple):
    """A finished run; `traces` counts how often each of the model's functions was traced for compilation."""

    config: object
    workdir: object
    model: object
    ranker: object
    traces: Counter


@pytest.fixture(scope="module")
def finished(tmp_path_factory, quick_compilation) -> Finished:
    """A run of four epochs that nothing disturbed."""
    traces = Counter()

    def counted(name):
        function = getattr(SimGR, name)

        def wrapper(*arguments):
            traces[name] += 1
            return function(*arguments)

        return wrapper

    config, workdir = tiny_run.config(), tmp_path_factory.mktemp("run") / "workdir"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("loss", "catalog", "rank"):
            patch.setattr(SimGR, name, counted(name))
        model, ranker = tiny_run.train(config, workdir)
    return Finished(config, workdir, model, ranker, traces)
