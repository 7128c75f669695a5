"""A config's train step with shapes and shardings in place of arrays, for devices that need not be present."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from simgr_jax.compilation.jaxpr import matmul_flops
from simgr_jax.data.dataset import Sequences
from simgr_jax.devices import sharding
from simgr_jax.errors import UserError
from simgr_jax.huggingface import families, item_reader, pretrained
from simgr_jax.huggingface.checkpoint import read_config
from simgr_jax.huggingface.llm_tokenizer import load_tokenizer
from simgr_jax.inputs import prompts
from simgr_jax.inputs.prompts import ItemContents
from simgr_jax.inputs.training_windows import SHORTEST_ROW, TrainingWindows
from simgr_jax.models import lora, registry
from simgr_jax.models.model_inputs import Backbone, Memory, ModelInputs
from simgr_jax.models.recommender import Recommender
from simgr_jax.models.scratch import scratch_config
from simgr_jax.models.text_reader import TextReader
from simgr_jax.models.transformer import Transformer
from simgr_jax.run import Run
from simgr_jax.semantic_ids.codes import SemanticIds
from simgr_jax.training import optimizer as optimizers
from simgr_jax.training import steps
from simgr_jax.training.state import abstract_state, make_train_step

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast


class PlannedRun(Run):
    """A run to compile, not to train. It needs only its LLM's config, and can assume a catalog instead of data."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        workdir: Path,
        num_items: int | None = None,
        platform: str | None = None,
    ):
        """
        Args:
          workdir: the folder for the prepared data.
          num_items: if given, assumes a catalog of this size instead of reading the data. Its items have as many codes
            as the config's quantizer gives, and prompts consist of codes only.
          platform: JAX's name of the devices that it is planned for; None is this machine's.

        Raises:
          UserError: the config has an invalid value.
        """
        super().__init__(config, workdir, platform)
        self._num_items = num_items

    def with_config(self, config: ml_collections.ConfigDict) -> PlannedRun:
        """The same run with another config, reusing prepared data."""
        other = copy.copy(self)
        other.config, other.options = config, registry.options_of(config)
        return other

    @functools.cached_property
    def llm_config(self) -> PretrainedConfig | None:
        """The LLM's config; None if the backbone is trained from scratch."""
        return read_config(self._llm_path, self.config.backbone.first_layers) if self._has_llm else None

    @functools.cached_property
    def _llm_path(self) -> Path:
        return pretrained.checkpoint_path(self.config.backbone.checkpoint, weights=False)

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast | None:
        if not self._has_llm or self._num_items or self.semantic_ids is None:
            return None
        return load_tokenizer(self._llm_path, self.semantic_ids.token_strings())

    @functools.cached_property
    def _ids(self) -> tuple[SemanticIds | None, dict[str, Any]]:
        if not self._num_items or not self.options.reads_semantic_ids:
            return super()._ids
        return _assumed_codes(self.config, self._num_items), {}

    @property
    def items(self) -> ItemContents:
        return ItemContents(self._num_items, self.semantic_ids) if self._num_items else super().items

    @functools.cached_property
    def item_readings(self) -> Float[np.ndarray, "N X"]:
        """Random ones: the step does not depend on what the LLM reads, and its weights may not be here."""
        # Not those of `items`, whose codes may be fitted to readings.
        count = self._num_items or self.dataset.num_items
        return np.random.default_rng(0).standard_normal((count, self._reading_width), np.float32)

    @property
    def _reading_width(self) -> int:
        return families.text_config(self._reader_config).hidden_size

    @functools.cached_property
    def _reader_config(self) -> PretrainedConfig:
        return read_config(pretrained.item_reader_path(self.config, weights=False))

    def text_reader(self, room: int, rngs: nnx.Rngs) -> TextReader:
        """With texts of the greatest length."""
        count, longest, config = self.items.num_items, self.config.item_reader.max_tokens, self.config
        options = {"max_length": longest, "dtype": config.backbone.dtype, "remat": config.backbone.remat}
        shape = families.transformer_config(self._reader_config, **options)
        shape = shape.first_layers(item_reader.layers_read(self._reader_config, config.item_reader.depth))
        decoder = Transformer(shape, rngs)
        nnx.update(decoder, jax.tree.map(lambda x: x.astype(shape.dtype), nnx.state(decoder)))
        lora.add(decoder, registry.item_reader_adapters(config), rngs, "the LLM of config.item_reader")
        words = families.text_config(self._reader_config).vocab_size
        embedding = jnp.zeros((words, shape.input_width), shape.dtype)
        whitening = jnp.zeros(shape.width), jnp.zeros((shape.width, shape.width))
        lengths, tokens = np.full(count, longest, np.int32), np.zeros((count, longest), np.int32)
        return TextReader(decoder, embedding, tokens, lengths, *whitening, room)

    @functools.cached_property
    def windows(self) -> TrainingWindows:
        """Assumed items have histories of `data.max_items`."""
        if not self._num_items:
            return super().windows
        two_items, max_items = Sequences.from_lengths(np.zeros(2, np.int64), np.array([2])), self.config.data.max_items
        longest = self.prompt.longest(max_items + (self.options.windows == "with_target"))
        row_length = self.config.training.row_length or max(SHORTEST_ROW, longest)
        return TrainingWindows(two_items, self.prompt, max_items, row_length, self.options.windows)

    @property
    def batch_rows(self) -> int:
        """The rows of a batch. Assumed items have many users."""
        if self._num_items and not self.config.training.batch_rows:
            return steps.round_rows(steps.ROWS[0], self.config)
        return super().batch_rows

    def abstract_model(self) -> Recommender:
        """The model with shapes in place of arrays.

        Raises:
          UserError: it is not trained, so there is no step to compile.
        """
        if not self.options.is_trained:
            raise UserError(f'config.model: "{self.config.model}" is not trained, so there is no step to compile')
        # Files are read before the tracing.
        items, _ = self.items, self.longest_sequence
        if self.options.trains_item_reader:
            _ = self._reader_config

        def readings() -> Float[Array, "N X"]:
            # Nothing is made of an assumed catalog, which may be large.
            return jnp.zeros((items.num_items, self._reading_width)) if self._num_items else self.item_readings

        def make() -> Recommender:
            rngs, nobody = nnx.Rngs(self.config.seed), Sequences.from_lists([])
            backbone = lambda: self._backbone(rngs)  # noqa: E731
            reader = lambda room: self.text_reader(room, rngs)  # noqa: E731
            inputs = ModelInputs(items.num_items, items.semantic_ids, nobody, backbone, rngs, readings, reader)
            return registry.assemble(self.config, inputs)

        return nnx.eval_shape(make)

    def _backbone(self, rngs: nnx.Rngs) -> Backbone:
        if self.llm_config is None:
            return Backbone(Transformer(scratch_config(self.config), rngs))
        shape = pretrained.backbone_config(self.llm_config, self.config, self.longest_sequence)
        decoder, dtype = Transformer(shape, rngs), pretrained.base_dtype(self.config)
        nnx.update(decoder, jax.tree.map(lambda x: x.astype(dtype), nnx.state(decoder)))
        text_tokens = len(self.prompt.text_tokens)
        text_embedding = jnp.zeros((text_tokens, shape.input_width), dtype) if text_tokens else None
        return Backbone(decoder, jnp.zeros((self.semantic_ids.vocab_size, shape.width)), text_embedding)


def _assumed_codes(config: ml_collections.ConfigDict, num_items: int) -> SemanticIds:
    """Item i's codes are the digits of i in base `codebook_size`."""
    if prompts.has_text(config.prompt):
        raise UserError("--num_items: assumed items have no text; remove the text from config.prompt")
    levels, size = config.semantic_ids.quantizer.levels, config.semantic_ids.quantizer.codebook_size
    if size**levels < num_items:
        raise UserError(
            f"config.semantic_ids.quantizer.levels: {levels} levels of {size} codes can't distinguish {num_items} "
            "items; use more levels"
        )
    rest, codes = np.arange(num_items), np.empty((num_items, levels), np.int32)
    for level in reversed(range(levels)):
        rest, codes[:, level] = np.divmod(rest, size)
    return SemanticIds(codes, (size,) * levels)


def lower(run: PlannedRun) -> jax.stages.Lowered:
    """The same step as in `training.loop.fit`, for the devices of the context's mesh."""
    step, arguments = _step(run, lambda tree: jax.tree.map(_like, tree, sharding.shardings(tree)), sharding.batch_like)
    return step.lower(*arguments)


def model_flops(run: PlannedRun) -> int:
    """The operations that the model needs for a step, on all devices together.

    Counted as for model FLOPs utilisation (PaLM, https://arxiv.org/abs/2204.02311, appendix B): the matrix products of
    the forward pass and of the gradients, each once. Attention counts all pairs of positions in a row.
    """
    config = run.config.copy_and_resolve_references().unlock()
    config.backbone.remat, config.backbone.attention, config.simgr.catalog_chunk = "none", "xla", 0
    step, arguments = _step(run.with_config(config.lock()), lambda tree: tree, lambda batch: batch)
    return matmul_flops(jax.make_jaxpr(step)(*arguments))


def _like(x: jax.ShapeDtypeStruct, where: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def _step(run: PlannedRun, place: Callable, place_batch: Callable) -> tuple[Any, tuple]:
    """The step and its arguments, to which `place` and `place_batch` give their shardings."""
    ema_decay = run.config.training.ema_decay
    graphdef, parameters, memory, rest = nnx.split(run.abstract_model(), nnx.Param, Memory, ...)
    # The number of steps is arbitrary: no shape depends on it.
    optimizer = optimizers.create(run.config, 1000 * run.config.optimizer.accumulate_steps)
    state = place(abstract_state(parameters, optimizer, ema_decay, memory))
    step = make_train_step(graphdef, optimizer, ema_decay, run.config.seed, state)
    return step, (state, place(rest), place_batch(run.windows.batch_like(run.batch_rows)))
