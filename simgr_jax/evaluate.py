"""Judges a trained model, or anybody's recommendations: metrics, intervals, slices, pictures.

    python -m simgr_jax.evaluate --workdir=DIR                                  a run of simgr_jax.train
    python -m simgr_jax.evaluate --predictions=FILE --config=configs/amazon.py:beauty --config.data.path=DIR

A predictions file has one line per user, best item first: {"user": "A1", "items": ["B7", "B2", ...]}.
"""

from __future__ import annotations

from absl import flags

from simgr_jax import cli
from simgr_jax.errors import UserError
from simgr_jax.run import SPLITS, Run


def main() -> None:
    values = flags.FLAGS
    if values.split not in SPLITS:
        raise UserError(f'--split: "{values.split}" is unknown; choose one of {", ".join(SPLITS)}')
    if bool(values.workdir) == bool(values.predictions):
        raise UserError("--workdir, --predictions: give one of the two")
    if values.workdir:
        if flags.FLAGS["config"].value is not None:
            raise UserError("--config: a workdir has its own config; leave this out")
        cli.open_run().evaluate(values.split)
        return
    if places := cli.places():
        raise UserError(f"--predictions: is judged on the data of --config; give --config.{next(iter(places))}")
    cli.required("config")
    file = cli.required_path("predictions")
    # The report's folder keeps the prepared data if the config has no cache_dir.
    Run(values.config, file.with_name(f"{file.name}.report")).judge_predictions(file, values.split)


if __name__ == "__main__":
    cli.define_config()
    cli.define_processes()
    cli.define_run()
    flags.DEFINE_string("predictions", None, "A JSONL file of recommendations, judged on the data of --config.")
    flags.DEFINE_string("split", "test", "The split that is judged: validation or test.")
    cli.run(main)
