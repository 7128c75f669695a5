"""Exports a run's best model as a folder for Transformers, with its catalog as an item index."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import ml_collections
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from simgr_jax.data.dataset import Dataset
from simgr_jax.errors import UserError
from simgr_jax.evaluation.ranking import Ranker
from simgr_jax.huggingface import export_config, families
from simgr_jax.huggingface.checkpoint import Checkpoint
from simgr_jax.huggingface.save_weights import DTYPES, TrainedTokens, save_finetuned, save_from_scratch
from simgr_jax.inputs.item_texts import ItemTexts, tokens_around_text
from simgr_jax.inputs.prompts import Prompt
from simgr_jax.models.simgr import SimGR
from simgr_jax.semantic_ids.codes import SemanticIds
from simgr_jax.serving import export_readme
from simgr_jax.workdir.atomic_write import atomic_path
from simgr_jax.workdir.read_files import read_json_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Exportable(Protocol):
    """What is read of a `simgr_jax.Run`; see there."""

    config: ml_collections.ConfigDict
    options: Any
    workdir: Path

    @property
    def dataset(self) -> Dataset: ...
    @property
    def semantic_ids(self) -> SemanticIds | None: ...
    @property
    def checkpoint(self) -> Checkpoint | None: ...
    @property
    def tokenizer(self) -> PreTrainedTokenizerFast | None: ...
    @property
    def prompt(self) -> Prompt: ...
    @property
    def item_texts(self) -> ItemTexts: ...
    @property
    def longest_prompt(self) -> int: ...
    @property
    def ranker(self) -> Ranker: ...
    def best_model(self) -> Any: ...


def write(run: Exportable, output: Path, dtype: str, filter_history: bool) -> None:
    """Writes the folder.

    Args:
      dtype: one of `save_weights.DTYPES`; "" is the base model's own.
      filter_history: whether the exported program leaves a history's items out of its list.

    Raises:
      UserError: the model can't be exported, or the folder exists or can't be written.
    """
    if dtype and dtype not in DTYPES:
        raise UserError(f'--dtype: "{dtype}" is unknown; choose one of {", ".join(DTYPES)}, or leave it out')
    if output.exists():
        raise UserError(f"{output}: exists already; remove it, or choose another --output")
    if run.config.model != "simgr":
        raise UserError(
            f'{run.workdir / "config.json"}: holds a run of "{run.config.model}"; only simgr can be exported'
        )
    model = run.best_model()
    with _new_folder(output) as folder:
        _write_model(folder, run, model, dtype)
        _write_item_index(folder / "item_index", run, model, filter_history)
        (folder / "README.md").write_text(_model_card(run, model), encoding="utf-8")
        for file in folder.rglob("*.safetensors"):  # The library makes them readable only for their owner.
            shutil.copymode(folder / "README.md", file)


@contextlib.contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder that becomes `path` if the block succeeds, and is removed if it fails."""
    with atomic_path(path) as temporary:
        try:
            temporary.mkdir()
            yield temporary
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, SafetensorError):
                raise UserError(f"{path}: can't be written ({error}); choose another --output") from error
            raise


def _write_model(folder: Path, run: Exportable, model: SimGR, dtype: str) -> None:
    """Writes config, weights and tokenizer (see `huggingface.save_weights`)."""
    tokens = TrainedTokens(run.semantic_ids.token_strings(), np.asarray(model.embedding[...]))
    if run.checkpoint is None:
        theta = run.config.backbone.rope_theta
        save_from_scratch(folder, model.backbone, theta, run.longest_prompt, tokens, dtype or None)
        return
    if model.text_embedding is not None:
        tokens = tokens._replace(text_tokens=run.prompt.text_tokens, text_embedding=model.text_embedding[...])
    save_finetuned(folder, run.checkpoint, model.backbone, run.tokenizer, tokens, dtype or None)


def _write_item_index(folder: Path, run: Exportable, model: SimGR, filter_history: bool) -> None:
    """Writes the catalog's ids, codes and vectors, and the program that ranks them."""
    # The program normalizes vectors itself.
    vectors = np.asarray(run.ranker.catalog(model), np.float32)[: run.dataset.num_items]
    arrays = {"codes": run.semantic_ids.codes.astype(np.int32), "vectors": vectors}
    if run.options.user_pooling == "attention":
        arrays["pooling"] = np.asarray(model.user_pooling.score.kernel[..., 0], np.float32)
    if model.readout is not None:
        arrays["readout"], arrays["readout_bias"] = model.readout.folded()
    if model.text_similarity is not None:
        readings = model.readings.table[: run.dataset.num_items]
        arrays["texts"] = np.asarray(model.text_similarity.of_items(readings))
        arrays["read_texts"] = np.asarray(model.text_similarity.of_read(readings))
    if model.has_collisions:
        arrays["first_with_same_codes"] = model.first_twin()
    folder.mkdir()
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, folder / "items.safetensors")
    _write_json(folder / "item_ids.json", run.dataset.item_ids)
    recipe = _recipe(run, model, filter_history)
    if recipe.reads_text:
        _write_json(folder / "item_prompts.json", _item_prompts(run))
    script = export_readme.score_script(recipe)
    (folder / "score.py").write_text(script, encoding="utf-8")
    (folder / "README.md").write_text(export_readme.index_readme(recipe, script), encoding="utf-8")


def _recipe(run: Exportable, model: SimGR, filter_history: bool) -> export_readme.Recipe:
    config, max_items = run.config, run.config.data.max_items
    all_fit = run.prompt.longest(max_items) <= run.longest_prompt
    return export_readme.Recipe(
        loading=_loading(run),
        has_per_layer_inputs=model.backbone.config.per_layer_width > 0,
        reads_text=run.options.history == "tokens",
        prefix=config.prompt.prefix,
        end_tokens=len(tokens_around_text(run.tokenizer)[1]) if run.tokenizer else 0,
        max_items=max_items,
        max_tokens=None if all_fit else run.longest_prompt,
        pooling=run.options.user_pooling,
        readout=model.options.readout,
        similarity=run.options.similarity,
        text_similarity=model.text_similarity
        and (float(model.text_similarity.weight[...]), float(model.text_similarity.decay)),
        repeat_bias=model.repeat_bias and float(model.repeat_bias.bias),
        has_collisions=model.has_collisions,
        filter_history=filter_history,
    )


def _loading(run: Exportable) -> export_config.Loading:
    config = run.checkpoint.config if run.checkpoint else None
    return export_config.loading(families.text_config(config)) if config else export_config.Loading()


def _item_prompts(run: Exportable) -> list[str]:
    """Each item's text in a prompt, such that the exported tokenizer makes of it what the model has read."""
    strings, tokens = run.semantic_ids.token_strings(), run.semantic_ids.tokens
    texts = run.item_texts.texts if run.tokenizer else [""]
    texts = texts * len(tokens) if len(texts) == 1 else texts
    return [text + "".join(strings[token] for token in codes) for text, codes in zip(texts, tokens, strict=True)]


def _write_json(path: Path, values: list[str]) -> None:
    path.write_text(json.dumps(values, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")


def _model_card(run: Exportable, model: SimGR) -> str:
    config, dataset, ids = run.config, run.dataset, run.semantic_ids
    checkpoint = config.backbone.checkpoint
    # A path means nothing elsewhere.
    path = Path(os.path.expanduser(checkpoint))
    is_local = bool(checkpoint) and path.exists()
    base = path.resolve().name if is_local else checkpoint
    how = f"LoRA of rank {config.lora.rank}, merged" if config.lora.rank else "all weights"
    facts = {
        "base model": f"{base} ({how})" if base else "none: trained from scratch",
        "dataset": dataset.name,
        "items": f"{dataset.num_items:,}",
        "semantic IDs": f"{ids.levels} codes per item, from codebooks of {', '.join(map(str, ids.codebook_sizes))}",
        "history": _history_in_words(run),
        "user": f"pooling of the hidden states: {run.options.user_pooling}",
        "readout": model.options.readout,
        "similarity": run.options.similarity,
        "computed in": f"{config.backbone.dtype}, in training",
    }
    report = run.workdir / "report" / "metrics.json"
    metrics = read_json_object(report) if report.exists() else None
    title = f"{base or 'SimGR'} as a recommender for {dataset.name}"
    return export_readme.model_card(title, None if is_local else checkpoint or None, facts, metrics, _loading(run))


def _history_in_words(run: Exportable) -> str:
    config = run.config
    newest = f"the newest {config.data.max_items} items"
    if run.options.history == "item":
        return f"{newest}, each as its vector"
    text = json.dumps(f"{config.prompt.prefix}{config.prompt.item}...", ensure_ascii=False)
    return f"{newest} as text: `{text}`".replace("|", "\\|")
