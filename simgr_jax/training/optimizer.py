"""AdamW with warm-up and cosine decay, clipping, and weight decay only where it belongs."""

from __future__ import annotations

import jax
import ml_collections
import optax
from flax import nnx

from simgr_jax.errors import UserError

_NOT_DECAYED = ("embedding", "scale", "bias")


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


def create(config: ml_collections.ConfigDict, num_steps: int, restart_step: int = 0) -> optax.GradientTransformation:
    """The optimizer for `num_steps` batches; every `config.accumulate_steps` of them make one update.

    Args:
      restart_step: the batch from which on the learning rate has a schedule of its own; 0 is none.

    Raises:
      UserError: there are too few batches for one update.
    """
    num_updates = num_steps // config.accumulate_steps
    if not num_updates:
        raise UserError(
            f"config.optimizer.accumulate_steps: {config.accumulate_steps} batches make an update, but training "
            f"has only {num_steps}; lower it"
        )
    optimizer = optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.adamw(
            learning_rate_schedule(config, num_updates, restart_step // config.accumulate_steps),
            b1=config.beta1,
            b2=config.beta2,
            weight_decay=config.weight_decay,
            mask=decays,
        ),
    )
    if config.accumulate_steps > 1:
        return optax.MultiSteps(optimizer, config.accumulate_steps).gradient_transformation()
    return optimizer
