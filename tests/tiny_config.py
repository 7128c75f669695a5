"""The quickstart with little data and a small model, for runs that take seconds. Tests change what they are about.

It is a config file rather than a list of flags because overrides of keys that a run does not read are refused: a test
may choose any model or data format, and the keys below that it then does not read have no effect.
"""

from __future__ import annotations

import runpy
from pathlib import Path

import ml_collections

VALUES = {
    "data.synthetic.num_users": 200,
    "data.synthetic.num_items": 60,
    "semantic_ids.embeddings.dim": 16,
    "semantic_ids.quantizer.levels": 4,
    "semantic_ids.quantizer.codebook_size": 8,
    "backbone.width": 16,
    "backbone.layers": 1,
    "backbone.heads": 2,
    "backbone.kv_heads": 1,
    "backbone.head_width": 8,
    "backbone.mlp_width": 32,
    "training.epochs": 1,
}


def get_config() -> ml_collections.ConfigDict:
    quickstart = Path(__file__).resolve().parents[1] / "configs" / "quickstart.py"
    config = runpy.run_path(str(quickstart))["get_config"]()
    config.update_from_flattened_dict(VALUES)
    return config
