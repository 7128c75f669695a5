"""Time and peak memory of a LoRA train step and of a forward pass of a pretrained LLM, here and in torch with PEFT.

    python -m benchmarks.llm_lora_step --checkpoint=DIR [--rows=4] [--row_length=250]

Both train adapters of rank 16 on all projections, and the embeddings of the semantic-ID tokens, on the same batch:
full rows of items, each five tokens long (four codes and a word of the LLM's). The state after each item is scored
against the whole catalog by cosine similarity with the mean of each item's token embeddings. Gradients are clipped, and
the optimizer is AdamW. The frozen weights have the type of the computation; adapters and their optimizer are float32.
The forward pass makes the hidden states of the same batch. The two run in alternating processes, one per type and
round, and their first losses must agree. Writes results/llm_lora_step.json. Needs torch, Transformers (`make torch`)
and PEFT. --dtypes leaves one out: without bfloat16 units, torch takes minutes for a step of it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks import record

ROUNDS, WARM_UP, STEPS = 3, 2, 5
DTYPES = ("bfloat16", "float32")
ITEMS, LEVELS, CODES = 3_541, 4, 256
WORD = 216  # Any token of the LLM's; it comes before each item.
# glibc keeps freed memory. By default it gives large blocks back, and where page faults are slow, torch's steps then
# take several times as long.
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_TOP_PAD_": str(2**28)}
TEMPERATURE, LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM = 0.07, 1e-3, 0.01, 1.0
LORA = {"rank": 16, "alpha": 32.0, "dropout": 0.0}


class Task(NamedTuple):
    """What both train on.

    Attributes:
      embedding: float32 [V, D], the first embeddings of the semantic-ID tokens.
      catalog: the items' tokens [N, L].
      items: the items in each row [B, R], which have the places 4, 9, 14, ...
      targets: the item after each of them.
    """

    embedding: np.ndarray
    catalog: np.ndarray
    items: np.ndarray
    targets: np.ndarray


def make_task(width: int, rows: int, row_length: int) -> Task:
    generator = np.random.default_rng(0)
    embedding = generator.normal(0, 0.1, (LEVELS * CODES, width)).astype(np.float32)
    catalog = generator.integers(0, CODES, (ITEMS, LEVELS), np.int32) + CODES * np.arange(LEVELS, dtype=np.int32)
    items = generator.integers(0, ITEMS, (rows, row_length // (LEVELS + 1) + 1), np.int32)
    return Task(embedding, catalog, items[:, :-1], items[:, 1:])


class Program(NamedTuple):
    """step trains once and returns the loss; forward makes the hidden states of the batch."""

    step: Callable[[], float]
    forward: Callable[[], None]


def our_program(checkpoint: Path, dtype: str, rows: int, row_length: int) -> Program:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from simgr_jax.config_files import load_run_config
    from simgr_jax.data.dataset import Sequences
    from simgr_jax.huggingface.checkpoint import Checkpoint
    from simgr_jax.huggingface.load_weights import load_transformer, read_embedding_rows
    from simgr_jax.huggingface.pretrained import backbone_config, base_dtype
    from simgr_jax.inputs.batch import TrainBatch
    from simgr_jax.models.model_inputs import Backbone, ModelInputs
    from simgr_jax.models.registry import create
    from simgr_jax.semantic_ids.codes import SemanticIds
    from simgr_jax.training import optimizer as optimizers
    from simgr_jax.training.state import create_state, make_train_step

    values = {"backbone.checkpoint": str(checkpoint), "backbone.dtype": dtype, "lora.base_dtype": dtype}
    values |= {f"lora.{key}": value for key, value in LORA.items()}
    values |= {"simgr.history": "tokens", "simgr.item_text": "none", "simgr.repeat_bias": False}
    values |= {"simgr.item_encoder": "mean", "simgr.temperature": TEMPERATURE, "simgr.readout": "state"}
    for group in ("optimizer", "optimizer.backbone"):
        values |= {f"{group}.learning_rate": LEARNING_RATE, f"{group}.weight_decay": WEIGHT_DECAY}
        values |= {f"{group}.clip_norm": CLIP_NORM, f"{group}.warmup_fraction": 0.0}
    config = load_run_config("llm", values)
    files = Checkpoint(checkpoint)
    shape = backbone_config(files.config, config, row_length)
    task = make_task(shape.width, rows, row_length)
    codes = task.catalog - CODES * np.arange(LEVELS, dtype=np.int32)
    backbone = Backbone(
        load_transformer(files, shape, base_dtype(config)),
        task.embedding,
        jnp.asarray(read_embedding_rows(files, [WORD]), dtype),
    )
    semantic_ids, nobody = SemanticIds(codes, (CODES,) * LEVELS), Sequences.from_lists([])
    model = create(config, ModelInputs(ITEMS, semantic_ids, nobody, lambda: backbone, nnx.Rngs(config.seed)))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    optimizer = optimizers.create(config, steps_per_epoch=1000)
    state = create_state(params, optimizer, 0.0)
    train_step = make_train_step(graphdef, optimizer, 0.0, 0, state)
    del model, backbone, params

    words = np.full((*task.items.shape, 1), len(task.embedding), np.int32)
    inputs = np.concatenate([words, task.catalog[task.items]], axis=-1).reshape(rows, row_length)
    positions = np.tile(np.arange(row_length, dtype=np.int32), (rows, 1))
    readouts = np.tile(np.arange(LEVELS, row_length, LEVELS + 1, dtype=np.int32), (rows, 1))
    valid = np.ones(task.targets.shape, bool)
    batch = TrainBatch(inputs, np.ones_like(positions), positions, readouts, task.items, task.targets, valid)
    train_step = train_step.lower(state, rest, batch).compile()

    def step() -> float:
        nonlocal state
        state, scalars = train_step(state, rest, batch)
        return float(scalars["loss"])

    @jax.jit
    def states(params, rest, batch):
        model = nnx.merge(graphdef, params, rest)
        return model.user_states(batch.inputs, batch.segment_ids, batch.positions, None)

    return Program(step, lambda: jax.block_until_ready(states(state.params, rest, batch)))


def torch_program(checkpoint: Path, dtype: str, rows: int, row_length: int) -> Program:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel

    torch.manual_seed(0)
    llm = AutoModel.from_pretrained(checkpoint, dtype=getattr(torch, dtype))
    word = llm.get_input_embeddings().weight[WORD].detach().clone()
    task = make_task(llm.config.hidden_size, rows, row_length)
    targets = [name for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")]
    adapters = LoraConfig(
        r=LORA["rank"], lora_alpha=LORA["alpha"], lora_dropout=LORA["dropout"], target_modules=targets
    )
    model = get_peft_model(llm, adapters).train()
    embedding = torch.nn.Parameter(torch.tensor(task.embedding))
    trained = [embedding, *(parameter for parameter in model.parameters() if parameter.requires_grad)]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    catalog, items, targets = (torch.tensor(array, dtype=torch.long) for array in task[1:])

    def hidden() -> torch.Tensor:
        codes = embedding[catalog[items]].to(word.dtype)
        inputs = torch.cat([word.expand(*items.shape, 1, -1), codes], dim=2).reshape(rows, row_length, -1)
        return model(inputs_embeds=inputs, use_cache=False).last_hidden_state

    def step() -> float:
        states = hidden()[:, LEVELS :: LEVELS + 1].reshape(targets.numel(), -1).float()
        users = torch.nn.functional.normalize(states, dim=-1)
        vectors = torch.nn.functional.normalize(embedding[catalog].mean(dim=1), dim=-1)
        loss = torch.nn.functional.cross_entropy(users @ vectors.T / TEMPERATURE, targets.reshape(-1))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP_NORM)
        optimizer.step()
        return loss.item()

    return Program(step, torch.no_grad()(hidden))


PROGRAMS = {"ours": our_program, "torch": torch_program}


def measure(name: str, dtype: str, args: argparse.Namespace) -> dict[str, float]:
    program = PROGRAMS[name](args.checkpoint, dtype, args.rows, args.row_length)
    losses = []
    figures = _times(lambda: losses.append(program.step()))
    # Before the forward pass is compiled and run, so it is the training's own.
    figures["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    figures |= {f"forward_{key}": value for key, value in _times(program.forward).items()}
    return figures | {"first_loss": losses[0], "last_loss": losses[-1]}


def _times(run: Callable[[], None]) -> dict[str, float]:
    """Median wall and CPU seconds of STEPS calls after WARM_UP calls."""
    times = []
    for _ in range(WARM_UP + STEPS):
        began = time.monotonic(), time.process_time()
        run()
        times.append((time.monotonic() - began[0], time.process_time() - began[1]))
    seconds, cpu_seconds = map(statistics.median, zip(*times[WARM_UP:], strict=True))
    return {"seconds": seconds, "cpu_seconds": cpu_seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="a folder with an LLM, like SmolLM2-135M")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--row_length", type=int, default=250, help=f"tokens per row, a multiple of {LEVELS + 1}")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--measure", nargs=2, help="print one measurement; used by the benchmark itself")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(*args.measure, args)))
        return
    figures = {dtype: compare(dtype) for dtype in args.dtypes}
    settings = {"checkpoint": args.checkpoint.name, "rows": args.rows, "row_length": args.row_length, "items": ITEMS}
    record.write("llm_lora_step", figures | versions(), settings | {"lora": LORA}, seed=0)


def compare(dtype: str) -> dict[str, object]:
    """Medians over ROUNDS of alternating processes, and medians of each round's ratios."""
    rounds = {name: [] for name in PROGRAMS}
    for _ in range(ROUNDS):
        for name in PROGRAMS:
            command = [sys.executable, "-m", "benchmarks.llm_lora_step", *sys.argv[1:], "--measure", name, dtype]
            environment = os.environ | MALLOC
            result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            rounds[name].append(json.loads(result.stdout.splitlines()[-1]))
            print(dtype, name, rounds[name][-1], flush=True)
    ours, torch = rounds["ours"], rounds["torch"]
    np.testing.assert_allclose(ours[0]["first_loss"], torch[0]["first_loss"], rtol=1e-4 if dtype == "float32" else 2e-2)
    keys = ("seconds", "cpu_seconds", "peak_gib", "forward_seconds", "forward_cpu_seconds")
    ratios = {
        f"ours_over_torch_{key}": statistics.median(a[key] / b[key] for a, b in zip(ours, torch, strict=True))
        for key in keys
    }
    print(dtype, ratios, flush=True)
    medians = {
        f"{name}_{key}": statistics.median(one[key] for one in measured)
        for name, measured in rounds.items()
        for key in (*keys, "first_loss", "last_loss")
    }
    return ratios | medians | {"rounds": rounds}


def versions() -> dict[str, str]:
    import peft
    import torch
    import transformers

    return {
        "torch_version": torch.__version__,
        "transformers_version": transformers.__version__,
        "peft_version": peft.__version__,
    }


if __name__ == "__main__":
    main()
