"""Writes an LLM's first layers, or its shape with random weights, as a folder for `config.backbone.checkpoint`.

    python -m benchmarks.llm_variant --checkpoint=LLM --output=DIR [--layers=6] [--random]

LLM is a folder or a GGUF file. configs/compare_llm.py says what such models are for: a random twin shows what
pretraining is worth, and the first layers what depth is worth. Needs torch (`make torch`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="a folder or a GGUF file")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    parser.add_argument("--layers", type=int, help="how many of the first layers; all by default")
    parser.add_argument("--random", action="store_true", help="draws all weights at random, with seed 0")
    args = parser.parse_args()
    path, options = args.checkpoint, {}
    if path.is_file():
        path, options = path.parent, {"gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(path, **options)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options)
    # The weights are not quantized any more.
    model.hf_quantizer, model.is_quantized = None, False
    model.config.__dict__.pop("quantization_config", None)
    if args.layers:
        # The names of the decoders of Llama, Qwen and most others.
        model.model.layers = model.model.layers[: args.layers]
        model.config.num_hidden_layers = args.layers
        if getattr(model.config, "layer_types", None):
            model.config.layer_types = model.config.layer_types[: args.layers]
    if args.random:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    model.to(torch.bfloat16).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
