"""Host memory and time of loading a 2 GB checkpoint.

    python -m benchmarks.load_checkpoint

writes results/load_checkpoint.json. The checkpoint (a Llama with random weights, one shard per layer) is generated
first, untimed. For each pair of dtypes, three processes then load it, one at a time; the figures are their median time
and maximum memory. Loading does the same as training: it copies the decoder's weights to the device, and reads the
whole embedding to initialise the new tokens. The files were just written, so they are read from the system's cache.

"Beyond the parameters" is the process's peak memory minus its memory after all imports and JAX's start, and minus the
parameters if they are in host memory as well.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import record

WIDTH, HEADS, KV_HEADS, HEAD_WIDTH, MLP_WIDTH, VOCABULARY = 1024, 16, 8, 64, 4096, 32_768
BYTES = {"float32": 4, "bfloat16": 2}
ROUNDS = 3
DTYPES = (("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16"))


def layer_shapes() -> dict[str, tuple[int, ...]]:
    query, key = HEADS * HEAD_WIDTH, KV_HEADS * HEAD_WIDTH
    return {
        "input_layernorm.weight": (WIDTH,),
        "self_attn.q_proj.weight": (query, WIDTH),
        "self_attn.k_proj.weight": (key, WIDTH),
        "self_attn.v_proj.weight": (key, WIDTH),
        "self_attn.o_proj.weight": (WIDTH, query),
        "post_attention_layernorm.weight": (WIDTH,),
        "mlp.gate_proj.weight": (MLP_WIDTH, WIDTH),
        "mlp.up_proj.weight": (MLP_WIDTH, WIDTH),
        "mlp.down_proj.weight": (WIDTH, MLP_WIDTH),
    }


def generate(folder: Path, dtype: str, gigabytes: float, seed: int) -> None:
    """Writes a checkpoint of about `gigabytes`, with as many layers as that takes."""
    import ml_dtypes
    from safetensors.numpy import save_file
    from transformers import LlamaConfig

    rng = np.random.default_rng(seed)
    shards = {"outside": {"model.embed_tokens.weight": (VOCABULARY, WIDTH), "model.norm.weight": (WIDTH,)}}
    layer_bytes = BYTES[dtype] * sum(map(math.prod, layer_shapes().values()))
    layers = round((gigabytes * 1e9 - BYTES[dtype] * VOCABULARY * WIDTH) / layer_bytes)
    for layer in range(layers):
        shards[str(layer)] = {f"model.layers.{layer}.{name}": shape for name, shape in layer_shapes().items()}
    weight_map = {}
    for shard, shapes in shards.items():
        file = f"model-{shard}.safetensors"
        tensors = {name: 0.02 * rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
        save_file(
            {name: x.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype) for name, x in tensors.items()},
            folder / file,
        )
        weight_map |= dict.fromkeys(shapes, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    LlamaConfig(
        hidden_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_WIDTH,
        intermediate_size=MLP_WIDTH,
        vocab_size=VOCABULARY,
    ).save_pretrained(folder)
    os.sync()  # Otherwise the disk would still be writing it during the loading.


def load(folder: Path, param_dtype: str) -> dict[str, float]:
    """Loads the checkpoint in this process and returns the figures."""
    import jax
    from flax import nnx
    from transformers import AutoConfig  # noqa: F401, so that opening the checkpoint does not import it

    from simgr_jax.huggingface import families
    from simgr_jax.huggingface.checkpoint import Checkpoint
    from simgr_jax.huggingface.load_weights import embedding_statistics, load_transformer

    on_host = jax.numpy.zeros(()).device.platform == "cpu"
    baseline = _resident_bytes()
    start = time.perf_counter()
    checkpoint = Checkpoint(folder)
    config = families.transformer_config(checkpoint.config, max_length=512)
    parameters = nnx.state(load_transformer(checkpoint, config, param_dtype))
    embedding_statistics(checkpoint)
    jax.block_until_ready(parameters)
    seconds = time.perf_counter() - start
    # Linux gives kilobytes. A process inherits its parent's peak, so the checkpoint is generated in a separate process.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    parameter_bytes = sum(x.nbytes for x in jax.tree.leaves(parameters))
    return {
        "parameters": sum(x.size for x in jax.tree.leaves(parameters)),
        "parameters_gb": parameter_bytes / 1e9,
        "seconds": seconds,
        "baseline_gb": baseline / 1e9,
        "peak_gb": peak / 1e9,
        "beyond_parameters_gb": (peak - baseline - parameter_bytes * on_host) / 1e9,
    }


def _resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmRSS in /proc/self/status")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--step", choices=("generate", "load"), help=argparse.SUPPRESS)
    parser.add_argument("--dir", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step == "generate":
        generate(args.dir, args.dtype, args.gigabytes, args.seed)
    elif args.step == "load":
        print(json.dumps(load(args.dir, args.dtype)))
    else:
        _measure(args)


def _measure(args: argparse.Namespace) -> None:
    figures = {}
    for in_file in BYTES:
        with tempfile.TemporaryDirectory() as folder:
            _step("generate", folder, in_file)
            checkpoint_gb = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")) / 1e9
            largest_gb = BYTES[in_file] * VOCABULARY * WIDTH / 1e9
            for dtype in (dtype for source, dtype in DTYPES if source == in_file):
                runs = [json.loads(_step("load", folder, dtype)) for _ in range(ROUNDS)]
                figure = max(runs, key=lambda run: run["beyond_parameters_gb"])
                figure["seconds"] = statistics.median(run["seconds"] for run in runs)
                figure |= {"checkpoint_gb": checkpoint_gb, "largest_tensor_gb": largest_gb}
                figure["limit_gb"] = 0.1 * checkpoint_gb + largest_gb
                figure["gb_per_second"] = checkpoint_gb / figure["seconds"]
                figures[f"{in_file} to {dtype}"] = {name: round(value, 3) for name, value in figure.items()}
    config = {"gigabytes": args.gigabytes, "width": WIDTH, "mlp_width": MLP_WIDTH, "vocabulary": VOCABULARY}
    path = record.write("load_checkpoint", figures, config, args.seed)
    print(json.dumps(figures, indent=2), f"written to {path.relative_to(record.ROOT)}", sep="\n")


def _step(name: str, folder: str, dtype: str) -> str:
    command = [sys.executable, "-m", "benchmarks.load_checkpoint", *sys.argv[1:]]
    command += ["--step", name, "--dir", folder, "--dtype", dtype]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    main()
