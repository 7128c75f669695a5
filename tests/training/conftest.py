"""Runs that several tests look at."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import pytest
import tiny_run

from simgr_jax.models.simgr import SimGR


class Finished(NamedTuple):
    """A finished run; `traces` counts how often each of the model's functions was traced for compilation."""

    config: object
    workdir: object
    model: object
    ranker: object
    traces: Counter


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Finished:
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
