"""Writes the top-K items of every user, ranked by a trained model over the full catalog.

    python -m simgr_jax.recommend --workdir=DIR --output=FILE.jsonl [--k=10] [--filter_history] [--split=test]

The file has one line per user, best item first: {"user": "A1", "items": ["B7", "B2", ...]}. By default each list
continues a user's whole history; with --split=test (or validation) it continues the history before that split's target,
so that `simgr_jax.evaluate --predictions=FILE.jsonl` can judge the file. For histories of users who are not in the
data, see `simgr_jax.Run.recommend`.
"""

from __future__ import annotations

from absl import flags

from simgr_jax import cli
from simgr_jax.devices import distributed
from simgr_jax.errors import UserError
from simgr_jax.evaluation import predictions
from simgr_jax.run import SPLITS
from simgr_jax.workdir.atomic_write import check_target


def main() -> None:
    values, output = flags.FLAGS, cli.required_path("output")
    if values.split not in ("", *SPLITS):
        raise UserError(f'--split: "{values.split}" is unknown; choose {" or ".join(SPLITS)}, or leave it out')
    check_target(output)
    run = cli.open_run()
    cases = run.cases(values.split)
    try:
        items, _ = run.lists(cases, values.k, values.filter_history)
    except UserError as error:
        raise UserError(f"--{error}" if str(error).startswith("k:") else str(error)) from error
    if distributed.is_main():
        predictions.write(output, run.dataset, cases, items)
    print(f"{values.k} items for each of {len(cases):,} histories are in {output}")


if __name__ == "__main__":
    cli.define_processes()
    cli.define_run()
    flags.DEFINE_string("output", None, "The file to write.")
    flags.DEFINE_integer("k", 10, "The length of the lists.", lower_bound=1)
    flags.DEFINE_bool("filter_history", False, "Whether to leave the items of a history out of its list.")
    flags.DEFINE_string("split", "", "Empty continues whole histories; validation or test, those before its targets.")
    cli.run(main)
