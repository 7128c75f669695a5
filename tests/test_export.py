"""`simgr_jax.export`, as the binary: what leaves is what was trained, and recommends as the run does."""

import functools
import json
import runpy
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from simgr_jax.errors import UserError
from simgr_jax.inputs import item_texts
from simgr_jax.inputs.rank_batches import rank_batches
from simgr_jax.models.user_pooling import LastToken
from simgr_jax.run import Run
from simgr_jax.serving import export_folder, export_readme

USERS = 6  # Whose lists are compared: all of them take as many runs of score.py.

# Runs of seconds: 60 users of 40 embedded items, and about ten steps.
DATA = (
    "--config.data.format=synthetic",
    "--config.data.synthetic.num_users=60",
    "--config.data.synthetic.num_items=40",
    "--config.semantic_ids.embeddings.names=('tfidf',)",
    "--config.semantic_ids.embeddings.dim=8",
    "--config.semantic_ids.quantizer.levels=3",
    "--config.semantic_ids.quantizer.codebook_size=6",
    "--config.evaluation.batch_size=16",
    "--config.training.batch_rows=4",
    "--config.training.epochs=2",
    # So that differences are those of the exported model.
    "--config.backbone.dtype=float32",
)
LORA = ("--config.lora.rank=2", "--config.lora.base_dtype=float32")
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
# What a run begins with and how it reads histories: (LLM, what its tokenizer puts around a text) or a golden GGUF file,
# config, options.
# The runs of configs/llm.py have an item encoder with an inner width.
WIDTH = "--config.simgr.item_encoder_width=8"
TOKENS = "--config.simgr.history=tokens"
GEMMA4 = (
    "Gemma4Text",
    {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 4,
        "global_head_dim": 12,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 260,
    },
    "<s> $A",
)
CODES_ALONE = (
    "--config.simgr.item_text=none",
    "--config.simgr.repeat_bias=False",
    "--config.backbone.token_init=mean",
)
RUNS = {
    "all weights, templates with titles, cut to a row": (
        ("Llama", {"tie_word_embeddings": False}, "<s> $A </s>"),
        "llm.py:full",
        (
            '--config.prompt.prefix=100% "bought" 😀:',
            "--config.prompt.item=\n{title} {codes}",
            "--config.prompt.max_title_tokens=4",
            TOKENS,
            "--config.simgr.user_pooling=attention",
            "--config.simgr.similarity=dot",
            "--config.training.row_length=60",
            "--config.training.epochs=1",
            WIDTH,
        ),
    ),
    "adapters, bare codes": (
        ("Qwen3", {"tie_word_embeddings": True}, "$A"),
        "llm.py:lora",
        (
            *LORA,
            WIDTH,
            TOKENS,
            *CODES_ALONE,
            "--config.optimizer.learning_rate=0.01",
            "--config.training.row_length=64",
        ),
    ),
    "adapters, items as vectors, scaled embeddings": (
        ("Gemma3Text", {"sliding_window": 4}, "<s> $A"),
        "llm.py:lora",
        (
            *LORA,
            WIDTH,
            "--config.simgr.user_pooling=mean",
            "--config.training.row_length=24",
        ),
    ),
    "all weights, titles, inputs for each layer": (
        GEMMA4,
        "llm.py:full",
        (
            TOKENS,
            *CODES_ALONE,
            "--config.prompt.item=\n{title} {codes}",
            "--config.prompt.max_title_tokens=4",
            "--config.training.row_length=60",
            "--config.training.epochs=1",
            WIDTH,
        ),
    ),
    "adapters, gated delta nets": (
        (
            "Qwen3_5Text",
            {
                "layer_types": ["linear_attention", "full_attention"],
                "linear_num_key_heads": 1,
                "linear_num_value_heads": 2,
                "linear_key_head_dim": 8,
                "linear_value_head_dim": 8,
                "tie_word_embeddings": True,
            },
            "$A",
        ),
        "llm.py:lora",
        (*LORA, WIDTH, TOKENS, *CODES_ALONE, "--config.training.row_length=64"),
    ),
    "adapters, a quantized GGUF file": (
        "gguf/byte_level.gguf",
        "llm.py:titles",
        (*LORA, WIDTH, *CODES_ALONE, "--config.training.row_length=160"),
    ),
    "adapters, items as vectors, soft-capped attention": (
        ("Gemma2", {"sliding_window": 4, "attn_logit_softcapping": 0.5}, "$A"),
        "llm.py:lora",
        (*LORA, WIDTH, *CODES_ALONE, "--config.training.row_length=24"),
    ),
    "adapters, items as vectors, inputs for each layer": (
        GEMMA4,
        "llm.py:lora",
        (*LORA, WIDTH, *CODES_ALONE, "--config.training.row_length=24"),
    ),
    "from scratch, codes that collide, history left out": (
        None,
        "quickstart.py",
        (
            "--config.simgr.history=tokens",
            "--config.semantic_ids.quantizer.codebook_size=3",
            "--config.semantic_ids.quantizer.levels=2",
            "--config.semantic_ids.collisions=keep",
            "--config.backbone.width=16",
            "--config.backbone.mlp_width=16",
            "--config.backbone.heads=2",
            "--config.backbone.kv_heads=2",
            "--config.backbone.head_width=6",
            "--config.training.row_length=48",
        ),
    ),
}


def write_llm(folder, family, config, around):
    """A random checkpoint, with a tokenizer of bytes."""
    import torch
    import transformers

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_and_ends = {
        "initial_alphabet": pre_tokenizers.ByteLevel.alphabet(),
        "special_tokens": ["<s>", "</s>"],
    }
    inner.train_from_iterator([], trainers.BpeTrainer(vocab_size=258, show_progress=False, **bytes_and_ends))
    inner.post_processor = processors.TemplateProcessing(single=around, special_tokens=[("<s>", 0), ("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(folder)
    torch.manual_seed(0)
    values = {"vocab_size": 260, "pad_token_id": None, "initializer_range": 0.2}
    config = getattr(transformers, f"{family}Config")(**SMALL | values | config)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


# Each takes half a minute. The quick one has titles and templates; slow ones have adapters.
TITLES, BARE, VECTORS, PER_LAYER, DELTA_NETS, GGUF, CAPPED, PER_LAYER_VECTORS, SCRATCH = RUNS
SLOW = (BARE, VECTORS, PER_LAYER, DELTA_NETS, GGUF, CAPPED, PER_LAYER_VECTORS, SCRATCH)


def each(runs):
    return [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in runs]


@pytest.fixture(scope="module")
def export(run_binary, root, tmp_path_factory):
    """A function from the name of a run to its workdir and the folder that it was exported to."""
    pytest.importorskip("torch")

    @functools.cache
    def export(name):
        llm, config, options = RUNS[name]
        folder = tmp_path_factory.mktemp("run")
        if name == GGUF:
            options += (f"--config.backbone.checkpoint={root / 'tests/huggingface/golden' / llm}",)
        elif llm:
            write_llm(folder / "llm", *llm)
            options += (f"--config.backbone.checkpoint={folder / 'llm'}",)
        workdir, output = folder / "workdir", folder / "new" / "exported"
        assert run_binary("train", f"--config={root}/configs/{config}", *DATA, *options, f"--workdir={workdir}") == 0
        dtype = ("--dtype=float32",) if name == GGUF else ()  # Quantized weights are written in bfloat16 otherwise.
        assert run_binary("export", f"--workdir={workdir}", f"--output={output}", *dtype, *filtering(name)) == 0
        assert [path.name for path in output.parent.iterdir()] == ["exported"]
        return workdir, output

    return export


def filtering(name):
    """The flag of `export` and `recommend` with which this run is exported."""
    return ("--filter_history",) if name.endswith("history left out") else ()


@pytest.fixture
def scores(monkeypatch, capsys):
    """What score.py prints for a history: ids, best first, and their scores."""

    def run(script, history):
        monkeypatch.setattr(sys, "argv", [str(script), *history])
        capsys.readouterr()
        runpy.run_path(str(script), run_name="__main__")
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        return [item for item, _ in lines], [float(score) for _, score in lines]

    return run


# Gemma 4 can't be given vectors; its program, which replaces two tables, is run below.
@pytest.mark.parametrize("name", each([name for name in RUNS if name != PER_LAYER_VECTORS]))
def test_transformers_computes_the_hidden_states_that_were_trained(export, name):
    import torch
    from transformers import AutoModel

    workdir, output = export(name)
    run = Run.load(workdir)
    trained, config, prompt = run.best_model(), run.config, run.prompt
    (batch, _), *_ = rank_batches(
        run.cases().take(range(USERS)), prompt, USERS, config.data.max_items, run.longest_prompt
    )
    trained.user_pooling = LastToken()
    positions = np.broadcast_to(np.arange(batch.inputs.shape[1]), batch.inputs.shape)
    segments = (positions < batch.lengths[:, None]).astype(np.int32)
    ours = np.asarray(trained.user_states(batch.inputs, segments, positions, None))

    model, report = AutoModel.from_pretrained(output, output_loading_info=True)
    assert not report["missing_keys"]
    assert set(report["unexpected_keys"]) <= {"lm_head.weight"}
    new = AutoTokenizer.from_pretrained(output).convert_tokens_to_ids(run.semantic_ids.token_strings())
    ids = np.concatenate([new, prompt.text_tokens]).astype(int)
    for row, length, states in zip(batch.inputs, batch.lengths, ours, strict=True):
        if config.simgr.history == "item":
            vectors = load_file(output / "item_index" / "items.safetensors")["vectors"][row[:length]]
            inputs = {"inputs_embeds": torch.tensor(vectors * trained.backbone.config.embedding_scale)[None]}
        else:
            inputs = {"input_ids": torch.tensor(ids[row[:length]])[None]}
        with torch.no_grad():
            theirs = model.eval()(**inputs).last_hidden_state[0].numpy()
        np.testing.assert_allclose(theirs, states[:length], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", each([TITLES, BARE, VECTORS, CAPPED]))
def test_it_is_the_trained_weights_that_are_exported(export, name):
    workdir, output = export(name)
    weight = "model.layers.1.self_attn.q_proj.weight"
    before, after = (load_file(folder / "model.safetensors")[weight] for folder in (workdir.parent / "llm", output))
    assert not np.allclose(before, after, atol=1e-4)


@pytest.mark.parametrize("name", each(RUNS))
def test_the_exported_program_recommends_what_the_run_does(export, name, scores, run_binary, tmp_path):
    (workdir, output), lists = export(name), tmp_path / "lists.jsonl"
    assert run_binary("recommend", f"--workdir={workdir}", f"--output={lists}", *filtering(name)) == 0
    expected = [json.loads(line) for line in lists.read_text().splitlines()]
    (data,) = (workdir / "cache").glob("synthetic-*/")
    histories = dict(line.split(maxsplit=1) for line in (data / "user_sequence.txt").read_text().splitlines())
    for line in expected[:: len(expected) // USERS]:
        items, printed = scores(output / "item_index" / "score.py", histories[line["user"]].split())
        assert items == line["items"]
        assert printed == sorted(printed, reverse=True)


@pytest.mark.slow
# 4.57 does not know the others.
@pytest.mark.parametrize("name", [name for name in RUNS if name not in (PER_LAYER, PER_LAYER_VECTORS, DELTA_NETS)])
def test_the_exported_program_prints_the_same_in_transformers_4(export, name, scores, transformers_4):
    _, output = export(name)
    script, ids = output / "item_index" / "score.py", json.loads((output / "item_index" / "item_ids.json").read_text())
    for history in (ids[5:6], ids[20:3:-2]):
        items, printed = scores(script, history)
        lines = subprocess.run([transformers_4, script, *history], check=True, capture_output=True, text=True).stdout
        there = [line.split() for line in lines.splitlines()]
        assert [item for item, _ in there] == items
        np.testing.assert_allclose([float(score) for _, score in there], printed, rtol=0, atol=2e-4)


def test_a_run_has_tokenized_each_title_once(export, monkeypatch):
    """Evaluating, recommending and exporting, in other processes, find what training has kept."""
    workdir, output = export(TITLES)
    monkeypatch.setattr(item_texts, "encode", None)  # Whoever tokenizes fails.
    run = Run.load(workdir)
    prompts = json.loads((output / "item_index" / "item_prompts.json").read_text())
    assert all(prompt.startswith(text) for prompt, text in zip(prompts, run.item_texts.texts, strict=True))
    assert len(run.prompt.pieces) == len(prompts)


def test_the_program_runs_anywhere(export, tmp_path):
    _, output = export(TITLES)
    moved = shutil.copytree(output, tmp_path / "moved")
    item = json.loads((moved / "item_index" / "item_ids.json").read_text())[3]
    command = [sys.executable, moved / "item_index" / "score.py", item]
    lines = subprocess.run(command, cwd="/", check=True, capture_output=True, text=True).stdout.splitlines()
    assert len(lines) == 10


def test_a_base_model_that_was_moved_is_told_in_one_line(export, run_binary, tmp_path, capfd):
    workdir = shutil.copytree(export(TITLES)[0], tmp_path / "workdir")
    config = json.loads((workdir / "config.json").read_text())
    config["backbone"]["checkpoint"] = str(tmp_path / "moved")
    (workdir / "config.json").write_text(json.dumps(config))
    assert run_binary("export", f"--workdir={workdir}", f"--output={tmp_path / 'out'}") == 2
    error = capfd.readouterr().err
    assert error.startswith(f"error: config.backbone.checkpoint: {tmp_path / 'moved'} is not a folder, and can't")
    assert error.count("\n") == 1


@pytest.fixture(scope="module")
def scratch(run_binary, trained_workdir, tmp_path_factory):
    """The export of a run from scratch whose histories are vectors; torch is not needed."""
    output = tmp_path_factory.mktemp("scratch") / "out"
    assert run_binary("export", f"--workdir={trained_workdir}", f"--output={output}", "--dtype=bfloat16") == 0
    return output


def test_the_item_index_has_the_catalogs_ids_codes_and_vectors(scratch, trained_workdir):
    run = Run.load(trained_workdir)
    items = load_file(scratch / "item_index" / "items.safetensors")
    assert {name: array.dtype for name, array in items.items()} == {"codes": np.int32, "vectors": np.float32}
    np.testing.assert_array_equal(items["codes"], run.semantic_ids.codes)
    np.testing.assert_allclose(items["vectors"], run.best_model().encode_items(), rtol=1e-5, atol=1e-6)
    assert json.loads((scratch / "item_index" / "item_ids.json").read_text()) == run.dataset.item_ids


def test_the_weights_have_the_dtype_asked_for(scratch):
    assert {array.dtype.name for array in load_file(scratch / "model.safetensors").values()} == {"bfloat16"}
    assert json.loads((scratch / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_readmes_show_the_metrics_and_the_program(scratch, trained_workdir):
    metrics = json.loads((trained_workdir / "report" / "metrics.json").read_text())
    card = (scratch / "README.md").read_text()
    (row,) = (line for line in card.splitlines() if line.startswith("| NDCG@10 "))
    for name in ("", "popularity/", "oracle/"):
        assert f"{metrics[f'{name}NDCG@10']:.4f}" in row
    assert "| computed in | float32, in training |" in card
    script = (scratch / "item_index" / "score.py").read_text()
    assert f"```python\n{script}```" in (scratch / "item_index" / "README.md").read_text()


def test_a_run_without_a_report_is_exported_without_metrics(run_binary, trained_workdir, tmp_path):
    workdir = shutil.copytree(trained_workdir, tmp_path / "workdir")
    shutil.rmtree(workdir / "report")
    assert run_binary("export", f"--workdir={workdir}", f"--output={tmp_path / 'out'}") == 0
    assert "NDCG" not in (tmp_path / "out" / "README.md").read_text()


def test_all_files_may_be_read_by_those_who_may_read_new_files(scratch):
    assert len({file.stat().st_mode for file in scratch.rglob("*") if file.is_file()}) == 1


def damaged(workdir, tmp_path):
    for file in workdir.glob("checkpoints/*/*/d/*"):
        file.write_bytes(file.read_bytes()[:10])


BAD = {
    "no run": (lambda workdir, _: shutil.rmtree(workdir), (), "workdir/config.json: is not there; give the --workdir"),
    "no checkpoints": (
        lambda workdir, _: shutil.rmtree(workdir / "checkpoints"),
        (),
        "workdir/checkpoints: is not there; train in this workdir first",
    ),
    "damaged": (damaged, (), "is not what was written there; checkpoint 2 is damaged: copy it back, or train"),
    "output": (lambda _, tmp: (tmp / "out").mkdir(), (), "out: exists already; remove it, or choose another"),
    "no folder": (
        lambda _, tmp: (tmp / "file").touch(),
        ("--output=TMP/file/out",),
        "file/out: can't be written (File exists",
    ),
    "dtype": (lambda *_: None, ("--dtype=int8",), '--dtype: "int8" is unknown; choose one of float32, bfloat16, or'),
    "workdir": (lambda *_: None, ("--workdir=",), "--workdir: is missing; give --workdir="),
}


@pytest.mark.parametrize(("change", "arguments", "message"), BAD.values(), ids=BAD)
def test_bad_input_gives_one_line_and_writes_nothing(
    change, arguments, message, run_binary, trained_workdir, tmp_path, capfd
):
    workdir = shutil.copytree(trained_workdir, tmp_path / "workdir")
    change(workdir, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    arguments = [text.replace("TMP", str(tmp_path)) for text in arguments]
    assert run_binary("export", f"--workdir={workdir}", f"--output={tmp_path / 'out'}", *arguments) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("error", "code"), [(OSError(28, "No space left on device"), 2), (ValueError("a bug"), None)])
def test_an_export_that_fails_leaves_nothing_behind(
    error, code, run_binary, trained_workdir, tmp_path, monkeypatch, capfd
):
    def fail(recipe):
        raise error

    monkeypatch.setattr(export_readme, "score_script", fail)
    run = lambda: run_binary("export", f"--workdir={trained_workdir}", f"--output={tmp_path / 'out'}")  # noqa: E731
    if code is None:
        with pytest.raises(ValueError, match="a bug"):
            run()
    else:
        assert run() == code
        assert f"{tmp_path / 'out'}: can't be written (No space left on device)" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told_in_one_line_when_it_is_the_weights_that_do_not_fit(tmp_path):
    with (
        pytest.raises(UserError, match=r"out: can't be written .*I/O error"),
        export_folder._new_folder(tmp_path / "out"),
    ):
        save_file({"x": np.zeros(1)}, tmp_path / "no such folder" / "x.safetensors")
    assert not list(tmp_path.iterdir())
