"""A SimGR so small that a test compiles it in a second or two."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from flax import nnx

from simgr_jax.models.model_inputs import Backbone
from simgr_jax.models.simgr import Options, SimGR
from simgr_jax.models.transformer import Transformer
from simgr_jax.models.transformer_config import from_scratch_config
from simgr_jax.semantic_ids.codes import SemanticIds

NUM_ITEMS = 37
CODEBOOK_SIZES = (4, 5, 3)
# What differs from the defaults.
OPTIONS = {
    "item_encoder": "mean",
    "item_encoder_width": 10,
    "temperature": 0.2,
    "temperature_min": 0.05,
    "sampled_negatives": 16,
    "catalog_chunk": 0,
}
BACKBONE = from_scratch_config(width=8, layers=1, heads=2, kv_heads=1, head_width=4, mlp_width=12)


@pytest.fixture(scope="session")
def codes() -> np.ndarray:
    """int [37, 3], all distinct."""
    every = np.stack(np.unravel_index(np.arange(np.prod(CODEBOOK_SIZES)), CODEBOOK_SIZES), axis=1)
    return np.random.default_rng(0).permutation(every)[:NUM_ITEMS]


@pytest.fixture(scope="session")
def make_simgr(codes) -> Callable[..., SimGR]:
    """A function (codes=..., text_embedding=..., readings=..., reader=..., **changes of the options) -> SimGR of 37
    items."""

    def make(codes=codes, text_embedding=None, readings=None, reader=None, **changes) -> SimGR:
        rngs = nnx.Rngs(0)
        backbone = Backbone(Transformer(BACKBONE, rngs), text_embedding=text_embedding)
        ids, counts = SemanticIds(codes, CODEBOOK_SIZES), np.arange(NUM_ITEMS)
        return SimGR(Options(**OPTIONS | changes), backbone, ids, counts, rngs, readings, reader)

    return make
