"""Ranks the catalog for evaluation cases with a model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Int

from simgr_jax.data.dataset import EvaluationCases
from simgr_jax.devices import sharding
from simgr_jax.inputs.prompts import Prompt
from simgr_jax.inputs.rank_batches import rank_batches
from simgr_jax.models.recommender import Recommender
from simgr_jax.ops.top_k import Ranking


class Ranker:
    """Ranks with models of one structure. Each kind of question is compiled once for each shape of `rank_batches`.

    All methods take the model, whose parameters may differ from call to call, and run on the current mesh.
    """

    def __init__(self, model: Recommender, prompt: Prompt, batch_size: int, max_items: int, row_length: int):
        """
        Args:
          model: of the structure to rank with; its parameters are not used.
          prompt: how histories become the model's inputs.
          batch_size: cases ranked at once.
          max_items, row_length: as for training windows.
        """
        self._graphdef = nnx.graphdef(model)
        self._batches: Callable[[EvaluationCases], Iterator] = lambda cases: rank_batches(
            cases, prompt, batch_size, max_items, row_length
        )
        self._catalog = jax.jit(lambda state: nnx.merge(self._graphdef, state).catalog())

    def catalog(self, model: Recommender) -> Any:
        """What the model computes of the items, once for all users; for SimGR, their vectors."""
        return self._catalog(nnx.state(model))

    def rank(self, model: Recommender, cases: EvaluationCases, k: int, filter_history: bool = False) -> Ranking:
        """Top-K lists and target ranks of all C cases, as numpy arrays; with `filter_history`, history items are taken
        out."""
        return self.ask(model, cases, "rank", k=k, filter_history=filter_history)

    def lists(
        self, model: Recommender, cases: EvaluationCases, k: int, filter_history: bool = False, catalog: Any = None
    ) -> tuple[Int[np.ndarray, "C K"], np.ndarray]:
        """Top-K lists and their scores, int32 and float32 [C, K], without computing any target's rank.

        Args:
          catalog: from `catalog`, if it has been computed already.
        """

        def answer(model: Recommender, batch: Any, catalog: Any) -> tuple[jax.Array, jax.Array]:
            ranking = model.rank(batch, catalog, k, filter_history)
            return ranking.items, ranking.scores

        return self._for_all(self._compiled(("lists", k, filter_history), answer), model, cases, catalog)

    def ask(self, model: Recommender, cases: EvaluationCases, question: str, **options: Any) -> Any:
        """What the model's method `question(batch, catalog, **options)`, like `log_probabilities`, returns for all C
        cases: a tree of numpy arrays."""

        def answer(model: Recommender, batch: Any, catalog: Any) -> Any:
            return getattr(model, question)(batch, catalog, **options)

        return self._for_all(self._compiled((question, *sorted(options.items())), answer), model, cases)

    @functools.cached_property
    def _programs(self) -> dict[Any, Callable]:
        return {}

    def _compiled(self, name: Any, answer: Callable) -> Callable:
        """The compiled `answer(model, batch, catalog)`, made at the first call with this name."""
        if name not in self._programs:
            self._programs[name] = jax.jit(
                lambda state, catalog, batch: answer(nnx.merge(self._graphdef, state), batch, catalog),
                out_shardings=sharding.replicated(),
            )
        return self._programs[name]

    def _for_all(self, answer: Callable, model: Recommender, cases: EvaluationCases, catalog: Any = None) -> Any:
        state = nnx.state(model)
        catalog = self._catalog(state) if catalog is None else catalog
        answers, chosen = [], []
        for batch, cases_of_batch in self._batches(cases):
            answers.append(answer(state, catalog, sharding.split_batch(batch)))
            chosen.append(cases_of_batch)
        in_order = np.argsort(np.concatenate(chosen))

        # Fetched only now, so that the device never waits between two batches.
        def together(*parts: jax.Array) -> np.ndarray:
            real = [np.asarray(part)[: len(one)] for part, one in zip(parts, chosen, strict=True)]
            return np.concatenate(real)[in_order]

        return jax.tree.map(together, *answers)
