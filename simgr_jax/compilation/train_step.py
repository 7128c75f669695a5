"""A config's train step for devices that needn't be here: shapes and where they lie, in the place of arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from simgr_jax import sharding
from simgr_jax.batch import TrainBatch
from simgr_jax.compilation.jaxpr import matmul_flops
from simgr_jax.data import prompts
from simgr_jax.data.batches import TrainingWindows
from simgr_jax.data.dataset import Sequences
from simgr_jax.data.prompts import Prompt
from simgr_jax.errors import UserError
from simgr_jax.huggingface import pretrained
from simgr_jax.huggingface.tokenizer import load_tokenizer
from simgr_jax.models.create import assemble, scratch_backbone_config
from simgr_jax.models.inputs import Backbone, ModelInputs
from simgr_jax.models.recommender import Recommender
from simgr_jax.models.transformer import Transformer
from simgr_jax.preparation import cache_dir, check, load_data
from simgr_jax.semantic_ids.build import build
from simgr_jax.semantic_ids.tokenizer import SemanticIds
from simgr_jax.training import optimizer as optimizers
from simgr_jax.training.state import abstract_state, make_train_step


class Plan(NamedTuple):
    """What the shapes of a train step follow from.

    Attributes:
      hf_config: the checkpoint's, or None where the backbone is trained from scratch.
    """

    config: ml_collections.ConfigDict
    semantic_ids: SemanticIds
    prompt: Prompt
    hf_config: Any


def plan(config: ml_collections.ConfigDict, workdir: Path, num_items: int | None) -> Plan:
    """
    Args:
      workdir: where the data are prepared.
      num_items: above 0, the data are not looked at, but a catalog of so many items is assumed, with as many codes as
        the config's quantizer would give them and prompts of codes alone.

    Raises:
      UserError: what the config asks for can't be.
    """
    check(config)
    folder, hf_config = pretrained.open_config(config) if config.backbone.checkpoint else (None, None)
    if num_items:
        semantic_ids, texts, tokenizer = _assumed_codes(config, num_items), None, None
    else:
        cache = cache_dir(config, workdir)
        dataset, split = load_data(config, cache)
        semantic_ids, _ = build(config.semantic_ids, dataset, split.train, cache, config.seed)
        texts = dataset.item_texts
        tokenizer = load_tokenizer(folder, semantic_ids.token_strings()) if folder else None
    return Plan(config, semantic_ids, prompts.create(config, semantic_ids, texts, tokenizer), hf_config)


def _assumed_codes(config: ml_collections.ConfigDict, num_items: int) -> SemanticIds:
    """Item i is i in the number system of the codebook's size."""
    if prompts.has_text(config.prompt):
        raise UserError("--num_items: items that are only assumed have no text; leave out config.prompt's")
    levels, size = config.semantic_ids.quantizer.levels, config.semantic_ids.quantizer.codebook_size
    if size**levels < num_items:
        raise UserError(
            f"config.semantic_ids.quantizer.levels: {levels} levels of {size} codes can't tell {num_items} items "
            "apart; give more of them"
        )
    rest, codes = np.arange(num_items), np.empty((num_items, levels), np.int32)
    for level in reversed(range(levels)):
        rest, codes[:, level] = np.divmod(rest, size)
    return SemanticIds(codes, (size,) * levels)


def model(plan: Plan) -> Recommender:
    """With shapes for arrays."""
    config, codes = plan.config, plan.semantic_ids

    def make() -> Recommender:
        rngs = nnx.Rngs(config.seed)
        nobody = Sequences.from_lists([])
        return assemble(config, ModelInputs(codes, nobody, lambda: _backbone(plan, rngs), rngs))

    return nnx.eval_shape(make)


def _backbone(plan: Plan, rngs: nnx.Rngs) -> Backbone:
    config = plan.config
    if plan.hf_config is None:
        return Backbone(Transformer(scratch_backbone_config(config), rngs))
    longest = pretrained.longest_sequence(config, plan.prompt)
    decoder = Transformer(pretrained.backbone_config(plan.hf_config, config, longest), rngs)
    dtype, width = pretrained.base_dtype(config), decoder.config.width
    nnx.update(decoder, jax.tree.map(lambda x: x.astype(dtype), nnx.state(decoder)))
    text_tokens = len(plan.prompt.text_tokens)
    text_embedding = jnp.zeros((text_tokens, width), dtype) if text_tokens else None
    return Backbone(decoder, jnp.zeros((plan.semantic_ids.vocab_size, width)), text_embedding)


def lower(plan: Plan) -> jax.stages.Lowered:
    """The step that `training.loop.fit` runs, for the devices of the context's mesh."""
    step, arguments = _step(plan, lambda tree: jax.tree.map(_like, tree, sharding.shardings(tree)), sharding.batch_like)
    return step.lower(*arguments)


def model_flops(plan: Plan) -> int:
    """What the model needs for a step, on all devices together.

    As the model is defined, and as model FLOPs utilisation is counted (PaLM, https://arxiv.org/abs/2204.02311, appendix
    B): the matrix products of the forward pass and of the gradients that are asked for, each once. Attention counts all
    pairs of a row's positions.
    """
    config = plan.config.copy_and_resolve_references()
    config.backbone.remat, config.backbone.attention, config.loss.catalog_chunk = "none", "xla", 0
    step, arguments = _step(plan._replace(config=config), lambda tree: tree, lambda batch: batch)
    return matmul_flops(jax.make_jaxpr(step)(*arguments))


def _like(x: jax.ShapeDtypeStruct, where: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def _step(plan: Plan, place, place_batch) -> tuple[Any, tuple]:
    """The step and its arguments, of which `place` and `place_batch` say where they lie."""
    config = plan.config
    recommender = model(plan)
    graphdef, parameters, rest = nnx.split(recommender, nnx.Param, ...)
    # Any number of steps: it is not in the shapes.
    optimizer = optimizers.create(config.optimizer, 1000 * config.optimizer.accumulate_steps)
    state = place(abstract_state(parameters, optimizer, config.training.ema_decay))
    step = make_train_step(graphdef, optimizer, config.training.ema_decay, config.seed, state)
    return step, (state, place(rest), place_batch(_batch(plan, recommender.windows)))


def _batch(plan: Plan, kind: str) -> TrainBatch:
    config = plan.config
    two_items = Sequences.from_lengths(np.zeros(2, np.int64), np.array([2]))
    windows = TrainingWindows(two_items, plan.prompt, config.data.max_items, config.training.row_length, kind)
    return windows.batch_like(config.training.batch_rows)
