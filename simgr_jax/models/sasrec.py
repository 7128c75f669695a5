"""SASRec: a causal Transformer over items (Kang & McAuley, ICDM 2018, arXiv 1808.09781)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx
from jaxtyping import Array, Float, Int

from simgr_jax.inputs.batch import RankBatch
from simgr_jax.models.item_sequence import TRANSFORMER_KEYS, ItemSequenceModel, encoder_config
from simgr_jax.models.model_inputs import ModelInputs
from simgr_jax.models.options import ModelOptions
from simgr_jax.models.transformer import Transformer

LOSSES = ("full", "binary")


@dataclasses.dataclass(frozen=True)
class Options(ModelOptions):
    """
    Attributes:
      loss: "full", the cross-entropy over the catalog, or "binary", the paper's, against one random item.
      label_smoothing: ε of the full loss.
    """

    name = "sasrec"
    backbone_keys = TRANSFORMER_KEYS

    loss: str = "full"
    label_smoothing: float = 0.0

    def __post_init__(self):
        self.require_choice("loss", LOSSES)
        self.require_label_smoothing()

    def unread(self) -> dict[str, str]:
        return {"label_smoothing": "loss=full"} if self.loss == "binary" else {}


def create(config: ml_collections.ConfigDict, options: Options, inputs: ModelInputs) -> SASRec:
    """
    Raises:
      UserError: a config value is invalid.
    """
    shape = encoder_config(config, options, activation="relu")
    return SASRec(Transformer(shape, inputs.rngs), options.label_smoothing, inputs, binary=options.loss == "binary")


class SASRec(ItemSequenceModel):
    """Positions count from the oldest item of the window.

    Args:
      binary: whether the loss is the paper's, each target against one random item, instead of the cross-entropy over
        the catalog, which ranks much better (Klenitskiy & Vasilev, RecSys 2023, arXiv 2309.07602).
    """

    def __init__(self, encoder: Transformer, label_smoothing: float, inputs: ModelInputs, *, binary: bool):
        super().__init__(encoder, encoder.config.width, label_smoothing, inputs)
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

    With negatives drawn uniformly from the whole catalog, its minimum is at u·v_i = log p(i | u) + log N
    (noise-contrastive estimation), so a softmax of the scores is p(i | u). The paper excludes the user's own items.
    """
    score = lambda items: jnp.sum(states * item_vectors[items], axis=-1)  # noqa: E731
    return jax.nn.softplus(-score(targets)) + jax.nn.softplus(score(negatives))
