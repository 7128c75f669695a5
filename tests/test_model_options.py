"""Models own their options: a key either changes what a model does, or can't be set."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from simgr_jax.config_files import load_run_config
from simgr_jax.config_keys import flat, reads_item_texts, unread
from simgr_jax.errors import UserError
from simgr_jax.huggingface.pretrained import load_pretrained
from simgr_jax.inputs.rank_batches import rank_batches
from simgr_jax.models import registry
from simgr_jax.models.model_inputs import Backbone, ModelInputs
from simgr_jax.models.scratch import scratch_config
from simgr_jax.models.transformer import Transformer
from simgr_jax.run import Run
from simgr_jax.training.random_keys import step_rngs
from simgr_jax.workdir.cache import fingerprint

LLM = Path(__file__).parent / "huggingface" / "golden" / "qwen3"
SHARED_GROUPS = ("backbone", "item_reader", "prompt", "lora", "semantic_ids")

# Settings that all cases begin with, as far as their model reads them.
SMALL = {
    "data.synthetic.num_users": 60,
    "data.synthetic.num_items": 40,
    "evaluation.batch_size": 4,
    "training.batch_rows": 2,
    "backbone.width": 8,
    "backbone.layers": 1,
    "backbone.heads": 2,
    "backbone.kv_heads": 2,
    "backbone.head_width": 4,
    "backbone.mlp_width": 8,
    "backbone.dropout": 0.1,
    "backbone.dtype": "float32",
    "semantic_ids.embeddings.dim": 8,
    "semantic_ids.quantizer.levels": 3,
    "semantic_ids.quantizer.codebook_size": 6,
}
# From a case's name to its model and what makes the model read more.
CASES = {
    **{name: (name, {}) for name in registry.MODELS},
    "simgr with all losses": (
        "simgr",
        {
            "simgr.sampled_weight": 1.0,
            "simgr.in_batch_weight": 1.0,
            "simgr.learn_temperature": True,
            "simgr.item_encoder": "mean_mlp",
            "semantic_ids.embeddings.names": ("tfidf", "interactions"),
        },
    ),
    # Each of its options is another fit.
    "simgr with an RQ-VAE": (
        "simgr",
        {
            "semantic_ids.quantizer.name": "rqvae",
            "semantic_ids.quantizer.rqvae.steps": 3,
            "semantic_ids.quantizer.rqvae.batch_size": 16,
        },
    ),
    "simgr with an LLM": (
        "simgr",
        {
            "backbone.checkpoint": "LLM",
            "lora.rank": 2,
            "simgr.history": "tokens",
            "simgr.readout": "last_item",
            "prompt.item": "\n{title} {codes}",
        },
    ),
    "simgr with an LLM that reads texts": (
        "simgr",
        {
            "item_reader.checkpoint": "LLM",
            "simgr.item_text": "read",
            "semantic_ids.embeddings.names": ("llm", "interactions"),
        },
    ),
    "simgr with an LLM that learns to read texts": (
        "simgr",
        {"item_reader.checkpoint": "LLM", "simgr.item_text": "trained", "simgr.item_text_tokens": 128},
    ),
    "simgr with an LLM that reads items": ("simgr", {"backbone.checkpoint": "LLM", "simgr.readout": "last_item"}),
    "lcrec with an LLM": ("lcrec", {"backbone.checkpoint": "LLM", "lora.rank": 2, "prompt.prefix": "bought"}),
    "rpg with graph search": ("rpg", {"rpg.decoding": "graph", "rpg.graph_neighbors": 8}),
    "sasrec with the binary loss": ("sasrec", {"sasrec.loss": "binary"}),
}
# Another value that each key may have; numbers without one are raised by one, and shares halved.
OTHER = {
    "simgr.history": "tokens",
    "simgr.user_pooling": "mean",
    "simgr.readout": "last_item",
    "simgr.item_encoder": "gated",
    "simgr.item_text": "read",
    "simgr.item_text_dtype": "bfloat16",
    "simgr.similarity": "dot",
    "simgr.sampled_from": "popularity",
    "simgr.temperature": 0.1,
    "simgr.temperature_min": 0.02,
    "simgr.temperature_max": 0.5,
    "simgr.label_smoothing": 0.1,
    "simgr.catalog_chunk": 8,
    "simgr.in_batch_weight": 0.5,
    "tiger.encoder": "causal",
    "rpg.decoding": "graph",
    "sasrec.loss": "binary",
    "backbone.checkpoint": "LLM",
    "backbone.token_init": "words",
    "backbone.heads": 4,
    "backbone.kv_heads": 1,
    "backbone.head_width": 6,
    "backbone.norm_epsilon": 1e-3,
    "backbone.dropout": 0.2,
    "backbone.dtype": "bfloat16",
    "backbone.remat": "full",
    "backbone.attention": "cudnn",
    "item_reader.checkpoint": "READER",
    "item_reader.depth": 1.0,
    "item_reader.max_tokens": 2,
    "prompt.prefix": "So far:",
    "prompt.item": "\n{codes}",
    "prompt.max_title_tokens": 1,
    "lora.targets": ("q_proj",),
    "lora.dropout": 0.1,
    "lora.base_dtype": "float32",
    "semantic_ids.source": "given",
    "semantic_ids.embeddings.names": ("interactions",),
    "semantic_ids.embeddings.weights": (1.0, 3.0),
    "semantic_ids.embeddings.encoder": "encoder",
    "semantic_ids.embeddings.npy_path": "vectors.npy",
    "semantic_ids.embeddings.dim": 6,
    "semantic_ids.embeddings.window": 1,
    "semantic_ids.quantizer.name": "residual_kmeans",
    "semantic_ids.quantizer.codebook_size": 5,
    "semantic_ids.quantizer.levels": 2,
    "semantic_ids.quantizer.rqvae.hidden_widths": (16,),
    "semantic_ids.collisions": "keep",
}


# For the cases that have that value.
ANOTHER = {
    "simgr.history": "item",
    "simgr.item_text": "none",
    "simgr.readout": "state",
    "rpg.decoding": "exhaustive",
    "sasrec.loss": "full",
    "prompt.prefix": "box",
}


def other_value(key: str, value: object) -> object:
    if key == "backbone.checkpoint" and value:
        return ""
    if key in OTHER:
        return OTHER[key] if OTHER[key] != value else ANOTHER.get(key, value)
    if key.endswith(".label_smoothing"):
        return 0.1
    if isinstance(value, bool):
        return not value
    return value / 2 if isinstance(value, float) and 0 < value < 1 else value + 1


@pytest.fixture(scope="module")
def llms(tmp_path_factory) -> dict[str, str]:
    """Folders of two checkpoints with a tokenizer, by what CASES and OTHER call them."""
    folders = {"LLM": LLM, "READER": LLM.with_name("llama")}
    return {name: str(with_tokenizer(folder, tmp_path_factory.mktemp(name) / name)) for name, folder in folders.items()}


def with_tokenizer(source: Path, folder: Path) -> Path:
    """A copy of a checkpoint, with a tokenizer."""
    shutil.copytree(source, folder)
    tokenizer = Tokenizer(tokenizer_models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=45, show_progress=False)
    tokenizer.train_from_iterator(["So far: bought a red lamp, six boxes of wool and his coffee mugs"], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def open_case(llms, tmp_path_factory):
    """A function (case, key, value) -> the case's Run, with one more override if a key is given."""
    cache = tmp_path_factory.mktemp("cache")

    @functools.cache
    def config_of(case: str):
        name, settings = CASES[case]
        values = {key: llms[value] if value == "LLM" else value for key, value in settings.items()}
        config = load_run_config("quickstart", {"model": name, "cache_dir": str(cache)} | values)
        ignored = unread(config)
        return load_run_config(config, {key: value for key, value in SMALL.items() if key not in ignored})

    def open_case(case: str, key: str | None = None, value: object = None) -> Run:
        override = {} if key is None else {key: llms[value] if value in ("LLM", "READER") else value}
        return Run(load_run_config(config_of(case), override), cache / "no workdir")

    return open_case


def evidence(run: Run) -> Iterator[str]:
    """Hashes, one of which differs where a key changes what the run does: its semantic IDs, its prompts, and its
    programs for training and ranking, with constants like the initial parameters. The cheapest comes first."""
    ids, prompt, items, config = run.semantic_ids, run.prompt, run.items, run.config
    yield fingerprint(None if ids is None else ids.codes.tolist())
    yield fingerprint(prompt.prefix, prompt.pieces.values, prompt.text_tokens, run.longest_prompt)
    if run.options.is_trained:
        yield fingerprint(run.windows.row_length)
    readings = run.item_readings if reads_item_texts(config) else None
    if run.checkpoint is not None:
        arguments = (config, items, run.prompt, run.longest_sequence, lambda: readings)
        pretrained = load_pretrained(run.checkpoint, run.tokenizer, *arguments)
        decoder = nnx.split(pretrained.decoder)

    reader = None
    if run.options.trains_item_reader:
        reader = nnx.split(run.text_reader(run.options.item_text_tokens, nnx.Rngs(0)))

    def model():
        rngs = nnx.Rngs(config.seed)

        def backbone() -> Backbone:
            if run.checkpoint is None:
                return Backbone(Transformer(scratch_config(config), rngs))
            return pretrained._replace(decoder=nnx.merge(*decoder))  # A copy, which adapters may change.

        inputs = ModelInputs(
            items.num_items,
            items.semantic_ids,
            run.split.train,
            backbone,
            rngs,
            lambda: readings,
            lambda room: nnx.merge(*reader),
        )
        return registry.assemble(config, inputs)

    def loss(batch):
        trained = model()
        return nnx.state(trained), trained.loss(batch, step_rngs(0, jnp.int32(0)))[0]

    def rank(batch):
        ranker = model()
        return ranker.rank(batch, ranker.catalog(), 5, False)

    if run.options.is_trained:
        yield program(run, loss, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), run.windows.batch_like(2)))
    cases = run.split.test.take(range(4))
    batch, _ = next(rank_batches(cases, prompt, 4, config.data.max_items, run.longest_prompt))
    yield program(run, rank, batch)


def program(run: Run, function, batch) -> str:
    """A hash of what JAX would compile."""
    with run.mesh():
        traced = jax.make_jaxpr(function)(batch)
    is_key = lambda x: jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)  # noqa: E731
    return fingerprint(str(traced), *(np.asarray(x, np.float64) for x in traced.consts if not is_key(x)))


def keys_of(*groups: str) -> list[str]:
    """All keys of some groups of the config."""
    return [key for key in flat(load_run_config("quickstart")) if key.partition(".")[0] in groups]


SLOW = (
    *("simgr with an RQ-VAE", "simgr with an LLM", "simgr with an LLM that reads items"),
    "simgr with an LLM that reads texts",
    *("lcrec with an LLM", "rpg with graph search"),
)


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.slow if case in SLOW else ()) for case in CASES])
def test_every_key_changes_what_the_model_does_or_is_refused(case, open_case):
    before = list(evidence(open_case(case)))
    ignored = []
    for key in keys_of(CASES[case][0], *SHARED_GROUPS):
        value = other_value(key, flat(open_case(case).config)[key])
        try:
            after = evidence(open_case(case, key, value))
            if all(one == next(after) for one in before):
                ignored.append(key)
        except UserError as error:
            # Some values need another key, too, and the message is about that.
            assert key in str(error) or key.startswith(("semantic_ids.", "lora.rank", "simgr.item_text")), (key, error)
    assert not ignored


def test_the_adapters_of_an_item_reader_have_targets_if_the_backbone_has_no_adapters():
    settings = {"backbone.checkpoint": "somewhere", "lora.targets": ("q_proj",)}
    load_run_config("llm:full", settings | {"simgr.item_text": "trained"})
    with pytest.raises(UserError, match=r"config\.lora\.targets: is not read without config\.lora\.rank above 0"):
        load_run_config("llm:full", settings)


@pytest.mark.parametrize("name", registry.MODELS)
def test_options_of_other_models_are_refused_and_the_message_says_what_is_read(name):
    values = flat(load_run_config("quickstart"))
    for key in keys_of(*(other for other in registry.MODELS if other != name)):
        with pytest.raises(UserError, match=f'config.{key}: is not read by model "{name}".*the model reads'):
            load_run_config("quickstart", {"model": name, key: values[key]})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("simgr.sampled_weight", 1.0),
        ("simgr.item_encoder", "nonsense"),
        ("simgr.catalog_chunk", -7),
        ("simgr.temperature", 5.0),
        ("backbone.checkpoint", "anywhere"),
    ],
)
def test_sasrec_refuses_what_only_others_read(run_binary, tmp_path, capsys, key, value):
    options = ("--config=quickstart", "--config.model=sasrec", f"--config.{key}={value}", f"--workdir={tmp_path}")
    assert run_binary("train", *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f'error: config.{key}: is not read by model "sasrec"')
    assert "sasrec.*" in line and "backbone.{attention, dropout, dtype, head_width, heads, layers" in line


@pytest.mark.parametrize("config", ["quickstart", "amazon:beauty", "amazon:instruments", "log", "llm:full"])
@pytest.mark.parametrize("name", registry.MODELS)
def test_one_flag_chooses_a_model_from_any_config(config, name):
    chosen = load_run_config(config, {"model": name})
    if config == "llm:full" and registry.options_of(chosen).takes_checkpoint:
        chosen = load_run_config(config, {"model": name, "backbone.checkpoint": "somewhere"})
    Run(chosen, "nowhere")


def test_the_config_group_of_a_model_is_its_dataclass():
    config = load_run_config("quickstart")
    for name, group in registry.default_options().items():
        assert set(config[name]) == set(group)
    assert json.dumps(config.to_dict())
