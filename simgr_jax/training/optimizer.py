"""AdamW with warm-up and cosine decay, clipping, and weight decay only where it belongs.

A checkpoint's backbone has rates of its own, and may be frozen at first. So has an LLM that reads items' texts.
"""

from __future__ import annotations

from collections.abc import Collection

import jax
import ml_collections
import optax
from flax import nnx

from simgr_jax.errors import UserError
from simgr_jax.models import registry

_NOT_DECAYED = ("embedding", "scale", "bias")
# The parts of a model that a checkpoint fills, by their names in the model: the backbone's, and the item reader's.
# LoRA's adapters are within them.
_BACKBONE, _ITEM_READER = ("backbone", "text_embedding"), ("readings",)


def learning_rate_schedule(config: ml_collections.ConfigDict, num_steps: int, restart_step: int = 0) -> optax.Schedule:
    """Linear warm-up for `warmup_fraction` of the steps, then a cosine down to `final_fraction` of the peak.

    Args:
      restart_step: the steps before it and the steps from it on each have a schedule of their own; 0 has one for all.
    """
    if restart_step:
        parts = [restart_step, num_steps - restart_step]
        return optax.join_schedules([learning_rate_schedule(config, part) for part in parts], [restart_step])
    warmup_steps = max(1, round(config.warmup_fraction * num_steps))
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=warmup_steps,
        decay_steps=max(num_steps, warmup_steps + 1),
        end_value=config.final_fraction * config.learning_rate,
    )


def decays(params: nnx.State) -> nnx.State:
    """True for matrices that multiply activations; False for embeddings, norms, biases and the temperature.

    The parameter's name decides, because stacking layers also makes matrices of norms and biases.
    """

    def is_weight(path, leaf) -> bool:
        return leaf.ndim >= 2 and not any(name in jax.tree_util.keystr(path) for name in _NOT_DECAYED)

    return jax.tree_util.tree_map_with_path(is_weight, params)


def pretrained_parts(config: ml_collections.ConfigDict) -> tuple[str, ...]:
    """The names of the model's parts that begin with an LLM's weights and are trained."""
    backbone = _BACKBONE if registry.has_checkpoint(config) else ()
    return backbone + (_ITEM_READER if registry.trains_item_reader(config) else ())


def split_parts(params: nnx.State, parts: Collection[str]) -> tuple[nnx.State, nnx.State]:
    """The parameters of all other parts of a model, and those of these parts."""
    return nnx.split_state(params, lambda path, _: path[0] not in parts, ...)


def frozen_steps(config: ml_collections.ConfigDict, steps_per_epoch: int) -> int:
    """How many batches a run begins with in which its pretrained parts are frozen; a multiple of
    `optimizer.accumulate_steps`."""
    epochs, accumulated = config.training.freeze_epochs, config.optimizer.accumulate_steps
    if not epochs or not pretrained_parts(config):
        return 0
    return accumulated * max(1, round(epochs * steps_per_epoch / accumulated))


def create(
    config: ml_collections.ConfigDict, steps_per_epoch: int, frozen: bool = False
) -> optax.GradientTransformation:
    """The optimizer of a run. Every `optimizer.accumulate_steps` batches make one update.

    There are up to three groups, each with its own schedule and its own norm for clipping: the new parts; a
    checkpoint's backbone, whose rates are `optimizer.backbone`; and the LLM that reads items' texts, whose rates are
    `optimizer.item_reader`. The schedules of the latter two begin after the batches of `frozen_steps`.

    Args:
      config: `optimizer` and `training` are read.
      steps_per_epoch: batches.
      frozen: makes the optimizer for the batches of `frozen_steps`. It ignores the gradients of the pretrained parts,
        and leaves their parameters and their state as they are; the state has the same structure as without.

    Raises:
      UserError: there are too few batches for one update.
    """
    options = config.optimizer
    num_steps, accumulated = config.training.epochs * steps_per_epoch, options.accumulate_steps
    if num_steps < accumulated:
        raise UserError(
            f"config.optimizer.accumulate_steps: {accumulated} batches make an update, but training has only "
            f"{num_steps}; lower it"
        )
    restart_step = options.restart_epoch * steps_per_epoch
    of_groups = {"new": _adamw(options, num_steps, restart_step)}
    thawed = frozen_steps(config, steps_per_epoch)
    pretrained = {"backbone": registry.has_checkpoint(config), "item_reader": registry.trains_item_reader(config)}
    for name in (name for name, exists in pretrained.items() if exists):
        rates = ml_collections.ConfigDict({**options, **options[name]})
        group = _adamw(rates, max(num_steps - thawed, 0), max(restart_step - thawed, 0))
        of_groups[name] = _at_rest(group) if frozen else group
    if len(of_groups) == 1:
        return of_groups["new"]
    return optax.partition(of_groups, lambda params: groups(params, of_groups))


def _adamw(options: ml_collections.ConfigDict, num_steps: int, restart_step: int) -> optax.GradientTransformation:
    """
    Args:
      num_steps: batches.
      restart_step: the batch from which on the learning rate has a schedule of its own; 0 is none.
    """
    accumulated = options.accumulate_steps
    optimizer = optax.chain(
        optax.clip_by_global_norm(options.clip_norm) if options.clip_norm else optax.identity(),
        optax.adamw(
            learning_rate_schedule(options, num_steps // accumulated, restart_step // accumulated),
            b1=options.beta1,
            b2=options.beta2,
            weight_decay=options.weight_decay,
            mask=decays,
        ),
    )
    return optax.MultiSteps(optimizer, accumulated).gradient_transformation() if accumulated > 1 else optimizer


def _at_rest(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Has the optimizer's state, but changes nothing."""
    return optax.GradientTransformation(
        optimizer.init, lambda updates, state, params=None: (optax.tree.zeros_like(updates), state)
    )


def groups(params: nnx.State, names: Collection[str] = ("new", "backbone", "item_reader")) -> nnx.State:
    """The name of each parameter's group; "new" for those of a group that is not among `names`."""
    of_part = dict.fromkeys(_BACKBONE, "backbone") | dict.fromkeys(_ITEM_READER, "item_reader")

    def name(path: tuple, _: jax.Array) -> str:
        group = of_part.get(path[0].key, "new")
        return group if group in names else "new"

    return jax.tree_util.tree_map_with_path(name, params)
