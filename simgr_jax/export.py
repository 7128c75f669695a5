"""Writes a run's best model as a folder for Transformers, with its catalog as an item index.

    python -m simgr_jax.export --workdir=DIR --output=DIR [--dtype=float32]

`AutoModel.from_pretrained(OUTPUT)` and `AutoTokenizer.from_pretrained(OUTPUT)` load it, and OUTPUT/item_index/score.py
ranks the catalog for a history in plain torch (docs/export.md).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import ml_collections
import numpy as np
from absl import flags
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import save_file

from simgr_jax import cli
from simgr_jax.cache import atomic_path
from simgr_jax.data import prompts
from simgr_jax.errors import UserError
from simgr_jax.files import read_json_object
from simgr_jax.huggingface import export_readme
from simgr_jax.huggingface.save import DTYPES, save_finetuned, save_from_scratch
from simgr_jax.models.simgr import SimGR
from simgr_jax.preparation import Prepared, prepare, restore_best


class Run(NamedTuple):
    """A finished run.

    Attributes:
      model: with its best parameters; those that `prepared` began with are given up.
    """

    config: ml_collections.ConfigDict
    prepared: Prepared
    model: SimGR


def main() -> None:
    dtype = flags.FLAGS.dtype
    output = cli.required_path("output")
    if dtype and dtype not in DTYPES:
        raise UserError(f'--dtype: "{dtype}" is unknown; choose one of {", ".join(DTYPES)}, or leave it out')
    if output.exists():
        raise UserError(f"{output}: is there already; remove it, or choose another --output")
    config, workdir = cli.open_run()
    run = load_run(config, workdir)
    with _new_folder(output) as folder:
        write_model(folder, run, dtype)
        write_item_index(folder / "item_index", run)
        (folder / "README.md").write_text(_model_card(run, workdir), encoding="utf-8")
        for file in folder.rglob("*.safetensors"):  # Which the library makes for its owner alone.
            shutil.copymode(folder / "README.md", file)
    print(f"the model is in {output}, its catalog in {output / 'item_index'}")


def load_run(config: ml_collections.ConfigDict, workdir: Path) -> Run:
    """The run in a workdir.

    Raises:
      UserError: something that it depends on is gone.
    """
    if config.model.name != "simgr":
        raise UserError(f'{workdir / "config.json"}: holds a run of "{config.model.name}"; only SimGR can be exported')
    prepared = prepare(config, workdir)
    params, rest, _ = restore_best(prepared, workdir)
    return Run(config, prepared, nnx.merge(nnx.graphdef(prepared.model), params, rest))


@contextlib.contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder that becomes `path` if the block ends well, and is removed if not."""
    with atomic_path(path) as temporary:
        try:
            temporary.mkdir()
            yield temporary
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, SafetensorError):
                raise UserError(f"{path}: can't be written ({error}); choose a folder that can") from error
            raise


def write_model(folder: Path, run: Run, dtype: str) -> None:
    """Config, weights and tokenizer (see `huggingface.save`); dtype "" is the LLM's own."""
    model, strings = run.model, run.prepared.semantic_ids.token_strings()
    embedding = np.asarray(model.embedding[...])
    if run.prepared.llm is None:
        config = run.config
        theta, length = config.backbone.rope_theta, config.training.row_length
        save_from_scratch(folder, model.backbone, theta, length, strings, embedding, dtype or None)
        return
    text = {}
    if model.text_embedding is not None:
        text = {"text_tokens": run.prepared.prompt.text_tokens, "text_embedding": model.text_embedding[...]}
    save_finetuned(
        folder,
        run.prepared.llm,
        model.backbone,
        run.prepared.tokenizer,
        strings,
        embedding,
        **text,
        dtype=dtype or None,
    )


def write_item_index(folder: Path, run: Run) -> None:
    """The catalog's ids, codes and vectors, and the program that ranks them."""
    model = run.model
    graphdef, state = nnx.split(model)
    vectors = jax.jit(lambda state: nnx.merge(graphdef, state).catalog())(state)
    arrays = {"codes": run.prepared.semantic_ids.codes.astype(np.int32), "vectors": np.asarray(vectors, np.float32)}
    if run.config.model.user_pooling == "attention":
        arrays["pooling"] = np.asarray(model.user_pooling.score.kernel[..., 0], np.float32)
    if model.has_collisions:
        arrays["first_with_same_codes"] = model.first_with_same_tokens()
    folder.mkdir()
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, folder / "items.safetensors")
    _write_json(folder / "item_ids.json", run.prepared.dataset.item_ids)
    recipe = _recipe(run)
    if recipe.reads_text:
        _write_json(folder / "item_prompts.json", _item_prompts(run))
    script = export_readme.score_script(recipe)
    (folder / "score.py").write_text(script, encoding="utf-8")
    (folder / "README.md").write_text(export_readme.index_readme(recipe, script), encoding="utf-8")


def _recipe(run: Run) -> export_readme.Recipe:
    config, model = run.config, run.model
    all_fit = run.prepared.prompt.longest(config.data.max_items) <= config.training.row_length
    return export_readme.Recipe(
        reads_text=config.model.history == "tokens",
        prefix=config.prompt.prefix,
        end_tokens=len(prompts.tokens_around_text(run.prepared.tokenizer)[1]) if run.prepared.tokenizer else 0,
        max_items=config.data.max_items,
        max_tokens=None if all_fit else config.training.row_length,
        embedding_scale=model.backbone.config.embedding_scale,
        pooling=config.model.user_pooling,
        similarity=config.model.similarity,
        has_collisions=model.has_collisions,
        filter_history=config.evaluation.filter_history,
    )


def _item_prompts(run: Run) -> list[str]:
    """The text that `data.prompts.text_prompt` makes the inputs of, for each item."""
    prepared, config = run.prepared, run.config.prompt
    strings, tokens = prepared.semantic_ids.token_strings(), prepared.semantic_ids.tokens
    texts = prompts.texts_before_codes(
        config.item, prepared.tokenizer, prepared.dataset.item_texts, config.max_title_tokens
    )
    texts = texts * len(tokens) if len(texts) == 1 else texts
    return [text + "".join(strings[token] for token in codes) for text, codes in zip(texts, tokens, strict=True)]


def _write_json(path: Path, values: list[str]) -> None:
    path.write_text(json.dumps(values, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")


def _model_card(run: Run, workdir: Path) -> str:
    config, dataset, ids = run.config, run.prepared.dataset, run.prepared.semantic_ids
    checkpoint = config.backbone.checkpoint
    # A folder's place says nothing elsewhere.
    folder = Path(os.path.expanduser(checkpoint))
    is_folder = bool(checkpoint) and folder.is_dir()
    base = folder.resolve().name if is_folder else checkpoint
    how = f"LoRA of rank {config.lora.rank}, merged" if config.lora.rank else "all weights"
    facts = {
        "base model": f"{base} ({how})" if base else "none: trained from scratch",
        "dataset": dataset.name,
        "items": f"{dataset.num_items:,}",
        "semantic IDs": f"{ids.levels} codes an item, of {', '.join(map(str, ids.codebook_sizes))}",
        "history": _history_in_words(config),
        "user": f"pooling of the hidden states: {config.model.user_pooling}",
        "similarity": config.model.similarity,
    }
    report = workdir / "report" / "metrics.json"
    metrics = read_json_object(report) if report.exists() else None
    title = f"{base or 'SimGR'} as a recommender for {dataset.name}"
    return export_readme.model_card(title, None if is_folder else checkpoint or None, facts, metrics)


def _history_in_words(config: ml_collections.ConfigDict) -> str:
    newest = f"the newest {config.data.max_items} items"
    if config.model.history == "item":
        return f"{newest}, each as its vector"
    text = json.dumps(f"{config.prompt.prefix}{config.prompt.item}...", ensure_ascii=False)
    return f"{newest} as text: `{text}`".replace("|", "\\|")


if __name__ == "__main__":
    cli.define_run()
    flags.DEFINE_string("output", None, "The folder to write; it must not be there yet.")
    flags.DEFINE_string("dtype", "", "Of the weights: float32 or bfloat16; the base model's own if left out.")
    cli.run(main)
