"""An export is the same model and the same tokenizer in Transformers 4.57 as in 5.

Slow: Transformers 4.57 is installed into an environment of its own (tests/conftest.py, `transformers_4`).
"""

import json
import shutil
import subprocess
import sys

import make_golden
import numpy as np
import pytest
from make_golden import GOLDEN, LENGTHS, VOCABULARY, Case
from safetensors.numpy import load_file
from test_save_weights import NEW, hidden, rows, tokenizer, trained
from tokenizers import AddedToken

from simgr_jax.huggingface import export_config, families, save_weights
from simgr_jax.huggingface.checkpoint import Checkpoint
from simgr_jax.huggingface.llm_tokenizer import load_tokenizer, save_tokenizer
from simgr_jax.huggingface.load_weights import embedding_name, load_transformer
from tests.inputs import llm_tokenizers
from tests.inputs.test_item_texts import SPELLED, tokens_of
from tests.inputs.test_item_texts import read as read_titles

pytestmark = pytest.mark.slow

LONG = {"short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [1.2, 4.0, 5.0, 7.0], "factor": 4.0, "rope_theta": 100.0}
ROPES = {
    "default": {"rope_theta": 50.0},
    "linear": {"factor": 3.0, "rope_theta": 100.0},
    "llama3": {
        "rope_theta": 100.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 2.5,
        "original_max_position_embeddings": 20,
    },
    "yarn": {
        "rope_theta": 100.0,
        "factor": 4.0,
        "beta_fast": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 0.3,
        "original_max_position_embeddings": 20,
    },
    "longrope": LONG | {"original_max_position_embeddings": 30},
    "longrope, long": LONG | {"original_max_position_embeddings": 9},
    "proportional": {"partial_rotary_factor": 0.5, "factor": 2.0, "rope_theta": 50.0},
}
FAMILIES = {
    "Llama": {},
    "Mistral": {},
    "Qwen2": {},
    "Qwen3": {},
    "Qwen3Moe": {"moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2},
    "Gemma2": {"attn_logit_softcapping": 2.0, "sliding_window": 5},
    "Gemma3": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "SmolLM3": {"no_rope_layers": [0, 1]},
    "Lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
}
# What a checkpoint says of its head: its name among the goldens, and changes of its config.
HEADS = {
    "untied": ("mistral", {}),
    "untied, without a head": ("qwen2_window_yarn", {}),
    "tied": ("qwen2", {}),
    "tied, with a head": ("mistral", {"tie_word_embeddings": True}),
    "GPT-2's": ("gpt2", {}),
    "of a multimodal model": ("gemma3", {}),
}


def read_by(python, folders):
    """Lets the Transformers of an interpreter read the folders."""
    program = f"{__file__.rpartition('/')[0]}/read_exports.py"
    subprocess.run([python, program, *map(str, folders)], check=True, capture_output=True, text=True)


def request(folder, ids=(), texts=(), load=""):
    (folder / "request.json").write_text(
        json.dumps({"load": load, "ids": [list(map(int, row)) for row in ids], "texts": list(texts)})
    )


def answers(folder, versions=("4", "5")):
    for version in versions:
        arrays = np.load(folder / f"answer-{version}.npz") if (folder / f"answer-{version}.npz").exists() else {}
        yield json.loads((folder / f"answer-{version}.json").read_text()), dict(arrays)


@pytest.fixture(scope="module")
def read_by_both(transformers_4):
    def read(folders):
        for python in (transformers_4, sys.executable):
            read_by(python, folders)

    return read


def export(source, folder, backbone=None):
    """Exports the checkpoint in `source`; returns it and its decoder."""
    folder.mkdir(parents=True)
    checkpoint = Checkpoint(source)
    if backbone is None:
        config = families.transformer_config(checkpoint.config, max_length=LENGTHS[0])
        backbone = load_transformer(checkpoint, config, "float32")
    tokens = save_weights.TrainedTokens(NEW, rows(len(NEW)))
    save_weights.save_finetuned(folder, checkpoint, backbone, tokenizer(), tokens)
    return checkpoint, backbone


def loading(checkpoint):
    return export_config.loading(families.text_config(checkpoint.config)).code("folder")


def test_every_family_with_every_rope_type_has_the_states_of_its_checkpoint(tmp_path, read_by_both):
    import torch

    ids, expected = np.random.default_rng(0).integers(1, VOCABULARY, (2, LENGTHS[0])), {}
    for family, options in FAMILIES.items():
        for name, parameters in ROPES.items():
            parameters = {"rope_type": name.split(",")[0]} | parameters
            if family == "Gemma3":
                local = {"rope_type": "default", "rope_theta": 70.0}
                parameters = {"full_attention": parameters, "sliding_attention": local}
            config = {"head_dim": 8, "max_position_embeddings": 64, "rope_parameters": parameters} | options
            model = make_golden.make_model(Case(f"{family}ForCausalLM", config), seed=3)
            model.save_pretrained(tmp_path / "in" / family / name)
            folder = tmp_path / "out" / f"{family}, {name}"
            checkpoint, _ = export(tmp_path / "in" / family / name, folder)
            request(folder, ids, load=loading(checkpoint))
            with torch.no_grad():
                expected[folder] = [
                    model.base_model(torch.tensor(row[None])).last_hidden_state[0].numpy() for row in ids
                ]
    read_by_both(expected)
    for folder, states in expected.items():
        for answer, arrays in answers(folder):
            assert not answer["report"], folder.name
            np.testing.assert_allclose(arrays["states"], np.concatenate(states), rtol=0, atol=1e-4, err_msg=folder.name)


def since(checkpoint):
    return export_config.loading(families.text_config(checkpoint.config)).since


def test_the_models_that_need_a_newer_version_are_those_that_4_57_does_not_know(transformers_4):
    program = "from transformers import CONFIG_MAPPING; print(*CONFIG_MAPPING)"
    known = subprocess.run([transformers_4, "-c", program], check=True, capture_output=True, text=True).stdout.split()
    for name in make_golden.CASES:
        checkpoint = Checkpoint(GOLDEN / name)
        kind = families.text_config(checkpoint.config).model_type
        assert (since(checkpoint) == "4.57") == (kind in known), name


def test_what_was_trained_of_every_checkpoint_has_the_states_of_training(tmp_path, read_by_both):
    """With adapters, new tokens, and every layout and particular of the goldens that 4.57 knows. The others are in
    test_save_weights.py."""
    ids, expected = np.random.default_rng(2).integers(0, VOCABULARY + len(NEW), (2, LENGTHS[0])), {}
    for name in make_golden.CASES:
        if since(Checkpoint(GOLDEN / name)) != "4.57":
            continue
        backbone = trained(Checkpoint(GOLDEN / name))
        checkpoint, _ = export(GOLDEN / name, tmp_path / name, backbone)
        request(tmp_path / name, ids, load=loading(checkpoint))
        table = np.concatenate([checkpoint.read(embedding_name(checkpoint)), rows(len(NEW))])
        expected[tmp_path / name] = np.concatenate(hidden(backbone, table[ids]))
    read_by_both(expected)
    for folder, states in expected.items():
        for answer, arrays in answers(folder):
            assert not answer["report"], folder.name
            np.testing.assert_allclose(arrays["states"], states, rtol=0, atol=1e-4, err_msg=folder.name)


def test_the_head_is_the_checkpoints_or_the_embeddings(tmp_path, read_by_both):
    """Also below adapters."""
    expected = {}
    for kind, (name, changes) in HEADS.items():
        source, folder = tmp_path / "in" / kind, tmp_path / "out" / kind
        shutil.copytree(GOLDEN / name, source)
        config = json.loads((source / "config.json").read_text()) | changes
        (source / "config.json").write_text(json.dumps(config))
        checkpoint, _ = export(source, folder, trained(Checkpoint(source)))
        request(folder, [[1, 2]], load=loading(checkpoint))
        head = checkpoint.read(embedding_name(checkpoint))
        if kind == "untied":
            head = load_file(source / "model.safetensors")["lm_head.weight"]
        expected[folder] = np.concatenate([head, rows(len(NEW))])
    read_by_both(expected)
    for folder, head in expected.items():
        for answer, arrays in answers(folder):
            assert not answer["report"], folder.name
            np.testing.assert_array_equal(arrays["head"], head, err_msg=folder.name)


def test_a_decoder_from_scratch_is_the_same_llama(tmp_path, read_by_both):
    from test_save_weights import write_from_scratch

    backbone = write_from_scratch(tmp_path)
    ids = np.random.default_rng(2).integers(0, len(NEW), (2, LENGTHS[0]))
    request(tmp_path, ids, ["<a_1><b_2> <a_0>, and\nso on"], export_config.Loading().code("folder"))
    read_by_both([tmp_path])
    states = np.concatenate(hidden(backbone, rows(len(NEW))[ids]))
    for answer, arrays in answers(tmp_path):
        assert answer["ids"] == [[1, 4, 0]] and not answer["report"]
        np.testing.assert_allclose(arrays["states"], states, rtol=0, atol=1e-4)


# A golden, its tokenizer's kind, and the class that published checkpoints of its type name.
TOKENIZERS = [
    ("llama", "llama2", "LlamaTokenizerFast"),
    ("llama", "gpt2", "PreTrainedTokenizerFast"),
    ("llama", "prefix_space", "PreTrainedTokenizerFast"),
    ("mistral", "llama2_legacy", "LlamaTokenizer"),
    ("qwen2", "qwen", "Qwen2Tokenizer"),
    ("qwen2", "gpt2", "PreTrainedTokenizerFast"),
    ("qwen3", "qwen", "Qwen2Tokenizer"),
    ("gemma2", "llama2", "GemmaTokenizer"),
    ("gpt2", "gpt2", "GPT2Tokenizer"),
    ("phi3_longrope_short", "llama2", "LlamaTokenizer"),
    ("smollm3", "qwen", "PreTrainedTokenizerFast"),
]
TEXTS = [
    "A customer bought, oldest first:\nRed running shoes<a_0><b_3>; Größe 38 <|im_end|>\n\n12 roses ",
    " <c_1><think>x</think>  東京 <s> e\u0301 \u212a",
    "",
]


def test_an_exported_tokenizer_gives_the_tokens_of_training(tmp_path, read_by_both):
    """Also of titles that spell control tokens, as prompts have them."""
    published = {kind: llm_tokenizers.train(getattr(llm_tokenizers, kind)) for _, kind, _ in TOKENIZERS}
    for one in published.values():
        one.add_special_tokens({"additional_special_tokens": [AddedToken("<|im_end|>", normalized=False)]})
    expected = {}
    for model, kind, name in TOKENIZERS:
        source, folder = tmp_path / "in" / f"{model}, {kind}", tmp_path / "out" / f"{model}, {kind}"
        shutil.copytree(GOLDEN / model, source)
        published[kind].save_pretrained(source)
        config = json.loads((source / "tokenizer_config.json").read_text())
        (source / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": name}))
        tokenizer = load_tokenizer(source, llm_tokenizers.IDS.token_strings())
        folder.mkdir(parents=True)
        save_tokenizer(tokenizer, folder)
        shutil.copy(source / "config.json", folder)
        titles = read_titles(tokenizer, list(SPELLED), prefix="")
        prompts = [f"{text}<a_0>" for text in titles.texts]
        request(folder, texts=[*TEXTS, *prompts])
        end = tokenizer.convert_tokens_to_ids("<a_0>")
        read = [[*tokens_of(titles, number, tokenizer), end] for number in range(len(prompts))]
        expected[folder] = [*(tokenizer(text).input_ids for text in TEXTS), *read]
    read_by_both(expected)
    for folder, ids in expected.items():
        (four, _), (five, _) = answers(folder)
        assert four["ids"] == five["ids"] == ids, folder.name
        assert four["decoded"] == five["decoded"], folder.name
