#!/usr/bin/env bash
# Installs a wheel into an empty environment and uses it there, far from the clone.
#
#     tests/try_wheel.sh PYTHON dist/simgr_jax-VERSION-py3-none-any.whl
set -euo pipefail
python=$1 wheel=$(realpath "$2")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$wheel"

cd "$folder"
unset PYTHONPATH
python=$folder/venv/bin/python
"$python" -m simgr_jax.train --config=quickstart --workdir=run --config.training.epochs=1 \
  --config.data.synthetic.num_users=200 --config.data.synthetic.num_items=60 \
  --config.semantic_ids.quantizer.codebook_size=8 --config.backbone.layers=1
"$python" -m simgr_jax.recommend --workdir=run --output=top.jsonl --k=3
"$python" - <<'PYTHON'
import json
from pathlib import Path

import simgr_jax
from simgr_jax.config_files import load_run_config

folder = Path(simgr_jax.__file__).parent
assert Path.cwd() in folder.parents, folder
assert (folder / "py.typed").is_file()
assert load_run_config("rivals:synthetic-sasrec").model == "sasrec"
run = simgr_jax.load("run")
items = json.loads(Path("top.jsonl").read_text().splitlines()[0])["items"]
lists = run.recommend([items, [*items, "nothing"]], k=3)
assert lists.items[0] == lists.items[1] and len(lists.items[0]) == 3, lists
assert lists.unknown == 1, lists
print(f"simgr_jax {simgr_jax.__version__} works from {folder}")
PYTHON
