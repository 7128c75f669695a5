"""Compares the streamed full-catalog loss with the dense one: memory with a million items, and time where both fit.

    python -m benchmarks.streamed_loss

Both encode items from codes, score 512 users and compute the gradients of users, embeddings, encoder and temperature.
Memory is that of the compiled program's temporaries; the program need not run. The timed steps alternate in one run.
Writes results/streamed_loss.json.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from benchmarks import record
from simgr_jax.models import item_encoders
from simgr_jax.ops.similarity_loss import full_catalog_cross_entropy, to_similarity_space
from simgr_jax.ops.streamed_loss import streamed_cross_entropy

USERS, WIDTH, HEADS, LEVELS, CODEBOOK_SIZE = 512, 256, 4, 4, 256  # The codes of configs/llm.py.
MANY_ITEMS, TIMED_ITEMS, CHUNK = 1_000_000, 50_000, 4096
ROUNDS, SEED = 15, 0


class Problem:
    """Random users, embedding table and item encoder.

    Attributes:
      learned: ((encoder's state, table), users, temperature), the values that gradients are computed for.
    """

    def __init__(self, encoder_name: str):
        rng, sizes = np.random.default_rng(SEED), (CODEBOOK_SIZE,) * LEVELS
        encoder = item_encoders.create(encoder_name, WIDTH, HEADS, WIDTH, sizes, nnx.Rngs(SEED))
        self._graphdef, state = nnx.split(encoder)
        table = jnp.asarray(rng.normal(0, 0.1, (sum(sizes), WIDTH)), jnp.float32)
        users = to_similarity_space(jnp.asarray(rng.normal(size=(USERS, WIDTH)), jnp.float32), "cosine")
        self.learned = (state, table), users, jnp.float32(0.07)

    def with_tables(self, learned: tuple) -> tuple:
        """`learned` with the encoder's own tables in place of the table."""
        (state, table), users, temperature = learned
        return (state, nnx.merge(self._graphdef, state).tables(table)), users, temperature

    def encode(self, parameters: tuple, tokens: Int[Array, "M L"]) -> Float[Array, "M D"]:
        state, tables = parameters
        return to_similarity_space(nnx.merge(self._graphdef, state).combine(tables, tokens), "cosine")

    def dense(self, learned: tuple, tokens: Int[Array, "N L"], targets: Int[Array, " B"]) -> Float[Array, ""]:
        parameters, users, temperature = self.with_tables(learned)
        vectors = self.encode(parameters, tokens)
        return full_catalog_cross_entropy(users, vectors, targets, temperature).mean()

    def streamed(self, learned: tuple, tokens: Int[Array, "N L"], targets: Int[Array, " B"]) -> Float[Array, ""]:
        parameters, users, temperature = self.with_tables(learned)
        vectors = self.encode(parameters, tokens[targets])
        return streamed_cross_entropy(
            self.encode, parameters, tokens, len(tokens), users, vectors, temperature, 0.0, CHUNK
        ).mean()


def compiled(loss: Callable, learned: tuple, num_items: int, *others: Any) -> jax.stages.Compiled:
    """The loss and gradients of `loss(learned, tokens, targets, *others)`."""
    tokens = jax.ShapeDtypeStruct((num_items, LEVELS), jnp.int32)
    targets = jax.ShapeDtypeStruct((USERS,), jnp.int32)
    return jax.jit(jax.value_and_grad(loss)).lower(learned, tokens, targets, *others).compile()


def random_items(num_items: int) -> tuple[Int[Array, "N L"], Int[Array, " B"]]:
    """(tokens, targets)"""
    rng = np.random.default_rng(SEED)
    codes = rng.integers(0, CODEBOOK_SIZE, (num_items, LEVELS), np.int32) + np.arange(LEVELS) * CODEBOOK_SIZE
    return jnp.asarray(codes, jnp.int32), jnp.asarray(rng.integers(0, num_items, USERS), jnp.int32)


def time_steps(steps: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step in `rounds` alternating rounds, after one round to warm up."""
    seconds = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            jax.block_until_ready(step())
            seconds[name].append(time.perf_counter() - began)
    return {name: values[1:] for name, values in seconds.items()}


def compare(encoder_name: str) -> dict[str, object]:
    problem = Problem(encoder_name)
    functions = {"dense": problem.dense, "streamed": problem.streamed}
    temporaries = {
        name: compiled(loss, problem.learned, MANY_ITEMS).memory_analysis().temp_size_in_bytes
        for name, loss in functions.items()
    }
    items = random_items(TIMED_ITEMS)
    compiled_steps = {name: compiled(loss, problem.learned, TIMED_ITEMS) for name, loss in functions.items()}
    steps = {name: lambda step=step: step(problem.learned, *items) for name, step in compiled_steps.items()}
    seconds = time_steps(steps, ROUNDS)
    ratios = [streamed / dense for streamed, dense in zip(seconds["streamed"], seconds["dense"], strict=True)]
    return {
        **{f"{name}_temporary_mib": round(size / 2**20, 1) for name, size in temporaries.items()},
        "temporary_share": round(temporaries["streamed"] / temporaries["dense"], 4),
        **{f"{name}_seconds": round(statistics.median(values), 3) for name, values in seconds.items()},
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
