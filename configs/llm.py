"""SimGR with a Hugging Face LLM as its backbone, by LoRA or by training all of its weights (docs/llm.md).

    python -m simgr_jax.train --config=configs/llm.py --config.backbone.checkpoint=DIR_OR_HUB_ID \\
        --config.data.path=DIR --workdir=DIR

`configs/llm.py:full` trains all weights.
"""

import ml_collections

from simgr_jax import default_config
from simgr_jax.errors import UserError

WAYS = ("lora", "full")


def get_config(way: str = "lora") -> ml_collections.ConfigDict:
    """way: one of WAYS."""
    if way not in WAYS:
        raise UserError(f"--config=configs/llm.py:{way}: no such way to train; choose one of {', '.join(WAYS)}")
    config = default_config.get_config()
    # Few levels, because the LLM reads each as a token.
    config.semantic_ids.embeddings.names = ("tfidf", "interactions")
    config.semantic_ids.quantizer.name = "residual_kmeans"
    config.semantic_ids.quantizer.levels = 4
    config.simgr.history = "tokens"
    config.backbone.dropout = 0.0
    config.backbone.dtype = "bfloat16"
    config.backbone.remat = "dots"
    config.lora.rank = 16 if way == "lora" else 0
    # Semantic-ID tokens, item encoder and adapters start from scratch; they need a higher rate than an LLM's weights.
    config.optimizer.learning_rate = 1e-3
    config.optimizer.backbone.learning_rate = 1e-3 if way == "lora" else 2e-4
    config.training.epochs = 5
    config.training.batch_rows = 16
    config.training.row_length = 512
    return config
