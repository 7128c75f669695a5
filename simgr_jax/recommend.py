"""Writes the top-K items of every user, or of any histories, ranked by a trained model over the full catalog.

    python -m simgr_jax.recommend --workdir=DIR --output=FILE.jsonl [--k=10] [--filter_history] [--split=test]
    python -m simgr_jax.recommend --workdir=DIR --output=FILE.jsonl --histories=FILE.jsonl

The file has one line per user, best item first: {"user": "A1", "items": ["B7", "B2", ...]}. By default each list
continues a user's whole history; with --split=test (or validation) it continues the history before that split's target,
so that `simgr_jax.evaluate --predictions=FILE.jsonl` can judge the file.

--histories=FILE names any histories, also of users who are not in the data: JSON lines in the same form, oldest item
first, or a Parquet file (see `serving.history_files`). The file may have any size, and the same command goes on where a
stopped one was. Rows that can't be read are named in OUTPUT.bad.jsonl; then the exit code is 2.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from simgr_jax import cli
from simgr_jax.devices import distributed
from simgr_jax.errors import UserError
from simgr_jax.evaluation import predictions
from simgr_jax.run import SPLITS
from simgr_jax.serving.recommend_file import bad_rows_file, recommend_file
from simgr_jax.workdir.atomic_write import check_target


def main() -> None:
    values, output = flags.FLAGS, cli.required_path("output")
    if values.split not in ("", *SPLITS):
        raise UserError(f'--split: "{values.split}" is unknown; choose {" or ".join(SPLITS)}, or leave it out')
    if values.histories and values.split:
        raise UserError("--split: is of the run's users; give it without --histories")
    check_target(output)
    try:
        if values.histories:
            _continue_file(Path(values.histories).expanduser(), output)
        else:
            _continue_users(output)
    except UserError as error:
        raise UserError(f"--{error}" if str(error).startswith("k:") else str(error)) from error


def _continue_users(output: Path) -> None:
    values, run = flags.FLAGS, cli.open_run()
    cases = run.cases(values.split)
    items, _ = run.lists(cases, values.k, values.filter_history)
    if distributed.is_main():
        predictions.write(output, run.dataset, cases, items)
    print(f"{values.k} items for each of {len(cases):,} histories are in {output}")


def _continue_file(histories: Path, output: Path) -> None:
    values = flags.FLAGS
    done = recommend_file(cli.open_run(), histories, output, values.k, values.filter_history)
    print(f"{values.k} items for each of {done.lists:,} histories are in {output}")
    if done.unknown:
        print(f"{done.unknown:,} ids are not in the catalog and were left out")
    if done.popular:
        print(f"{done.popular:,} histories have no item of the catalog; their lists are the most popular items")
    if done.bad:
        raise UserError(f"{histories}: {done.bad:,} rows can't be read; {bad_rows_file(output)} says which and why")


if __name__ == "__main__":
    cli.define_processes()
    cli.define_run()
    flags.DEFINE_string("output", None, "The file to write.")
    flags.DEFINE_string("histories", None, "Histories to continue instead of the run's: JSON lines or Parquet.")
    flags.DEFINE_integer("k", 10, "The length of the lists.", lower_bound=1)
    flags.DEFINE_bool("filter_history", False, "Whether to leave the items of a history out of its list.")
    flags.DEFINE_string("split", "", "Empty continues whole histories; validation or test, those before its targets.")
    cli.run(main)
