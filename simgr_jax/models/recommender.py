"""The interface of all models, as training, evaluation and serving use it."""

from __future__ import annotations

from typing import Protocol

from flax import nnx
from jaxtyping import Array, Float

from simgr_jax.inputs.batch import RankBatch, TrainBatch
from simgr_jax.ops.top_k import Ranking


class Recommender(Protocol):
    """A model that learns from packed sequences and ranks the catalog for histories. It is an `nnx.Module`.

    A model without an `nnx.Param` is not trained.

    Attributes:
      num_items: N.
    """

    num_items: int

    def loss(self, batch: TrainBatch, rngs: nnx.Rngs) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """The mean loss over the batch's targets, and scalars to log. If the loss has other targets than the batch, the
        scalar "targets" gives their number. `rngs` has the streams "dropout" and "negatives"."""

    def state_moments(self, batch: TrainBatch) -> tuple[Float[Array, ""], Float[Array, " D"], Float[Array, " D"]]:
        """The number, the sum and the sum of the squares of the batch's states, by which `readout` is standardized
        before the first step. Only models with an attribute `readout` that is not None have this method."""

    def read_catalog(self) -> None:
        """Computes anew what the model remembers of the catalog. Only models with a `model_inputs.Memory` have this
        method."""

    def catalog(self) -> Float[Array, ...]:
        """What ranking needs of the catalog and can be computed once for many batches (for SimGR: item vectors)."""

    def rank(self, batch: RankBatch, catalog: Float[Array, ...], k: int, filter_history: bool) -> Ranking:
        """The top-K items for each history, and the rank of its target; `filter_history` leaves out history items."""

    def log_probabilities(self, batch: RankBatch, catalog: Float[Array, ...]) -> Float[Array, "B N"]:
        """The exact log p(i | history) of every item, normalized over the catalog; read by `simgr_jax.bias`. Only
        models with such a distribution have this method."""

    def item_vectors(self, catalog: Float[Array, ...]) -> Float[Array, "N D"]:
        """Item vectors whose dot products with `user_vectors` are the scores that `rank` sorts by. Only models that
        score this way have these two methods."""

    def user_vectors(self, batch: RankBatch, catalog: Float[Array, ...]) -> Float[Array, "B D"]:
        """The users' vectors after their whole histories."""
