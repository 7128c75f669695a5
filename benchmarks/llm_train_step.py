"""Time and peak memory of a train step of a 0.5B LLM backbone, in this library and in torch + Transformers.

    python -m benchmarks.llm_train_step [--rows=8] [--row_length=64]

Both train all weights of Qwen2.5-0.5B's decoder in float32 on the same batch: full rows of semantic-ID tokens, four per
item, without text or padding. The state after each item is scored against the whole catalog by cosine similarity with
the mean of each item's token embeddings. Gradients are clipped, and the optimizer is AdamW. The two run in alternating
processes. Writes results/llm_train_step.json. Needs torch and Transformers (`make torch`).
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
from transformers import Qwen2Config

from benchmarks import record

ROUNDS, WARM_UP, STEPS = 3, 1, 3
ITEMS, LEVELS, CODES = 10_000, 4, 256
TEMPERATURE, LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM = 0.07, 1e-4, 0.01, 1.0

# https://huggingface.co/Qwen/Qwen2.5-0.5B/blob/main/config.json, with the semantic-ID tokens as its vocabulary.
QWEN = Qwen2Config(
    vocab_size=LEVELS * CODES,
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    max_position_embeddings=32768,
    rms_norm_eps=1e-6,
    rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
)


def make_data(rows: int, row_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The catalog's tokens [N, L], the items in each row [B, T / L], and the target after each item [B, T / L]."""
    generator = np.random.default_rng(0)
    catalog = generator.integers(0, CODES, (ITEMS, LEVELS)) + CODES * np.arange(LEVELS)
    items = generator.integers(0, ITEMS, (rows, row_length // LEVELS + 1))
    return catalog.astype(np.int32), items[:, :-1], items[:, 1:]


def jax_step(rows: int, row_length: int) -> Callable[[], float]:
    """A function that trains one step and returns the loss."""
    import jax
    from flax import nnx

    from simgr_jax import default_config
    from simgr_jax.data.dataset import Sequences
    from simgr_jax.huggingface.families import transformer_config
    from simgr_jax.inputs.batch import TrainBatch
    from simgr_jax.models.model_inputs import Backbone, ModelInputs
    from simgr_jax.models.registry import create
    from simgr_jax.models.transformer import Transformer
    from simgr_jax.semantic_ids.codes import SemanticIds
    from simgr_jax.training import optimizer as optimizers
    from simgr_jax.training.state import create_state, make_train_step

    catalog, items, targets = make_data(rows, row_length)
    config = default_config.get_config()
    config.simgr.update({"history": "tokens", "item_encoder": "mean", "temperature": TEMPERATURE, "readout": "state"})
    config.optimizer.update(
        {"learning_rate": LEARNING_RATE, "weight_decay": WEIGHT_DECAY, "clip_norm": CLIP_NORM, "warmup_fraction": 0.0}
    )
    backbone = Transformer(transformer_config(QWEN, max_length=row_length), nnx.Rngs(0))
    codes = catalog - CODES * np.arange(LEVELS, dtype=np.int32)
    semantic_ids = SemanticIds(codes, (CODES,) * LEVELS)
    rngs, nobody = nnx.Rngs(config.seed), Sequences.from_lists([])
    model = create(config, ModelInputs(ITEMS, semantic_ids, nobody, lambda: Backbone(backbone), rngs))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    optimizer = optimizers.create(config, steps_per_epoch=1000)
    state = create_state(params, optimizer, 0.0)
    step = make_train_step(graphdef, optimizer, 0.0, 0, state)
    del model, backbone, params

    positions = np.tile(np.arange(row_length, dtype=np.int32), (rows, 1))
    readouts = np.tile(np.arange(LEVELS - 1, row_length, LEVELS, dtype=np.int32), (rows, 1))
    batch = TrainBatch(
        inputs=catalog[items].reshape(rows, row_length),
        segment_ids=np.ones_like(positions),
        positions=positions,
        readouts=readouts,
        last_items=items.reshape(readouts.shape).astype(np.int32),
        targets=targets.astype(np.int32),
        valid=np.ones(targets.shape, bool),
    )

    def run() -> float:
        nonlocal state
        state, scalars = step(state, rest, batch)
        return float(jax.block_until_ready(scalars["loss"]))

    return run


def torch_step(rows: int, row_length: int) -> Callable[[], float]:
    """Like `jax_step`, in torch."""
    import torch
    from transformers import Qwen2Model

    catalog, items, targets = (torch.tensor(array, dtype=torch.long) for array in make_data(rows, row_length))
    torch.manual_seed(0)
    model = Qwen2Model(QWEN).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    inputs, targets = catalog[items].reshape(rows, row_length), targets.reshape(-1)

    def run() -> float:
        hidden = model(input_ids=inputs, use_cache=False).last_hidden_state
        users = torch.nn.functional.normalize(hidden[:, LEVELS - 1 :: LEVELS].reshape(len(targets), -1), dim=-1)
        vectors = torch.nn.functional.normalize(model.embed_tokens.weight[catalog].mean(dim=1), dim=-1)
        loss = torch.nn.functional.cross_entropy(users @ vectors.T / TEMPERATURE, targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        return loss.item()

    return run


STEP_MAKERS = {"ours": jax_step, "torch": torch_step}


def measure(name: str, rows: int, row_length: int) -> dict[str, float]:
    run = STEP_MAKERS[name](rows, row_length)
    seconds, losses = [], []
    for _ in range(WARM_UP + STEPS):
        began = time.monotonic()
        losses.append(run())
        seconds.append(time.monotonic() - began)
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": statistics.median(seconds[WARM_UP:]), "peak_gib": peak_gib, "loss": losses[-1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--row_length", type=int, default=64)
    parser.add_argument("--measure", choices=STEP_MAKERS, help="print one measurement; used by the benchmark itself")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.rows, args.row_length)))
        return
    rounds = {name: [] for name in STEP_MAKERS}
    for _ in range(ROUNDS):
        for name in STEP_MAKERS:
            command = [sys.executable, "-m", "benchmarks.llm_train_step", *sys.argv[1:], f"--measure={name}"]
            result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rounds[name].append(json.loads(result.stdout.splitlines()[-1]))
            print(name, rounds[name][-1], flush=True)
    figures = {
        f"{name}_{key}": statistics.median(one[key] for one in measured)
        for name, measured in rounds.items()
        for key in ("seconds", "peak_gib", "loss")
    }
    pairs = zip(rounds["torch"], rounds["ours"], strict=True)
    figures |= {
        "rounds": rounds,
        "torch_over_ours_seconds": statistics.median(a["seconds"] / b["seconds"] for a, b in pairs),
    }
    print({key: value for key, value in figures.items() if key != "rounds"})
    settings = {"rows": args.rows, "row_length": args.row_length, "items": ITEMS, "dtype": "float32"}
    record.write("llm_train_step", figures | versions(), settings, seed=0)


def versions() -> dict[str, str]:
    import torch
    import transformers

    return {"torch_version": torch.__version__, "transformers_version": transformers.__version__}


if __name__ == "__main__":
    main()
