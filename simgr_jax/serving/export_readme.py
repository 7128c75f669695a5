"""The texts of an exported model: its model card, and the program that scores items with plain torch."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Iterator, Mapping
from typing import Any

from simgr_jax.evaluation import metrics as metrics_lib
from simgr_jax.huggingface.export_config import Loading


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to compute a user's scores, once the model and the item index are loaded.

    Attributes:
      loading: how Transformers loads the model.
      has_per_layer_inputs: whether the layers also read embeddings of their own, which the items' vectors do not have.
      reads_text: whether a history is read as text, which joins its items' prompts, or as the items' vectors.
      prefix: text before the first item.
      end_tokens: how many tokens the tokenizer adds after a text; the run left them out.
      max_items: how many of a history's newest items are read.
      max_tokens: the most tokens that a prompt may have; None if all prompts fit.
      pooling: one of `user_pooling.POOLINGS`.
      readout: how the user's state becomes the user's vector, "state" or "last_item" (see `models.readout`).
      similarity: "cosine" or "dot".
      text_similarity: the weight and the decay of `text_similarity.TextSimilarity`; None if it is no part of the score.
      repeat_bias: what is added to the scores of a history's items; None if nothing is.
      has_collisions: whether some items have the same codes (and text), and so the same score.
      filter_history: whether a history's items are left out of its list.
    """

    loading: Loading
    has_per_layer_inputs: bool
    reads_text: bool
    prefix: str
    end_tokens: int
    max_items: int
    max_tokens: int | None
    pooling: str
    readout: str
    similarity: str
    text_similarity: tuple[float, float] | None
    repeat_bias: float | None
    has_collisions: bool
    filter_history: bool


_SCRIPT = string.Template('''"""Prints the ten items that the model ranks first after a history, with their scores.

    python score.py ITEM_ID ITEM_ID ...        (oldest first)
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
$imports

here = Path(__file__).resolve().parent
item_ids = json.loads((here / "item_ids.json").read_text(encoding="utf-8"))
items = load_file(here / "items.safetensors")
model = $model.eval()
$loading
history = [item_ids.index(item) for item in sys.argv[1:]]
newest = history[-$max_items:]
${inputs}with torch.no_grad():
    states = model($model_inputs).last_hidden_state[0]
$scoring
for item in scores.argsort(descending=True, stable=True)[:10].tolist():
    print(item_ids[item], f"{scores[item]:.4f}")
''')

_POOLING = {
    "last": "user = states[-1]",
    "mean": "user = states.mean(dim=0)",
    "attention": 'user = (states @ items["pooling"]).softmax(dim=0) @ states',
}


def score_script(recipe: Recipe) -> str:
    """A program of about 20 lines that needs torch, transformers and safetensors only."""
    if recipe.reads_text:
        parts = {
            "loading": "tokenizer = AutoTokenizer.from_pretrained(here.parent)\n"
            'prompts = json.loads((here / "item_prompts.json").read_text(encoding="utf-8"))\n',
            "inputs": _text_inputs(recipe),
            "model_inputs": "torch.tensor([tokens])",
        }
    else:
        # Looked up, because versions of Transformers differ in whether they scale embeddings that they are given.
        loading = 'model.get_input_embeddings().weight.data = items["vectors"]  # a position per item\n'
        if recipe.has_per_layer_inputs:
            layers = "model.embed_tokens_per_layer.weight"
            loading += f"{layers}.data = torch.zeros(len(item_ids), {layers}.shape[1])\n"
        parts = {
            "loading": loading,
            "inputs": "",
            "model_inputs": "torch.tensor([newest])",
        }
    return _SCRIPT.substitute(
        parts,
        imports="\n".join(_imports(recipe)),
        model=recipe.loading.code("here.parent", ", dtype=torch.float32"),
        max_items=recipe.max_items,
        scoring="\n".join(_scoring(recipe)),
    )


def _imports(recipe: Recipe) -> Iterator[str]:
    if recipe.similarity == "cosine" or recipe.text_similarity:
        yield "from torch.nn.functional import normalize"
    yield f"from transformers import {recipe.loading.auto_class}{', AutoTokenizer' if recipe.reads_text else ''}"


def _text_inputs(recipe: Recipe) -> str:
    prefix = f"{recipe.prefix!r} + " if recipe.prefix else ""
    end = f"[:-{recipe.end_tokens}]" if recipe.end_tokens else ""

    def tokens(items: str) -> str:
        return f'tokens = tokenizer({prefix}"".join(prompts[item] for item in {items})).input_ids{end}'

    if recipe.max_tokens is None:
        return f"{tokens('newest')}\n"
    return (
        "for start in range(len(newest)):  # those that fit\n"
        f"    {tokens('newest[start:]')}\n"
        f"    if len(tokens) <= {recipe.max_tokens}:\n"
        "        break\n"
    )


def _scoring(recipe: Recipe) -> Iterator[str]:
    yield _POOLING[recipe.pooling]
    if recipe.readout == "last_item":
        last = 'items["vectors"][history[-1]]'
        last = f"normalize({last}, dim=0)" if recipe.similarity == "cosine" else last
        yield f'user = {last} + user @ items["readout"] + items["readout_bias"]'
    if recipe.similarity == "cosine":
        yield 'scores = normalize(items["vectors"], dim=1) @ normalize(user, dim=0)'
    else:
        yield 'scores = items["vectors"] @ user'
    if recipe.text_similarity:
        weight, decay = recipe.text_similarity
        read = f'{decay!r} ** age * items["read_texts"][item]'
        yield f"text = sum({read} for age, item in enumerate(reversed(history)))"
        yield f'scores += items["texts"] @ ({weight!r} * normalize(text, dim=0))'
    if recipe.has_collisions:
        yield 'scores = scores[items["first_with_same_codes"].long()]  # items with the same codes share a score'
    if recipe.repeat_bias is not None:
        yield f"scores[history] += {recipe.repeat_bias!r}"
    if recipe.filter_history:
        yield "scores[history] = -torch.inf"


_INDEX_README = string.Template("""# Item index

| file | content |
|---|---|
| `item_ids.json` | the items' ids, a list; an item's index is its place in it |
| `items.safetensors` | $tensors |
$prompts| `score.py` | the program below |

`python score.py ITEM_ID ITEM_ID ...` prints the ten items that the model in the folder above ranks first after this
history. It needs torch, transformers ($since or newer) and safetensors, and computes in float32:

```python
$script```

The same scores with numpy, for the program's `user` [D]$text:

```python
items = safetensors.numpy.load_file("items.safetensors")
vectors = items["vectors"]
best = np.argsort(-($numpy))[:10]
```
""")


def index_readme(recipe: Recipe, script: str) -> str:
    """README.md of the item index; it shows `script`, which is score.py."""
    tensors = "`codes` int32 [N, L], the semantic IDs; `vectors` float32 [N, D], not normalized"
    if recipe.pooling == "attention":
        tensors += "; `pooling` float32 [D], which scores the hidden states for their weighted mean, the user's state"
    if recipe.readout == "last_item":
        tensors += (
            "; `readout` float32 [D, D] and `readout_bias` float32 [D], which map the user's state to what is added to "
            "the last item's vector"
        )
    if recipe.text_similarity:
        tensors += (
            "; `texts` float32 [N, X], what an LLM made of each item's text, compared with the history's `read_texts`"
        )
    if recipe.has_collisions:
        tensors += "; `first_with_same_codes` int32 [N], for each item the first item with the same codes"
    prompts = ""
    if recipe.reads_text:
        prompts = (
            "| `item_prompts.json` | the text that the model reads of each item, a list; control tokens in titles "
        )
        prompts += "have a blank, so that `tokenizer(text)` reads them as text, as in training |\n"
    cosine = " / np.linalg.norm(vectors, axis=1)" if recipe.similarity == "cosine" else ""
    numpy, text = f"vectors @ user{cosine}", ""
    if recipe.text_similarity:
        weight, _ = recipe.text_similarity
        text += " and `text` [X]"
        numpy += " / np.linalg.norm(user)" if recipe.similarity == "cosine" else ""
        numpy += f' + items["texts"] @ text / np.linalg.norm(text) * {weight!r}'
    if recipe.repeat_bias is not None:
        text += ", before the history's items get the bias that the program adds"
    return _INDEX_README.substitute(
        since=recipe.loading.since, tensors=tensors, prompts=prompts, script=script, numpy=numpy, text=text
    )


_MODEL_CARD = string.Template("""---
library_name: transformers
pipeline_tag: feature-extraction
tags: [recommendation, semantic-ids, simgr]
$base_model---

# $title

A recommender that scores items instead of generating them: the model reads a user's history once, its hidden state
represents the user, and every item of the catalog is scored by its similarity to that state (SimGR,
https://arxiv.org/abs/2602.07847). Trained with simgr_jax.

| | |
|---|---|
$facts
$metrics
## Use

With transformers $since or newer:

```python
from transformers import $auto_class, AutoTokenizer

model = $model
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
```

`item_index/` has the catalog's ids, semantic IDs and vectors, and `score.py`, which ranks them for a history
(`item_index/README.md`): `python item_index/score.py ITEM_ID ITEM_ID ...`
""")


def model_card(
    title: str,
    base_model: str | None,
    facts: Mapping[str, Any],
    metrics: Mapping[str, Any] | None,
    loading: Loading,
) -> str:
    """README.md of the model.

    Args:
      base_model: its hub id, if it has one.
      facts: by name.
      metrics: as in report/metrics.json; None if there are none.
      loading: how Transformers loads the model.
    """
    return _MODEL_CARD.substitute(
        since=loading.since,
        auto_class=loading.auto_class,
        model=loading.code('"THIS_FOLDER"'),
        title=title,
        base_model=f"base_model: {base_model}\n" if base_model else "",
        facts="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
        metrics=_metrics_section(metrics) if metrics else "",
    )


def _metrics_section(metrics: Mapping[str, Any]) -> str:
    """The metrics of the model and of the rankings that it was compared with, with 95% intervals."""
    prefixes = {"this model": ""} | {
        key.removesuffix("/HR@10"): key.removesuffix("HR@10") for key in metrics if key.endswith("/HR@10")
    }
    rows = [["metric", *prefixes], ["---"] * (1 + len(prefixes))]
    for metric in metrics_lib.names():
        cells = []
        for prefix in prefixes.values():
            value, low, high = (metrics[f"{prefix}{metric}{end}"] for end in ("", "/ci95_low", "/ci95_high"))
            cells.append(f"{value:.4f} ({low:.4f} to {high:.4f})")
        rows.append([metric, *cells])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    cases = f"{metrics['num_cases']:,} {metrics['split']} cases of {metrics['dataset']}"
    where = f"ranked over all {metrics['num_items']:,} items, with 95% bootstrap intervals"
    return f"\n## Metrics\n\n{cases}, {where}:\n\n{table}\n"
