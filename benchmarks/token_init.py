"""Compares the initial embeddings of new semantic-ID tokens: around the mean of the LLM's, or from their items' words.

    python -m benchmarks.token_init --encoder=DIR [--config=configs/llm.py:full --config.data.path=DIR ...]

Trains the config with each `config.backbone.token_init` and writes the validation metrics of every evaluation to
results/token_init.json. Both runs have the same backbone: a small decoder with random layers, and the pretrained word
embeddings and tokenizer of a BERT-like encoder (--encoder is its folder in the layout of sentence-transformers). Its
word embeddings carry meaning; everything else is learned.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from absl import flags
from safetensors.numpy import load_file, save_file
from transformers import SmolLM3Config

from benchmarks import record
from simgr_jax import cli
from simgr_jax.huggingface.token_init import TOKEN_INITS
from simgr_jax.run import Run

LAYERS, HEADS, SEED = 3, 6, 0
KEPT = ("HR@10", "NDCG@10", "coverage@10")


def make_checkpoint(encoder: Path, folder: Path) -> None:
    """Writes a decoder with the encoder's word embeddings."""
    folder.mkdir(parents=True, exist_ok=True)
    [embedding] = [x for name, x in load_file(encoder / "model.safetensors").items() if "word_embeddings" in name]
    vocabulary, width = embedding.shape
    config = SmolLM3Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    config.save_pretrained(folder)
    tensors = {"model.embed_tokens.weight": embedding.astype(np.float32), "model.norm.weight": np.ones(width)}
    generator = np.random.default_rng(SEED)
    shapes = {f"self_attn.{name}_proj": (width, width) for name in "qkvo"}
    shapes |= {
        "mlp.gate_proj": (4 * width, width),
        "mlp.up_proj": (4 * width, width),
        "mlp.down_proj": (width, 4 * width),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        for name, shape in shapes.items():
            tensors[f"{prefix}.{name}.weight"] = generator.normal(0, 0.02, shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{name}.weight"] = np.ones(width)
    save_file({name: x.astype(np.float32) for name, x in tensors.items()}, folder / "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(encoder / name, folder / name)


def main() -> None:
    cli.required("config")
    workdir = Path("workdirs/token_init")
    make_checkpoint(cli.required_path("encoder"), workdir / "backbone")
    figures = {}
    for init in TOKEN_INITS:
        train = [arg for arg in sys.argv[1:] if arg.startswith("--config")]
        train += [
            f"--workdir={workdir / init}",
            f"--config.backbone.checkpoint={workdir / 'backbone'}",
            f"--config.backbone.token_init={init}",
            f"--config.cache_dir={workdir / 'cache'}",
        ]
        subprocess.run([sys.executable, "-m", "simgr_jax.train", *train], check=True)
        log = [json.loads(line) for line in (workdir / init / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        figures[init] = [
            {"step": line["step"]} | {name: line[f"validation/{name}"] for name in KEPT}
            for line in log
            if "validation/NDCG@10" in line
        ]
        print(init, figures[init][-1])
    config = Run.load(workdir / TOKEN_INITS[0]).config
    record.write("token_init", figures, record.settings(config), config.seed)


if __name__ == "__main__":
    cli.define_config()
    flags.DEFINE_string("encoder", None, "The folder of an encoder with safetensors weights and a fast tokenizer.")
    cli.run(main)
