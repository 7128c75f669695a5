"""Writes a run's best model as a folder for Transformers, with its catalog as an item index.

    python -m simgr_jax.export --workdir=DIR --output=DIR [--dtype=float32] [--filter_history]

`AutoModel.from_pretrained(OUTPUT)` and `AutoTokenizer.from_pretrained(OUTPUT)` load it, and OUTPUT/item_index/score.py
ranks the catalog for a history in plain torch (docs/export.md).
"""

from __future__ import annotations

from absl import flags

from simgr_jax import cli


def main() -> None:
    output = cli.required_path("output")
    cli.open_run().export(output, dtype=flags.FLAGS.dtype, filter_history=flags.FLAGS.filter_history)
    print(f"the model is in {output}, its catalog in {output / 'item_index'}")


if __name__ == "__main__":
    cli.define_run()
    flags.DEFINE_string("output", None, "The folder to write; it must not exist yet.")
    flags.DEFINE_string("dtype", "", "The weights' type, float32 or bfloat16; by default the base model's own.")
    flags.DEFINE_bool("filter_history", False, "Whether the exported program leaves a history's items out of its list.")
    cli.run(main)
