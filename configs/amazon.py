"""SimGR on the Amazon datasets that semantic-ID papers share, trained from scratch.

    python -m simgr_jax.train --config=configs/amazon.py:beauty --config.data.path=DIR --workdir=DIR

`beauty` and `toys` read the P5 files (`user_sequence.txt`, `item_plain_text.txt`). `instruments` reads the LC-Rec files
(`Instruments.inter.json`, `Instruments.index.json`), which include published semantic IDs. Results are in results/.
"""

import ml_collections

from simgr_jax import default_config
from simgr_jax.errors import UserError

DATASETS = ("beauty", "toys", "instruments")


def get_config(dataset: str = "") -> ml_collections.ConfigDict:
    """dataset: one of DATASETS."""
    if dataset not in DATASETS:
        raise UserError(f"--config=configs/amazon.py:{dataset}: no such dataset; choose one of {', '.join(DATASETS)}")
    config = default_config.get_config()
    config.data.name = dataset
    if dataset == "instruments":
        config.data.format = "lcrec"
        config.semantic_ids.source = "given"
        # The mean of only four codes tells few items apart (docs/item_encoders.md).
        config.simgr.item_encoder = "mean_mlp"
        config.training.epochs = 30
    else:
        config.data.format = "p5"
        config.semantic_ids.embeddings.names = ("tfidf", "interactions")
        config.simgr.item_encoder = "mean"
        config.backbone.width = 256
        config.backbone.head_width = 64
        config.training.epochs = 14
    config.training.evaluate_every_epochs = 2
    return config
