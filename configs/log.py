"""SimGR on your own log, a CSV, TSV, JSON Lines or Parquet file with one row per interaction (docs/data.md).

    python -m simgr_jax.train --config=configs/log.py --config.data.path=FILE --workdir=DIR

Without item texts the semantic IDs come from co-occurrence in the training interactions; with
`--config.data.log.items_file` use `--config.semantic_ids.embeddings.names="('tfidf', 'interactions')"`.
"""

import ml_collections

from simgr_jax import default_config


def get_config() -> ml_collections.ConfigDict:
    config = default_config.get_config()
    config.data.format = "log"
    config.data.k_core = 5
    config.semantic_ids.embeddings.names = ("interactions",)
    return config
