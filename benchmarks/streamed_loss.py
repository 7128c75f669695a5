"""The streamed full-catalog loss against the dense one: memory with a million items, and time where both fit.

    python -m benchmarks.streamed_loss

Both make item vectors from codes, score 512 users and take the gradients of users, embeddings, encoder and temperature.
Memory is that of the temporaries in the compiled program, which needn't run; times alternate in one run.
Writes results/streamed_loss.json.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from benchmarks import record
from simgr_jax.models import item_encoders
from simgr_jax.ops.similarity_loss import full_catalog_cross_entropy, to_similarity_space
from simgr_jax.ops.streamed_loss import streamed_cross_entropy

USERS, WIDTH, HEADS, LEVELS, CODEBOOK_SIZE = 512, 256, 4, 4, 256  # Codes as in configs/llm.py.
MANY_ITEMS, TIMED_ITEMS, CHUNK = 1_000_000, 50_000, 4096
ROUNDS, SEED = 7, 0


def losses(graphdef: nnx.GraphDef) -> dict[str, Callable]:
    """Functions (learned, tokens, targets) -> mean loss."""

    def encode(parameters, tokens):
        encoder, table = parameters
        return to_similarity_space(nnx.merge(graphdef, encoder)(table, tokens), "cosine")

    def dense(learned, tokens, targets):
        parameters, users, temperature = learned
        vectors = encode(parameters, tokens)
        return full_catalog_cross_entropy(users, vectors, targets, temperature).mean()

    def streamed(learned, tokens, targets):
        parameters, users, temperature = learned
        target_vectors = encode(parameters, tokens[targets])
        return streamed_cross_entropy(encode, parameters, tokens, users, target_vectors, temperature, 0.0, CHUNK).mean()

    return {"dense": dense, "streamed": streamed}


def compiled(loss: Callable, learned: tuple, num_items: int) -> jax.stages.Compiled:
    tokens = jax.ShapeDtypeStruct((num_items, LEVELS), jnp.int32)
    targets = jax.ShapeDtypeStruct((USERS,), jnp.int32)
    return jax.jit(jax.value_and_grad(loss)).lower(learned, tokens, targets).compile()


def random_codes(rng: np.random.Generator, num_items: int) -> Int[Array, "N L"]:
    codes = rng.integers(0, CODEBOOK_SIZE, (num_items, LEVELS)) + np.arange(LEVELS) * CODEBOOK_SIZE
    return jnp.asarray(codes, jnp.int32)


def compare(encoder_name: str) -> dict[str, object]:
    rng = np.random.default_rng(SEED)
    sizes = (CODEBOOK_SIZE,) * LEVELS
    graphdef, encoder = nnx.split(item_encoders.create(encoder_name, WIDTH, HEADS, WIDTH, sizes, nnx.Rngs(SEED)))
    table = jnp.asarray(rng.normal(0, 0.1, (LEVELS * CODEBOOK_SIZE, WIDTH)), jnp.float32)
    users = to_similarity_space(jnp.asarray(rng.normal(size=(USERS, WIDTH)), jnp.float32), "cosine")
    learned = ((encoder, table), users, jnp.float32(0.07))
    functions = losses(graphdef)

    temporaries = {
        name: compiled(loss, learned, MANY_ITEMS).memory_analysis().temp_size_in_bytes
        for name, loss in functions.items()
    }
    steps = {name: compiled(loss, learned, TIMED_ITEMS) for name, loss in functions.items()}
    tokens, targets = random_codes(rng, TIMED_ITEMS), jnp.asarray(rng.integers(0, TIMED_ITEMS, USERS), jnp.int32)
    seconds = {name: [] for name in steps}
    for _ in range(ROUNDS + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            jax.block_until_ready(step(learned, tokens, targets))
            seconds[name].append(time.perf_counter() - began)
    # The first round warms up.
    ratios = [streamed / dense for streamed, dense in zip(seconds["streamed"][1:], seconds["dense"][1:], strict=True)]
    return {
        **{f"{name}_temporary_mib": round(size / 2**20, 1) for name, size in temporaries.items()},
        "temporary_share": round(temporaries["streamed"] / temporaries["dense"], 4),
        **{f"{name}_seconds": round(statistics.median(values[1:]), 3) for name, values in seconds.items()},
        "time_ratio": round(statistics.median(ratios), 3),
        "time_ratios": [round(ratio, 3) for ratio in ratios],
    }


def main() -> None:
    config = {
        "users": USERS,
        "width": WIDTH,
        "levels": LEVELS,
        "codebook_size": CODEBOOK_SIZE,
        "items_for_memory": MANY_ITEMS,
        "items_for_time": TIMED_ITEMS,
        "chunk": CHUNK,
        "similarity": "cosine",
    }
    figures = {}
    for name in item_encoders.ITEM_ENCODERS:
        figures[name] = compare(name)
        print(name, figures[name], flush=True)
        record.write("streamed_loss", figures, config, SEED)


if __name__ == "__main__":
    main()
