"""Writes the top-K items of every user, ranked by a trained model over the full catalog.

    python -m simgr_jax.recommend --workdir=DIR --output=FILE.jsonl [--k=10] [--split=test]

A line a user, best item first: {"user": "A1", "items": ["B7", "B2", ...]}. By default a user's whole history is
continued; with --split=test (or validation) the history before that part's target, so that `simgr_jax.evaluate
--predictions=FILE.jsonl` can judge the file.
"""

from __future__ import annotations

import numpy as np
from absl import flags

from simgr_jax import cli, distributed
from simgr_jax.data.dataset import Dataset, EvaluationCases
from simgr_jax.errors import UserError
from simgr_jax.evaluation import predictions
from simgr_jax.preparation import open_mesh, prepare, restore_best

SPLITS = ("", "validation", "test")


def main() -> None:
    values = flags.FLAGS
    output = cli.required_path("output")
    if values.split not in SPLITS:
        raise UserError(f'--split: "{values.split}" is unknown; choose validation or test, or leave it out')
    config, workdir = cli.open_run()
    with open_mesh(config):
        prepared = prepare(config, workdir, k=values.k)
        cases = getattr(prepared.split, values.split) if values.split else _whole_histories(prepared.dataset)
        params, rest, _ = restore_best(prepared, workdir)
        lists = prepared.ranker.lists(params, rest, cases)
    if distributed.is_main():
        predictions.write(output, prepared.dataset, cases, lists)
    print(f"{values.k} items for each of {len(cases):,} histories are in {output}")


def _whole_histories(dataset: Dataset) -> EvaluationCases:
    """Every user's whole sequence; there is no target yet, so item 0 stands in for it."""
    users = np.arange(len(dataset.sequences), dtype=np.int32)
    return EvaluationCases(users, dataset.sequences, np.zeros_like(users))


if __name__ == "__main__":
    cli.define_processes()
    cli.define_run()
    flags.DEFINE_string("output", None, "The file to write.")
    flags.DEFINE_integer("k", 10, "Length of the lists.", lower_bound=1)
    flags.DEFINE_string("split", "", "Whose histories: all users' whole ones, or those before validation or test.")
    cli.run(main)
