"""Compares the streamed, sampled and in-batch losses: time per step as the catalog grows, and accuracy on a small shop.

    python -m benchmarks.sampled_loss

The timed step is that of benchmarks/streamed_loss.py, with 512 users, `mean_mlp` and gradients of all learned values;
the losses alternate in one run. The quickstart is then trained with each loss for the same number of epochs in
workdirs/sampled_loss, and evaluated on validation. Writes results/sampled_loss.json.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from benchmarks import record
from benchmarks.streamed_loss import CHUNK, SEED, USERS, Problem, compiled, random_items, time_steps
from simgr_jax.models.simgr import SAMPLED_FROM
from simgr_jax.ops.sampled_loss import (
    Negatives,
    cumulative_weights,
    popularity_negatives,
    sampled_cross_entropy,
    uniform_negatives,
)
from simgr_jax.ops.similarity_loss import in_batch_cross_entropy

ENCODER, NEGATIVES = "mean_mlp", 4096
# Catalog sizes, and the number of timed rounds for each.
ROUNDS = {100_000: 9, 1_000_000: 5, 10_000_000: 1}
TRAINED_NEGATIVES = (64, 256, 1024)
KEPT = ("NDCG@10", "NDCG@10/ci95_low", "NDCG@10/ci95_high", "HR@10", "coverage@10")


def times(num_items: int, rounds: int) -> dict[str, float]:
    """The minimum seconds per step with each loss, and the process's peak memory."""
    problem = Problem(ENCODER)
    tokens, targets = random_items(num_items)
    cumulative = jnp.asarray(cumulative_weights(np.random.default_rng(SEED).zipf(1.5, num_items).clip(max=10**6)))
    key = jax.random.key(SEED)
    functions = {
        "sampled_uniform": (sampled(problem, lambda key: uniform_negatives(key, num_items, NEGATIVES)), key),
        "sampled_popularity": (
            sampled(problem, lambda drawn: popularity_negatives(drawn[0], drawn[1], NEGATIVES)),
            (key, cumulative),
        ),
        "in_batch": (partial(in_batch, problem), jnp.zeros(USERS)),
        "streamed": (problem.streamed,),
    }
    steps = {}
    for name, (loss, *others) in functions.items():
        step = compiled(loss, problem.learned, num_items, *others)
        steps[name] = partial(step, problem.learned, tokens, targets, *others)
    seconds = time_steps(steps, rounds)
    figures = {f"{name}_seconds": round(min(values), 4) for name, values in seconds.items()}
    # Linux gives kilobytes.
    return figures | {"peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)}


def sampled(problem: Problem, draw: Callable[..., Negatives]) -> Callable:
    def loss(learned, tokens, targets, drawn_from):
        parameters, users, temperature = problem.with_tables(learned)
        negatives = draw(drawn_from)
        vectors, negative_vectors = (problem.encode(parameters, tokens[items]) for items in (targets, negatives.items))
        losses = sampled_cross_entropy(users, vectors, targets, negatives, negative_vectors, len(tokens), temperature)
        return losses.mean()

    return loss


def in_batch(
    problem: Problem, learned: tuple, tokens: Int[Array, "N L"], targets: Int[Array, " B"], log_q: Float[Array, " B"]
) -> Float[Array, ""]:
    parameters, users, temperature = problem.with_tables(learned)
    vectors = problem.encode(parameters, tokens[targets])
    return in_batch_cross_entropy(users, vectors, targets, jnp.ones(USERS), temperature, log_q).mean()


def accuracies() -> dict[str, dict[str, float]]:
    """The quickstart's validation metrics with each loss."""
    losses = {"full_catalog": {}, "in_batch": {"in_batch_weight": 1.0}}
    for sampled_from in SAMPLED_FROM:
        for count in TRAINED_NEGATIVES:
            options = {"sampled_weight": 1.0, "sampled_negatives": count, "sampled_from": sampled_from}
            losses[f"sampled_{sampled_from}_{count}"] = options
    return {name: train(name, options) for name, options in losses.items()}


def train(name: str, options: dict[str, object]) -> dict[str, float]:
    workdir = Path("workdirs/sampled_loss") / name
    if options:
        options = {"full_catalog_weight": 0.0} | options
    flags = ["--config=configs/quickstart.py", "--config.cache_dir=workdirs/sampled_loss/cache"]
    flags += [f"--config.simgr.{key}={value}" for key, value in options.items()]
    # No early stopping, so that all losses train for the same number of epochs.
    flags += ["--config.training.patience=1000", f"--workdir={workdir}"]
    for command in (["simgr_jax.train", *flags], ["simgr_jax.evaluate", f"--workdir={workdir}", "--split=validation"]):
        subprocess.run([sys.executable, "-m", *command], check=True)
    metrics = json.loads((workdir / "report_validation" / "metrics.json").read_text(encoding="utf-8"))
    return {key: round(metrics[key], 4) for key in KEPT}


def main() -> None:
    config = {"encoder": ENCODER, "users": USERS, "negatives": NEGATIVES, "chunk": CHUNK}
    figures = {"time": {}}
    for num_items, rounds in ROUNDS.items():
        figures["time"][num_items] = times(num_items, rounds)
        print(num_items, figures["time"][num_items], flush=True)
    figures["accuracy"] = accuracies()
    record.write("sampled_loss", figures, config, SEED)


if __name__ == "__main__":
    main()
