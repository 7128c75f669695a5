"""SASRec: a causal Transformer over items (Kang & McAuley, ICDM 2018, arXiv 1808.09781)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx
from jaxtyping import Array, Float, Int

from simgr_jax.batch import RankBatch
from simgr_jax.errors import UserError
from simgr_jax.models.inputs import ModelInputs
from simgr_jax.models.item_sequence import ItemSequenceModel, encoder_config
from simgr_jax.models.transformer import Transformer

LOSSES = ("full", "binary")


def create(config: ml_collections.ConfigDict, inputs: ModelInputs) -> SASRec:
    """
    Raises:
      UserError: a value that the model can't have.
    """
    shape, loss = encoder_config(config, activation="relu"), config.sasrec.loss
    if loss not in LOSSES:
        raise UserError(f'config.sasrec.loss: "{loss}" is unknown; choose one of {", ".join(LOSSES)}')
    if loss == "binary" and config.loss.label_smoothing:
        raise UserError('config.loss.label_smoothing: is not for config.sasrec.loss = "binary"; set it to 0')
    return SASRec(Transformer(shape, inputs.rngs), config, inputs, binary=loss == "binary")


class SASRec(ItemSequenceModel):
    """Positions count from the oldest item of what is read.

    Args:
      binary: whether the loss is the paper's, of each target against one other item, instead of the cross-entropy over
        the catalog, which is much the better (Klenitskiy & Vasilev, RecSys 2023, arXiv 2309.07602).
    """

    def __init__(self, encoder: Transformer, config: ml_collections.ConfigDict, inputs: ModelInputs, *, binary: bool):
        super().__init__(encoder, config, inputs)
        self.binary = binary

    def users(self, batch: RankBatch) -> Float[Array, "B D"]:
        return self.encoder.at_end(self.embed(batch.inputs), batch.lengths).astype(jnp.float32)

    def losses(self, states: Float[Array, "M D"], targets: Int[Array, " M"], rngs: nnx.Rngs) -> Float[Array, " M"]:
        if not self.binary:
            return super().losses(states, targets, rngs)
        negatives = jax.random.randint(rngs.negatives(), targets.shape, 0, self.num_items)
        return binary_cross_entropy(states, self.catalog(), targets, negatives)


def binary_cross_entropy(
    states: Float[Array, "M D"],
    item_vectors: Float[Array, "N D"],
    targets: Int[Array, " M"],
    negatives: Int[Array, " M"],
) -> Float[Array, " M"]:
    """-log σ(u·v_target) - log(1 - σ(u·v_negative)).

    Where negatives are drawn uniformly from the whole catalog, it is least at u·v_i = log p(i | u) + log N
    (noise-contrastive estimation), so a softmax of the scores is p(i | u). The paper draws none of the user's own
    items.
    """
    score = lambda items: jnp.sum(states * item_vectors[items], axis=-1)  # noqa: E731
    return jax.nn.softplus(-score(targets)) + jax.nn.softplus(score(negatives))
