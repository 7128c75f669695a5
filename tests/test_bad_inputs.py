"""What a user gets for bad input, by the binaries themselves: one line that says where and what to do, exit code 2, and
nothing lost."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from simgr_jax.workdir import lock

# In arguments, messages and file names, TMP stands for the test's folder and TRAINED for a trained
# workdir's copy in it.
TINY = "TINY"  # The flags of a tiny run on the embedded data.
IN_WORKDIR = "--workdir=TMP/workdir"
SEQUENCES = "".join(f"u{user} " + " ".join(f"i{(user + step) % 20}" for step in range(6)) + "\n" for user in range(30))
TEXTS = "".join(f"i{item} word{item} kind{item % 3}\n" for item in range(20))
INTER = {f"u{user}": [(user + step) % 20 for step in range(6)] for user in range(30)}
INDEX = {str(item): [f"<a_{item % 4}>", f"<b_{item % 5}>"] for item in range(20)}
WITHOUT_7 = {item: codes for item, codes in INDEX.items() if item != "7"}
ITEMS = {item: {"title": "x"} for item in INDEX}
USES_DEFAULT = "from simgr_jax import default_config\ndef get_config():\n    config = default_config.get_config()\n"
NPY = ("--config.semantic_ids.embeddings.names=npy", "--config.semantic_ids.embeddings.npy_path=TMP/e.npy")


def option(*options, message):
    """Overrides that the tiny run on the embedded data can't have."""
    return pytest.param("train", (TINY, IN_WORKDIR, *options), {}, message, id=" ".join(options))


def data(name, data_format, files, *options, message):
    """Files in `config.data.path`."""
    arguments = (TINY, IN_WORKDIR, f"--config.data.format={data_format}", "--config.data.path=TMP/data", *options)
    return pytest.param(
        "train", arguments, {f"TMP/data/{file}": text for file, text in files.items()}, message, id=name
    )


def config_file(name, text, message):
    return pytest.param("train", ("--config=TMP/c.py", IN_WORKDIR), {"TMP/c.py": text}, message, id=name)


def flags(binary, *arguments, files=None, message):
    return pytest.param(binary, arguments, files or {}, message, id=f"{binary} {' '.join(arguments)}")


def llm(name, files, message):
    """Files of a checkpoint."""
    arguments = ("--config=configs/llm.py", IN_WORKDIR, "--config.data.format=synthetic")
    arguments += ("--config.backbone.checkpoint=TMP/llm",)
    return pytest.param("train", arguments, {f"TMP/llm/{file}": text for file, text in files.items()}, message, id=name)


def llm_option(*options, message):
    """Overrides that a run with a checkpoint can't have. They are refused before the checkpoint is read."""
    arguments = ("--config=configs/llm.py", IN_WORKDIR, "--config.backbone.checkpoint=TMP/llm", *options)
    return pytest.param("train", arguments, {}, message, id=f"checkpoint {' '.join(options)}")


def predictions(name, change, message):
    """change: of a good file's lines."""
    arguments = (TINY, "--predictions=TMP/p.jsonl")
    return pytest.param("evaluate", arguments, {"TMP/p.jsonl": change}, f"TMP/p.jsonl{message}", id=name)


CASES = [
    # Flags.
    flags("train", message="--workdir: is missing; give --workdir="),
    flags("train", IN_WORKDIR, message="--config: is missing; give --config="),
    flags("train", TINY, message="--workdir: is missing; give --workdir="),
    flags("train", TINY, IN_WORKDIR, "now", message="now: is not a flag"),
    flags("train", TINY, "--workdri=x", message="Unknown command line flag 'workdri'. Did you mean: workdir"),
    flags("train", "--config=none.py", IN_WORKDIR, message="--config=none.py: there is no such file"),
    flags(
        "train", "--config=configs/amazon.py:books", IN_WORKDIR, message="amazon.py:books: no such dataset; choose one"
    ),
    flags("train", "--config", "configs/quickstart.py:x", IN_WORKDIR, message="quickstart.py:1: fails with TypeError"),
    flags("train", "--config.seed=1", IN_WORKDIR, message="config.seed: there is no --config to change"),
    flags("evaluate", message="--workdir, --predictions: give one of the two"),
    flags("evaluate", "--workdir=a", "--predictions=b", message="--workdir, --predictions: give one of the two"),
    flags("evaluate", "--predictions=b", message="--config: is missing"),
    flags("evaluate", "--workdir=a", TINY, message="--config: a workdir has its own config"),
    flags(
        "evaluate",
        "--workdir=a",
        "--split=train",
        message='--split: "train" is unknown; choose one of validation, test',
    ),
    flags("recommend", "--workdir=a", message="--output: is missing"),
    flags("recommend", "--workdir=a", "--output=b", "--k=0", message="--k=0: 0 is not a positive integer"),
    flags("recommend", "--workdir=a", "--output=b", "--split=x", message='--split: "x" is unknown'),
    flags("recommend", "--workdir=a", "--output=/dev/null", message="/dev/null: is a device or a pipe, not a file"),
    # Config files.
    config_file("syntax", "def get_config(:\n", "TMP/c.py:1: fails with SyntaxError"),
    config_file("name", "def get_config():\n    return nothing\n", "TMP/c.py:2: fails with NameError: name 'nothing'"),
    config_file("no get_config", "x = 1\n", "TMP/c.py:1: fails with KeyError: 'get_config'"),
    config_file(
        "one dictionary twice",
        "import ml_collections\ndef get_config():\n    d = {'x': 1}\n"
        "    return ml_collections.ConfigDict({'a': d, 'b': {'c': d}})\n",
        "TMP/c.py: config.a and config.b.c are the same dictionary",
    ),
    config_file("no config", "def get_config():\n    pass\n", "TMP/c.py: get_config() returns a NoneType"),
    config_file("type", f'{USES_DEFAULT}    config.seed = "x"\n', "TMP/c.py:4: fails with TypeError"),
    config_file(
        "misspelt key",
        f"{USES_DEFAULT}    config.training.epoch = 3\n    return config\n",
        "TMP/c.py: config.training.epoch: the config has no such key; did you mean config.training.epochs?",
    ),
    config_file(
        "no value",
        f"{USES_DEFAULT}    config.model = None\n    return config\n",
        "TMP/c.py: config.model: is None; give a value like 'simgr'",
    ),
    config_file(
        "lost key", f"{USES_DEFAULT}    del config.seed\n    return config\n", "TMP/c.py: config.seed: is missing"
    ),
    # Overrides.
    option(
        "--config.modle=simgr",
        message="config.modle: the config has no such key; did you mean config.model?",
    ),
    option(
        "--noconfig.simgr.logq",
        message="config.simgr.logq: the config has no such key; did you mean config.simgr.log_q?",
    ),
    option("--config.seed=abc", message="config.seed: 'abc' is not of type int; give a value like 0"),
    option("--config.simgr.log_q=perhaps", message="config.simgr.log_q: 'perhaps' is not of type bool; give a value"),
    option("--config.optimizer.learning_rate=fast", message="config.optimizer.learning_rate: 'fast' is not of type"),
    option("--config.backbone=big", message="config.backbone: is a group of keys; set them one by one"),
    option("--config.data.format=p6", message="config.data.format: 'p6' is unknown; choose from p5, "),
    option("--config.data.split=random", message="config.data.split: 'random' is unknown; choose from leave_one_out"),
    option("--config.data.split=temporal", message="config.data.split: temporal needs timestamps"),
    option(
        "--config.data.format=log",
        "--config.data.path=TMP/log.csv",
        "--config.data.log.where=event is purchase",
        message="config.data.log.where: can't read 'event is purchase'; write conditions like",
    ),
    option(
        "--config.data.format=log",
        "--config.data.path=TMP/log.csv",
        "--config.data.log.items_file=TMP/items.csv",
        "--config.data.log.keep_cold_items=True",
        "--config.semantic_ids.embeddings.names=('interactions',)",
        message='config.data.log.keep_cold_items: "interactions" alone gives all items without interactions the same',
    ),
    option("--config.data.k_core=99", message="config.data.k_core: 99 leaves no interactions"),
    option("--config.data.synthetic.num_items=9", message="config.evaluation.ks: lists of 10 need as many items"),
    option(
        "--config.model=lcrec",
        "--config.lcrec.beam_width=9",
        message="config.lcrec.beam_width: 9 can't fill a list of 10; give at least that",
    ),
    option("--config.model=magic", message='config.model: "magic" is unknown; choose'),
    option(
        "--config.simgr.item_encoder=max",
        message="config.simgr.item_encoder: can't be 'max'; choose one of mean",
    ),
    option(
        "--config.simgr.similarity=l2",
        message="config.simgr.similarity: can't be 'l2'; choose one of cosine, dot",
    ),
    option("--config.simgr.temperature=0", message="config.simgr.temperature: can't be 0.0; give a number above 0"),
    option(
        "--config.simgr.learn_temperature",
        "--config.simgr.temperature=2.0",
        message="config.simgr.temperature: can't be 2.0; give one from temperature_min = 0.01 to temperature_max = 1",
    ),
    option(
        "--config.semantic_ids.quantizer.name=vq", message="config.semantic_ids.quantizer.name: 'vq' is unknown; choose"
    ),
    option(
        "--config.semantic_ids.quantizer.codebook_size=61",
        message="codebook_size: is 61, but the catalog has only 60 items",
    ),
    option(
        "--config.semantic_ids.source=given", message="config.semantic_ids.source: is 'given', but dataset synthetic"
    ),
    option("--config.backbone.kv_heads=3", message="config.backbone.kv_heads: 3 does not divide the 2 heads"),
    option(
        "--config.training.row_length=10",
        message="config.training.row_length: 10 is shorter than config.data.max_items",
    ),
    option(
        "--config.simgr.history=tokens",
        "--config.training.row_length=3",
        message="config.training.row_length: 3 is too short for the item with the longest prompt, ",
    ),
    llm_option(
        "--config.simgr.history=tokens",
        "--config.prompt.item={title}",
        message="config.prompt.item: '{title}' has to end with {codes}",
    ),
    config_file(
        "text without a tokenizer",
        f"{USES_DEFAULT}    config.simgr.history, config.prompt.prefix = 'tokens', 'Bought:'\n    return config\n",
        "config.prompt.prefix: has text, but the backbone has no tokenizer; set config.backbone.checkpoint",
    ),
    option(
        "--config.simgr.history=tokens",
        "--config.prompt.prefix=Bought:",
        message="config.prompt.prefix: is not read without config.backbone.checkpoint; set that, too, or leave this",
    ),
    llm_option(
        "--config.simgr.history=tokens",
        "--config.prompt.item={title} {codes}",
        "--config.prompt.max_title_tokens=0",
        message="config.prompt.max_title_tokens: can't be 0; give a number",
    ),
    option("--config.training.epochs=-1", message="config.training.epochs: can't be -1; give a number above 0"),
    option("--config.training.patience=0", message="config.training.patience: can't be 0; give a number above 0"),
    option(
        "--config.optimizer.learning_rate=inf", message="config.optimizer.learning_rate: can't be inf; give a finite"
    ),
    option("--config.simgr.in_batch_weight=nan", message="config.simgr.in_batch_weight: can't be nan; give 0 or more"),
    option(
        "--config.simgr.in_batch_weight=inf", message="config.simgr.in_batch_weight: can't be inf; give a finite number"
    ),
    option(
        "--config.optimizer.beta1=1", message="config.optimizer.beta1: can't be 1.0; give a number from 0 to below 1"
    ),
    option(
        "--config.optimizer.warmup_fraction=2", message="config.optimizer.warmup_fraction: can't be 2.0; give a number"
    ),
    option("--config.seed=-1", message="config.seed: can't be -1; give 0 or more"),
    # Data.
    option("--config.data.format=p5", message="config.data.path: not set; set it to the folder"),
    option(
        "--config.data.format=p5",
        "--config.data.path=TMP/none",
        message="TMP/none: no such folder; set config.data.path",
    ),
    data("missing file", "p5", {"x": "x"}, message="TMP/data/user_sequence.txt: no such file; copy"),
    data("empty file", "p5", {"user_sequence.txt": ""}, message="TMP/data/user_sequence.txt: the file is empty; copy"),
    data(
        "unknown item",
        "p5",
        {"user_sequence.txt": f"{SEQUENCES}v i1 i99\n", "item_plain_text.txt": TEXTS},
        message="TMP/data/user_sequence.txt:31: item i99 is not in TMP/data/item_plain_text.txt; add it there",
    ),
    data(
        "no user with three items",
        "p5",
        {"user_sequence.txt": "u i1 i2\nv i3\n", "item_plain_text.txt": TEXTS},
        message="config.data.split: leaves nothing to validate on; give users with 4 interactions or more",
    ),
    data(
        "no text",
        "p5",
        {"user_sequence.txt": SEQUENCES},
        message="config.semantic_ids.embeddings.names: ['tfidf'] needs",
    ),
    data(
        "broken JSON", "lcrec", {"x.inter.json": '{"u": [1, 2],\n"v": [1'}, message="TMP/data/x.inter.json:2: not JSON"
    ),
    data(
        "item without semantic ID",
        "lcrec",
        {"x.inter.json": INTER, "x.item.json": ITEMS, "x.index.json": WITHOUT_7},
        message="TMP/data/x.index.json:7: the item has no semantic ID here; add it",
    ),
    data(
        "ragged codes",
        "lcrec",
        {"x.inter.json": INTER, "x.index.json": INDEX | {"7": ["<a_1>"]}},
        message="TMP/data/x.index.json:7: 1 codes where item 0 has 2; give every item the same number",
    ),
    pytest.param(
        "train",
        (TINY, IN_WORKDIR, *NPY),
        {"TMP/e.npy": np.full((60, 4), np.nan)},
        "TMP/e.npy: row 0 has NaN or infinite values",
        id="NaN embeddings",
    ),
    pytest.param(
        "train", (TINY, IN_WORKDIR, *NPY), {"TMP/e.npy": np.ones((59, 4))}, "TMP/e.npy: has 59 rows for 60", id="rows"
    ),
    pytest.param("train", (TINY, IN_WORKDIR, *NPY), {}, "embeddings.npy_path: no file 'TMP/e.npy'", id="no embeddings"),
    # Workdirs.
    flags("train", TINY, "--workdir=TMP/f", files={"TMP/f": "x"}, message="TMP/f: can't be created (File exists)"),
    flags("train", TINY, "--workdir=TMP/f/w", files={"TMP/f": "x"}, message="TMP/f/w: can't be created (Not a dir"),
    flags(
        *("train", TINY, IN_WORKDIR, "--config.cache_dir=TMP/f"),
        files={"TMP/f": "x"},
        message="TMP/f/synthetic-",
    ),
    flags(
        *("train", TINY, "--workdir=TRAINED", "--config.seed=1"),
        message="TRAINED/config.json:seed: the run here has 0, not 1; continue with the same config, or choose another",
    ),
    flags(
        *("train", TINY, "--workdir=TRAINED"),
        files={"TRAINED/config.json": '{\n"seed": 0,\n'},
        message="TRAINED/config.json:3: not JSON",
    ),
    flags("evaluate", "--workdir=TMP/none", message="TMP/none/config.json: is not there; give the --workdir of a run"),
    flags(
        *("evaluate", "--workdir=TRAINED"),
        files={"TRAINED/config.json": '{"config_version": 2, "sead": 0}'},
        message='config.json: is not this version\'s config (Key "sead" does not exist',
    ),
    flags(
        *("evaluate", "--workdir=TRAINED"),
        files={"TRAINED/config.json": '{"seed": 0}'},
        message="TRAINED/config.json: is of config version 1, and this simgr_jax reads version 2; use the simgr_jax",
    ),
    flags(
        *("train", TINY, "--workdir=TRAINED"),
        files={"TRAINED/config.json": '{"config_version": 3, "seed": 0}'},
        message="TRAINED/config.json: is of config version 3, and this simgr_jax reads version 2; use the simgr_jax",
    ),
    flags(
        *("evaluate", "--workdir=TRAINED"),
        files={"TRAINED/checkpoints": None},
        message="TRAINED/checkpoints: is not there; train in this workdir first",
    ),
    flags(
        *("recommend", "--workdir=TRAINED", "--output=TMP/o.jsonl"),
        files={"TRAINED/checkpoints": None, "TRAINED/checkpoints/x": "x"},
        message="TRAINED/checkpoints: holds no checkpoint; train in this workdir first",
    ),
    flags(
        *("evaluate", "--workdir=TRAINED"),
        files={"TRAINED/metrics.jsonl": '{"step": 1}\n{"step": 2'},
        message="TRAINED/metrics.jsonl:2: is not JSON",
    ),
    flags(
        "recommend",
        "--workdir=TRAINED",
        "--output=TMP/o.jsonl",
        "--k=61",
        message="--k: can't be 61; give a number from 1 to 60",
    ),
    flags("recommend", "--workdir=TRAINED", "--output=TMP", message="TMP: can't be written (Is a directory)"),
    option(
        "--config.simgr.catalog_chunk=-2", message="config.simgr.catalog_chunk: can't be -2; give a number of items"
    ),
    # An LLM as the backbone.
    config_file(
        "adapters without a checkpoint",
        f"{USES_DEFAULT}    config.lora.rank = 4\n    return config\n",
        "config.lora.rank: adapters need a checkpoint; give config.backbone.checkpoint",
    ),
    option(
        "--config.lora.rank=4",
        message="config.lora.rank: is not read without config.backbone.checkpoint; set that, too, or leave this out",
    ),
    llm_option(
        "--config.lora.base_dtype=int8", message="config.lora.base_dtype: can't be 'int8'; choose one of float32"
    ),
    option(
        "--config.optimizer.backbone.learning_rate=1e-4",
        message="config.optimizer.backbone.learning_rate: is not read without config.backbone.checkpoint; set that",
    ),
    option(
        "--config.model=sasrec",
        "--config.training.freeze_epochs=1",
        message='config.training.freeze_epochs: is not read by model "sasrec"; leave it out: the model reads ',
    ),
    llm_option(
        "--config.training.freeze_epochs=31",
        message="config.training.freeze_epochs: 31.0 is more than config.training.epochs = ",
    ),
    llm_option(
        "--config.optimizer.backbone.clip_norm=-1",
        message="config.optimizer.backbone.clip_norm: can't be -1.0; give 0 or more",
    ),
    llm_option(
        "--config.backbone.token_init=zero", message="config.backbone.token_init: can't be 'zero'; choose one of mean"
    ),
    option("--config.backbone.remat=some", message='config.backbone.remat: "some" is unknown; choose one of none'),
    option(
        "--config.backbone.checkpoint=TMP",
        "--config.backbone.width=8",
        message='config.backbone.width: is not read without config.backbone.checkpoint=""; set that, too, or leave',
    ),
    llm("no such folder", {}, message="config.backbone.checkpoint: TMP/llm is not a folder, and can't"),
    llm("no config", {"x.txt": "x"}, message="TMP/llm/config.json: no such file; give the folder of a Hugging Face"),
    llm("an encoder", {"config.json": {"model_type": "bert"}}, message="model_type: 'bert' is not supported; use"),
    llm(
        "a pickle",
        {"config.json": {"model_type": "llama"}, "pytorch_model.bin": "x"},
        message="TMP/llm/pytorch_model.bin: is a pickle, which can run code when it is read; if you trust it, convert",
    ),
    flags("export", "--workdir=TMP/none", "--output=TMP/o", message="TMP/none/config.json: is not there; give the"),
    flags("export", "--workdir=TRAINED", "--output=TMP", message="TMP: exists already; remove it, or choose another"),
    # Predictions.
    flags("evaluate", TINY, "--predictions=TMP/none.jsonl", message="TMP/none.jsonl: can't be read (No such file"),
    predictions("predictions: empty", lambda lines: [], ": is empty; write a line"),
    predictions("predictions: broken", lambda lines: ['{"user": "U1', *lines[1:]], ":1: is not valid JSON in UTF-8"),
    predictions("predictions: twice", lambda lines: [*lines, lines[0]], ":201: user 'U000000' has more lines"),
    predictions("predictions: lost", lambda lines: lines[1:], ": 1 of 200 evaluation cases have no line, among them"),
    predictions(
        "predictions: user", lambda lines: ['{"user": "X", "items": []}', *lines[1:]], ":1: unknown user 'X'; use"
    ),
]


@pytest.mark.parametrize(("binary", "arguments", "files", "message"), CASES)
def test_bad_input_gives_one_line_and_exit_code_2(
    binary, arguments, files, message, run_binary, tiny_options, trained_workdir, predictions_lines, root, tmp_path,
    monkeypatch, capfd,
):  # fmt: skip
    monkeypatch.chdir(root)
    trained = tmp_path / "trained"
    if any("TRAINED" in text for text in (*arguments, *files)):
        shutil.copytree(trained_workdir, trained)
    fill_in = lambda text: text.replace("TRAINED", str(trained)).replace("TMP", str(tmp_path))  # noqa: E731
    for name, content in files.items():
        write(Path(fill_in(name)), content(predictions_lines) if callable(content) else content)
    before = contents(tmp_path)
    arguments = [one for text in arguments for one in (tiny_options if text == TINY else [fill_in(text)])]

    capfd.readouterr()
    assert run_binary(binary, *arguments) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and error.endswith("\n")
    assert fill_in(message) in error
    assert_nothing_lost(before, contents(tmp_path))


def write(path, content):
    """content: text, lines, what becomes JSON, an array, or None to remove the folder."""
    if content is None:
        shutil.rmtree(path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, np.ndarray):
        np.save(path, content)
    elif isinstance(content, list):
        path.write_text("".join(f"{line}\n" for line in content))
    else:
        path.write_text(json.dumps(content) if isinstance(content, dict) else content)


def contents(folder):
    """The bytes of all files but locks, which stay and say who locked last."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != lock.FILE_NAME)
    return {path.relative_to(folder): path.read_bytes() for path in files}


def assert_nothing_lost(before, after):
    """All that was there still is; what is new is finished work in a cache, of use to the corrected run."""
    assert before.items() <= after.items()
    new = after.keys() - before.keys()
    assert all("cache" in path.parts and not path.name.startswith(".") for path in new), new


@pytest.fixture(scope="module")
def predictions_lines(run_binary, trained_workdir, tmp_path_factory):
    """Good recommendations for the test split of the embedded data."""
    file = tmp_path_factory.mktemp("predictions") / "p.jsonl"
    assert run_binary("recommend", f"--workdir={trained_workdir}", f"--output={file}", "--split=test") == 0
    return file.read_text().splitlines()


def test_a_corrected_config_continues_in_the_same_workdir(run_binary, tiny_options, tmp_path, capfd):
    """Also after a mistake that shows only once the data are prepared."""
    arguments = ("train", *tiny_options, f"--workdir={tmp_path / 'workdir'}")
    assert run_binary(*arguments, "--config.backbone.kv_heads=3") == 2
    assert run_binary(*arguments, "--config.backbone.kv_heads=3", "--config.simgr.user_pooling=max") == 2
    assert "config.json" not in capfd.readouterr().err


# The processes themselves, with all that libraries say on stderr.


def start(root, binary, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", f"simgr_jax.{binary}", *map(str, arguments)],
        cwd=root,
        # With the tunables set, the process does not start itself anew, which takes seconds.
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_stderr_of_the_process_is_that_line(root, tiny_options, trained_workdir, tmp_path):
    damaged = shutil.copytree(trained_workdir, tmp_path / "damaged")
    for file in damaged.glob("checkpoints/*/*/d/*"):
        os.truncate(file, 10)
    misspelt = start(root, "train", *tiny_options, f"--workdir={tmp_path}", "--config.training.epohcs=1")
    unreadable = start(root, "evaluate", f"--workdir={damaged}")
    exploding = start(
        *(root, "train", *tiny_options, f"--workdir={tmp_path / 'nan'}"),
        *("--config.optimizer.learning_rate=1e30", "--config.optimizer.clip_norm=0", "--config.simgr.similarity=dot"),
        *("--config.training.log_every_steps=1", "--config.training.epochs=4", "--config.training.max_bad_steps=1"),
    )
    skipped = "WARNING:simgr_jax.training.loop:step 4: 2 of the last 2 steps were skipped, because"
    for process, *messages in (
        (misspelt, "error: config.training.epohcs: the config has no such key; did you mean config.training.epochs?"),
        (unreadable, f"error: {damaged}/checkpoints/2/model/d/"),
        (exploding, skipped, "error: config.optimizer.learning_rate: the loss or its gradient was not finite"),
    ):
        told = process.communicate()[1].splitlines()
        assert all(line.startswith(message) for line, message in zip(told, messages, strict=True)), told
        assert process.returncode == 2
