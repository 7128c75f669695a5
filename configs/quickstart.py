"""SimGR on the embedded data, a generated shop.

    python -m simgr_jax.train --config=quickstart --workdir=workdirs/quickstart

Training takes a minute on a laptop.
"""

import ml_collections

from simgr_jax import default_config


def get_config() -> ml_collections.ConfigDict:
    config = default_config.get_config()
    config.data.format = "synthetic"

    config.semantic_ids.embeddings.dim = 128
    config.semantic_ids.quantizer.levels = 16
    config.semantic_ids.quantizer.codebook_size = 32

    config.simgr.item_encoder = "mean"
    config.training.epochs = 10
    return config
