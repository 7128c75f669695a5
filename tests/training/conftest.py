"""A run that several tests look at."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import ml_collections
import pytest
import tiny_run

from simgr_jax.evaluation.ranking import Ranker
from simgr_jax.models.simgr import SimGR


class Finished(NamedTuple):
    """A finished run.

    Attributes:
      ranker: ranks with models of the run's structure.
      traces: how often each of the model's methods was traced for compilation.
      programs: what it compiled.
    """

    config: ml_collections.ConfigDict
    workdir: Path
    ranker: Ranker
    traces: Counter
    programs: tiny_run.Programs

    def repeat(self, workdir: Path, **training) -> None:
        """Trains as the run did, in another workdir. training: changes of how often something is done or saved."""
        config = self.config.copy_and_resolve_references()
        config.training.update(training)
        tiny_run.train(config, workdir, self.programs)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Finished:
    """A run of four epochs without an interruption."""
    return _finish(tiny_run.config(), tmp_path_factory.mktemp("run") / "workdir")


@pytest.fixture(scope="module")
def thawed(tmp_path_factory) -> Finished:
    """The same, whose backbone is frozen in the first 7 of 20 steps."""
    config = tiny_run.pretrained_config(freeze_epochs=1.4, ema_decay=0.9)
    return _finish(config, tmp_path_factory.mktemp("thawed") / "workdir")


def _finish(config: ml_collections.ConfigDict, workdir: Path) -> Finished:
    traces = Counter()

    def counted(name):
        function = getattr(SimGR, name)

        def wrapper(*arguments, **options):
            traces[name] += 1
            return function(*arguments, **options)

        return wrapper

    programs = tiny_run.Programs()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("loss", "catalog", "rank"):
            patch.setattr(SimGR, name, counted(name))
        _, ranker = tiny_run.train(config, workdir, programs)
    return Finished(config, workdir, ranker, traces, programs)
