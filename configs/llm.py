"""SimGR with a pretrained LLM as its backbone (docs/llm.md).

    python -m simgr_jax.train --config=configs/llm.py --config.backbone.checkpoint=LLM \\
        --config.data.path=DIR --workdir=DIR

LLM is a folder, a GGUF file or a hub id. The LLM first reads each item's text. Histories then have one position per
item, whose vector is made of its codes and of this reading, and adapters (LoRA) are trained. `configs/llm.py:full`
trains all weights. `configs/llm.py:titles` gives the LLM each item's title and codes as tokens, which takes several
times as long.
"""

import ml_collections

from simgr_jax import default_config
from simgr_jax.errors import UserError

WAYS = ("lora", "full", "titles")


def get_config(way: str = "lora") -> ml_collections.ConfigDict:
    """way: one of WAYS."""
    if way not in WAYS:
        raise UserError(f"--config=configs/llm.py:{way}: no such way to train; choose one of {', '.join(WAYS)}")
    config = default_config.get_config()
    config.semantic_ids.embeddings.names = ("llm", "interactions")
    # Few levels, because an LLM that reads tokens reads each of them.
    config.semantic_ids.quantizer.name = "residual_kmeans"
    config.semantic_ids.quantizer.levels = 4
    config.simgr.item_text = "read"
    config.simgr.repeat_bias = True
    config.backbone.token_init = "reading"
    if way == "titles":
        config.simgr.history = "tokens"
        config.prompt.item = "\n{title} {codes}"
        config.prompt.max_title_tokens = 12
    config.backbone.dropout = 0.0
    config.backbone.remat = "dots"
    config.lora.rank = 0 if way == "full" else 16
    # What is new starts from scratch and needs a higher rate than an LLM's weights or its adapters.
    config.optimizer.learning_rate = 2e-3
    config.optimizer.backbone.learning_rate = 1e-4 if way == "full" else 3e-4
    config.training.epochs = 5
    # Data and machine decide these.
    config.training.batch_rows = 0
    config.training.row_length = 0
    config.backbone.dtype = "auto"
    # Less memory than the default, because an LLM's states are wide.
    config.evaluation.batch_size = 64
    return config
