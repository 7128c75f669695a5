"""Runs a recommender over evaluation cases."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from simgr_jax import sharding
from simgr_jax.data.batches import rank_batches
from simgr_jax.data.dataset import EvaluationCases
from simgr_jax.data.prompts import Prompt
from simgr_jax.ops.top_k import Ranking


class Ranker:
    """Ranks the catalog for evaluation cases with a model's parameters; compiled once for each shape of `rank_batches`,
    used at every evaluation."""

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        *,
        prompt: Prompt,
        batch_size: int,
        max_items: int,
        row_length: int,
        k: int,
        filter_history: bool,
    ):
        """prompt, max_items, row_length: what the model sees of a history (see `rank_batches`)."""
        self._batches = functools.partial(
            rank_batches, prompt=prompt, batch_size=batch_size, max_items=max_items, row_length=row_length
        )
        self._graphdef = graphdef
        self._catalog = jax.jit(lambda params, rest: nnx.merge(graphdef, params, rest).catalog())
        rank = lambda model, batch, catalog: model.rank(batch, catalog, k, filter_history)  # noqa: E731
        self._rank = self._compiled(rank)
        # The compiler leaves out what only the targets' ranks need.
        self._items = self._compiled(lambda *asked: rank(*asked).items)

    def catalog(self, params: nnx.State, rest: nnx.State) -> Any:
        """What the model computes of the items, once for all users: their vectors, say."""
        return self._catalog(params, rest)

    def __call__(self, params: nnx.State, rest: nnx.State, cases: EvaluationCases, catalog: Any = None) -> Ranking:
        """Top-K lists and target ranks of all C cases, as numpy arrays.

        Args:
          params, rest: the model's state, parameters and what is not learned.
          catalog: of `catalog`, if it is at hand.
        """
        return self._for_all(self._rank, params, rest, cases, catalog)

    def lists(self, params: nnx.State, rest: nnx.State, cases: EvaluationCases, catalog: Any = None) -> np.ndarray:
        """The top-K lists alone, int32 [C, K], as serving has them: no target's rank is computed.

        Args: as of `__call__`.
        """
        return self._for_all(self._items, params, rest, cases, catalog)

    def ask(self, question: str, params: nnx.State, rest: nnx.State, cases: EvaluationCases, **options: Any) -> Any:
        """What the model's method `question(batch, catalog, **options)`, like `log_probabilities`, says of all C cases:
        a tree of numpy arrays."""
        answer = self._compiled(lambda model, batch, catalog: getattr(model, question)(batch, catalog, **options))
        return self._for_all(answer, params, rest, cases, None)

    def _compiled(self, answer: Callable) -> Callable:
        """answer: of (model, batch, catalog)."""
        graphdef = self._graphdef
        return jax.jit(
            lambda params, rest, catalog, batch: answer(nnx.merge(graphdef, params, rest), batch, catalog),
            out_shardings=sharding.replicated(),
        )

    def _for_all(
        self, answer: Callable, params: nnx.State, rest: nnx.State, cases: EvaluationCases, catalog: Any
    ) -> Any:
        catalog = self.catalog(params, rest) if catalog is None else catalog
        answers, chosen = [], []
        for batch, cases_of_batch in self._batches(cases):
            answers.append(answer(params, rest, catalog, sharding.split_batch(batch)))
            chosen.append(cases_of_batch)
        in_order = np.argsort(np.concatenate(chosen))

        # Fetched only now, so that the device is never waited for between two batches.
        def together(*parts: jax.Array) -> np.ndarray:
            real = [np.asarray(part)[: len(one)] for part, one in zip(parts, chosen, strict=True)]
            return np.concatenate(real)[in_order]

        return jax.tree.map(together, *answers)
