"""A pretrained LLM and a small model on the embedded data, a generated shop.

    make llm

trains both in about eight minutes on two cores. `configs/llm_quickstart.py:small` is the small model of
configs/quickstart.py.
"""

import runpy
from pathlib import Path

import ml_collections

from simgr_jax.errors import UserError

USERS = 3000
WAYS = ("llm", "small")


def get_config(way: str = "llm") -> ml_collections.ConfigDict:
    """way: one of WAYS."""
    if way not in WAYS:
        raise UserError(f"--config=configs/llm_quickstart.py:{way}: no such model; choose one of {', '.join(WAYS)}")
    file = "quickstart.py" if way == "small" else "llm.py"
    config = runpy.run_path(str(Path(__file__).with_name(file)))["get_config"]()
    config.data.format = "synthetic"
    config.data.synthetic.num_users = USERS
    if way == "llm":
        config.backbone.checkpoint = "workdirs/smollm2-135m-instruct.gguf"
        # The first layers of 30, which are enough for a shop of this size and take less than half the time.
        config.backbone.first_layers = 12
        config.training.epochs = 2
        config.training.log_every_steps = 10
    return config
