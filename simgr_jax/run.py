"""A run: one config, one workdir, and everything that follows from them."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import jax
import ml_collections
import numpy as np
from flax import nnx
from jaxtyping import Float, Int
from rich.console import Console

from simgr_jax import config_checks, saved_config
from simgr_jax.config_files import load_run_config
from simgr_jax.config_keys import check_overrides, with_values
from simgr_jax.data.dataset import Dataset, EvaluationCases, Split
from simgr_jax.data.load import load as load_data
from simgr_jax.data.load import oracle_folder
from simgr_jax.devices import distributed, sharding
from simgr_jax.devices.choose_dtype import choose_dtype
from simgr_jax.errors import UserError
from simgr_jax.evaluation import predictions, saved_ranking
from simgr_jax.evaluation.metrics import SELECTION_K, shows_everybody_the_same, summarize
from simgr_jax.evaluation.protocols import FILTERED, LEFT_IN
from simgr_jax.evaluation.ranking import Ranker
from simgr_jax.evaluation.references import reference_rankings
from simgr_jax.evaluation.report import Judged, write_report
from simgr_jax.evaluation.saved_ranking import CaseRankings
from simgr_jax.huggingface.checkpoint import Checkpoint
from simgr_jax.huggingface.item_reader import ItemReader
from simgr_jax.huggingface.llm_tokenizer import load_tokenizer
from simgr_jax.huggingface.pretrained import item_reader_path, load_pretrained, open_checkpoint
from simgr_jax.inputs import item_texts, prompts
from simgr_jax.inputs.item_texts import ItemTexts
from simgr_jax.inputs.prompts import ItemContents, Prompt
from simgr_jax.inputs.training_windows import TrainingWindows
from simgr_jax.models import parameters, popularity, registry
from simgr_jax.models.model_inputs import Backbone, Memory, ModelInputs
from simgr_jax.models.recommender import Recommender
from simgr_jax.models.scratch import scratch_backbone
from simgr_jax.models.text_reader import TextReader
from simgr_jax.ops.top_k import Ranking
from simgr_jax.semantic_ids import build, saved_ids
from simgr_jax.semantic_ids.codes import SemanticIds
from simgr_jax.serving import export_folder
from simgr_jax.serving.histories import Histories
from simgr_jax.training import loop, steps
from simgr_jax.training.checkpoints import Checkpoints
from simgr_jax.training.progress_line import ProgressLine
from simgr_jax.training.reread import forget, make_reread
from simgr_jax.workdir import config_file, digests, trained_on
from simgr_jax.workdir.atomic_write import one_line_on_a_full_disk, remove_leftovers
from simgr_jax.workdir.cache import fingerprint
from simgr_jax.workdir.lock import locked
from simgr_jax.workdir.read_files import read_json_object, read_log

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SEMANTIC_IDS = "semantic_ids.npz"
# What a run learned, besides its checkpoints and log.
LEARNED_FILES = (trained_on.FILE_NAME, _SEMANTIC_IDS, "semantic_ids.json")
SPLITS = ("validation", "test")
# A temporary file that another process may be writing is left alone for this many seconds.
_LEFTOVER_AGE = 24 * 3600

Method = TypeVar("Method", bound=Callable[..., Any])


def fit(
    config: str | Path | ml_collections.ConfigDict,
    overrides: Mapping[str, Any] | None = None,
    *,
    workdir: str | Path,
) -> Run:
    """Trains a recommender, or continues where a run in the workdir was cut off.

        run = simgr_jax.fit("quickstart", {"training.epochs": 2}, workdir="workdirs/mine")

    Args:
      config: a config file's path, the name of one in configs/ ("quickstart", "amazon:beauty"), or a config.
      overrides: values by full key, like {"data.path": "events.csv"}.
      workdir: the folder for the config, checkpoints, metrics and reports.

    Raises:
      UserError: the config or the data can't be used, or the workdir holds another run.
    """
    run = Run(load_run_config(config, overrides), workdir)
    run.train()
    return run


def load(workdir: str | Path) -> Run:
    """The run in a workdir.

        run = simgr_jax.load("workdirs/mine")

    Raises:
      UserError: there is none, or another version of simgr_jax trained it.
    """
    return Run.load(workdir)


def _on_mesh(method: Method) -> Method:
    """A method of `Run` that runs on the run's mesh."""

    @functools.wraps(method)
    def wrapped(self: Run, *arguments: Any, **options: Any) -> Any:
        with self.mesh():
            return method(self, *arguments, **options)

    return wrapped  # type: ignore[return-value]


def _check_split(key: str, rows: int) -> None:
    """
    Raises:
      UserError: the context's mesh can't split the rows of `config.KEY` evenly.
    """
    if rows % (parts := sharding.shards("batch")):
        raise UserError(
            f"config.{key}: {rows} can't be split over the {parts} devices of config.mesh.data and fsdp; give a "
            "multiple"
        )


class Run:
    """One run: its config, its workdir, and everything that follows from them, made when it is first asked for.

    Attributes:
      config: every option. The dtype is chosen at once, the rows of a batch when training begins.
      workdir: the folder of config, checkpoints, metrics and reports.
      options: the options of the run's model.
    """

    def __init__(self, config: ml_collections.ConfigDict, workdir: str | Path, platform: str | None = None):
        """
        Args:
          platform: JAX's name of the devices, like "cpu"; None is this machine's.

        Raises:
          UserError: a config value is invalid.
        """
        config_checks.check(config)
        self.workdir = Path(os.path.expanduser(workdir))
        self.config = saved_config.with_choices(config, self.workdir)
        if self.config.backbone.dtype == "auto":
            self._choose("backbone.dtype", choose_dtype(platform or sharding.platform()))
        self.options = registry.options_of(config)
        self._best: Recommender | None = None
        self._best_step: int | None = None
        self._best_catalog: Any = None
        # Validations in a row whose lists are nearly the same for all users, and whether the user was warned of them.
        self._equal_lists, self._warned = 0, False
        self._cost: dict[str, float | None] = {}

    def _choose(self, key: str, value: Any) -> None:
        """Sets a key of `saved_config.CHOSEN`, to the main process's choice."""
        self.config = with_values(self.config, {key: distributed.all_gather(value)[0]}).lock()

    @classmethod
    def load(cls, workdir: str | Path, places: Mapping[str, Any] | None = None) -> Run:
        """The run in a workdir.

        Args:
          places: config values that say where the run's files are now, by full key, like {"data.path": "data"}.

        Raises:
          UserError: there is none, or another version of simgr_jax trained it.
        """
        workdir = Path(os.path.expanduser(workdir))
        config = saved_config.load(workdir)
        if (places or {}).get("backbone.checkpoint") and not config.backbone.checkpoint:
            raise UserError(
                f"{workdir}: its run has no checkpoint, so config.backbone.checkpoint can't be elsewhere now"
            )
        config = with_values(config, places or {}).lock()
        check_overrides(config, places or {})
        return cls(config, workdir)

    @contextlib.contextmanager
    def mesh(self, devices: Sequence[jax.Device] | None = None) -> Iterator[None]:
        """The context that the run's computations need: its mesh. The methods below enter it by themselves.

        Args:
          devices: None uses all devices; to compile for a topology, give its devices.

        Raises:
          UserError: the mesh does not fit the devices.
        """
        with jax.set_mesh(sharding.make_mesh(self.config.mesh, devices)):
            yield

    # What the run reads.

    @property
    def cache_dir(self) -> Path:
        """The folder of prepared data and semantic IDs."""
        folder = self.config.cache_dir
        return Path(os.path.expanduser(folder)) if folder else self.workdir / "cache"

    @functools.cached_property
    def _data(self) -> tuple[Dataset, Split]:
        with distributed.main_first():
            dataset, split = load_data(self.config.data, self.cache_dir)
        if dataset.num_items < self.list_length:
            raise UserError(
                f"config.evaluation.ks: lists of {self.list_length} need as many items, but {dataset.name} has "
                f"{dataset.num_items}; use a larger catalog, a lower config.data.k_core, or lower ks"
            )
        for part in SPLITS:
            if not len(getattr(split, part)):
                raise UserError(f"config.data.split: leaves no {part} case; choose another split or larger fractions")
        sequences = (dataset.sequences.values, dataset.sequences.offsets, split.train.values, split.train.offsets)
        distributed.check_same("the data", *sequences, dataset.item_texts)
        return dataset, split

    @property
    def dataset(self) -> Dataset:
        """Users, catalog and sequences."""
        return self._data[0]

    @property
    def split(self) -> Split:
        """The training sequences, and the validation and test cases."""
        return self._data[1]

    @functools.cached_property
    def _ids(self) -> tuple[SemanticIds | None, dict[str, Any]]:
        if not self.options.reads_semantic_ids:
            return None, {}
        dataset, split = self._data
        kept = self.workdir / _SEMANTIC_IDS
        is_kept = trained_on.has_learned(self.workdir) and kept.exists()
        # All processes read the texts together, and none has kept IDs where one has not.
        is_read = build.reads_llm(self.config.semantic_ids) and any(distributed.all_gather(not is_kept))
        readings = self.item_readings if is_read else None
        with distributed.main_first():
            if is_kept:
                trained_on.check(self._learned_items(), self.workdir)
                found = saved_ids.read(kept)
            else:
                arguments = (split.train, self.cache_dir, self.config.seed, readings)
                found = build.build(self.config.semantic_ids, dataset, *arguments)
        distributed.check_same("the semantic IDs", found[0].codes)
        return found

    @property
    def semantic_ids(self) -> SemanticIds | None:
        """The catalog's semantic IDs; None for a model that does not read them.

        A run that has learned something keeps its own, even if new interactions would give different ones.
        """
        return self._ids[0]

    @property
    def id_quality(self) -> dict[str, Any]:
        """How good the semantic IDs are (see `semantic_ids.quality`)."""
        return self._ids[1]

    @functools.cached_property
    def item_reader(self) -> ItemReader:
        """What reads the items' texts, for models and semantic IDs that use its readings.

        Raises:
          UserError: the items have no texts, or the LLM can't be used.
        """
        config = self.config
        if self.dataset.item_texts is None:
            raise UserError(
                f"config.data: {self.dataset.name} has no item texts for the LLM of config.item_reader to read; give "
                "them (for a log config.data.log.items_file), or choose other embeddings, token_init and item_text"
            )
        with distributed.main_first():
            checkpoint = Checkpoint(item_reader_path(config))
        dtype = config.lora.base_dtype if config.lora.rank else config.backbone.dtype
        return ItemReader(checkpoint, config.item_reader, dtype, self.dataset.item_texts, self.cache_dir)

    @functools.cached_property
    @_on_mesh
    def item_readings(self) -> Float[np.ndarray, "N X"]:
        """An LLM's readings of the items' texts.

        Raises:
          UserError: see `item_reader`.
        """
        return self.item_reader.readings()

    def text_reader(self, room: int, rngs: nnx.Rngs) -> TextReader:
        """See `ItemReader.text_reader`."""
        adapters = registry.item_reader_adapters(self.config)
        backbone = self.config.backbone
        return self.item_reader.text_reader(room, adapters, rngs, dtype=backbone.dtype, remat=backbone.remat)

    @functools.cached_property
    def checkpoint(self) -> Checkpoint | None:
        """The LLM that the backbone starts from; None if it is trained from scratch."""
        if not self._has_llm:
            return None
        with distributed.main_first():
            return open_checkpoint(self.config)

    @property
    def _has_llm(self) -> bool:
        return registry.has_checkpoint(self.config)

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast | None:
        """The LLM's tokenizer with the semantic-ID tokens; None without an LLM."""
        if self.checkpoint is None or self.semantic_ids is None:
            return None
        return load_tokenizer(self.checkpoint.path, self.semantic_ids.token_strings())

    @property
    def items(self) -> ItemContents:
        """What prompts can say about the items."""
        return ItemContents(self.dataset.num_items, self.semantic_ids, self.dataset.item_texts)

    @functools.cached_property
    def prompt(self) -> Prompt:
        """How histories become the backbone's inputs."""
        items, tokenizer = self.items, self.tokenizer
        with distributed.main_first():
            return prompts.create(self.options.history, self.config.prompt, items, tokenizer, self.cache_dir)

    @property
    def item_texts(self) -> ItemTexts:
        """The items' texts in prompts, for a run with an LLM that reads tokens."""
        tokenizer, ids = cast("PreTrainedTokenizerFast", self.tokenizer), cast(SemanticIds, self.semantic_ids)
        titles, options = self.dataset.item_texts, self.config.prompt
        return item_texts.read(tokenizer, ids.token_strings(), titles, self.cache_dir, **options)

    @functools.cached_property
    def longest_prompt(self) -> int:
        """The most inputs that a history's prompt has. Longer histories lose their oldest items."""
        longest = self.prompt.longest(self.config.data.max_items)
        asked = self.config.training.row_length if self.options.is_trained else 0
        return min(longest, asked) if asked else longest

    @property
    def longest_sequence(self) -> int:
        """The number of positions that the backbone has to support. A model that reads targets reads one more item."""
        return self.longest_prompt + int(self.prompt.pieces.lengths.max()) * (self.options.windows == "with_target")

    @functools.cached_property
    def windows(self) -> TrainingWindows:
        """The training windows.

        Raises:
          UserError: there is none.
        """
        max_items, row_length = self.config.data.max_items, self.config.training.row_length
        if row_length:
            prompts.check_row_length(row_length, self.prompt, max_items)
        windows = TrainingWindows(self.split.train, self.prompt, max_items, row_length, self.options.windows)
        if not len(windows):
            raise UserError(
                "config.data.split: leaves no training sequence of two items; give users with more interactions"
            )
        return windows

    @property
    def batch_rows(self) -> int:
        """The rows of a training batch. Call it on the run's mesh, which shares them.

        Raises:
          UserError: they don't fit the mesh.
        """
        rows = self.config.training.batch_rows or steps.choose_batch_rows(self.config, self.windows)
        _check_split("training.batch_rows", rows)
        return rows

    # The model.

    @functools.cached_property
    @_on_mesh
    def model(self) -> Recommender:
        """The model before training, with an LLM's weights or random ones. Training consumes its parameters."""
        checkpoint = self.checkpoint  # First, so that a bad checkpoint is reported before the data are prepared.
        rngs, items, longest = nnx.Rngs(self.config.seed), self.items, self.longest_sequence

        def scratch() -> Backbone:
            return scratch_backbone(self.config, rngs)

        make_backbone: Callable[[], Backbone] = scratch
        if checkpoint is not None:
            tokenizer = cast("PreTrainedTokenizerFast", self.tokenizer)  # A checkpoint has one.
            read = lambda: self.item_readings  # noqa: E731
            pretrained = load_pretrained(checkpoint, tokenizer, self.config, items, self.prompt, longest, read)
            make_backbone = lambda: pretrained  # noqa: E731
        inputs = ModelInputs(
            items.num_items,
            items.semantic_ids,
            self.split.train,
            make_backbone,
            rngs,
            lambda: self.item_readings,
            lambda room: self.text_reader(room, rngs),
        )
        model = registry.create(self.config, inputs)
        self._check_beam(model, self.list_length, "give at least that")
        return model

    @functools.cached_property
    @_on_mesh
    def ranker(self) -> Ranker:
        """Ranks with models of the run's structure."""
        config = self.config
        _check_split("evaluation.batch_size", config.evaluation.batch_size)
        arguments = (config.evaluation.batch_size, config.data.max_items, self.longest_prompt)
        return Ranker(self.model, self.prompt, *arguments)

    @property
    def list_length(self) -> int:
        """The length of the lists that reports judge."""
        return max(self.config.evaluation.ks)

    @_on_mesh
    def best_model(self) -> Recommender:
        """The model with the best checkpoint's parameters. A model without parameters needs no checkpoint.

        Raises:
          UserError: there is no checkpoint, it is damaged or another model's, or it was trained with other items or
            semantic IDs.
        """
        if self._best is None:
            self._best = self._restore_best()
        return self._best

    def _restore_best(self) -> Recommender:
        model = self.model
        parts = nnx.split(model, nnx.Param, Memory, ...)
        graphdef, params, memory, rest = cast("tuple[nnx.GraphDef, nnx.State, nnx.State, nnx.State]", parts)
        self._cost = {"train_seconds": 0.0, "train_targets_per_second": None}
        if not params:
            return model
        trained_on.check(self._learned_items() | self._learned_contents(), self.workdir)
        folder = self.workdir / "checkpoints"
        if not folder.is_dir():
            raise UserError(f"{folder}: is not there; train in this workdir first")
        # Frees the initial values: there may be no room for two copies of an LLM.
        for leaf in jax.tree.leaves(params):
            leaf.delete()
        with Checkpoints(folder, read_only=True) as checkpoints:
            params, self._best_step = checkpoints.restore_best(params), checkpoints.best_step
            self._cost = {**checkpoints.training_cost()}
        memory = make_reread(graphdef)(params, forget(memory), rest)
        return nnx.merge(graphdef, params, memory, rest)

    # What a run does.

    @_on_mesh
    def train(self) -> None:
        """Trains the model, continuing from the workdir's latest checkpoint if there is one.

        Raises:
          UserError: the workdir holds a run of another config or other data, or a run is training in it; the config
            can't be trained; or the disk is full.
          Stopped: a signal asked the run to stop, and its checkpoint is saved.
        """
        self.workdir.mkdir(parents=True, exist_ok=True)
        with distributed.main_holds(locked(self.workdir, "a run is training")):
            if distributed.is_main():
                self._remove_leftovers()
            with one_line_on_a_full_disk(self.workdir):
                self._train()

    def _remove_leftovers(self) -> None:
        """Removes what killed runs left. Other runs may be writing to a shared cache, and a reader to a report."""
        own_cache = self.cache_dir.resolve().is_relative_to(self.workdir.resolve())
        remove_leftovers(self.workdir)
        for folder in (self.cache_dir, *self.cache_dir.glob("*/")):
            remove_leftovers(folder, 0 if own_cache else _LEFTOVER_AGE)
        for split in SPLITS:
            remove_leftovers(self._report_folder(split), _LEFTOVER_AGE)

    def _train(self) -> None:
        with ProgressLine() as line:
            saved_config.check_same(self.config, self.workdir, may_be_longer=True)
            # Before the data are prepared.
            _check_split("evaluation.batch_size", self.config.evaluation.batch_size)
            if self.options.is_trained:  # 0 is chosen later.
                _check_split("training.batch_rows", self.config.training.batch_rows)
            with line.doing("opening the checkpoint"):
                _ = self.checkpoint  # First, so that a bad one is reported before the data are prepared.
            with line.doing("preparing the data"):
                dataset, split = self.dataset, self.split
            line.say(
                f"{dataset.name}: {len(dataset.user_ids):,} users, {dataset.num_items:,} items, "
                f"{len(dataset.sequences.values):,} interactions"
            )
            with line.doing("preparing the semantic IDs"):
                _ = self.semantic_ids
            with line.doing("preparing the model"):
                model = self.model
            learned = self._learned_items() | self._learned_contents()
            learned["training_sequences"] = fingerprint(split.train.values, split.train.offsets)
            trained_on.check(learned, self.workdir)
            if self.options.is_trained:
                _ = self.windows  # Before the config is saved, so that rows that are too short can be corrected.
                self._choose("training.batch_rows", self.batch_rows)
                self._check_longer()
            if distributed.is_main():
                # Saved only now, so that a config that can't be trained can be corrected in the same workdir.
                config_file.save(self.config.to_dict(), self.workdir)
                if not trained_on.has_learned(self.workdir) and self.semantic_ids is not None:
                    saved_ids.write(self.workdir / _SEMANTIC_IDS, self.semantic_ids, self.id_quality)
                trained_on.save(learned, self.workdir)
            if self.options.is_trained:
                Console().print(parameters.table(model))
                self._best = self._best_catalog = None
                loop.fit(model, self.windows, self._validate, self.config, self.workdir, line)

    def _check_longer(self) -> None:
        """
        Raises:
          UserError: the config is longer than that of the run here, but see `loop.check_longer`.
        """
        longer = distributed.all_gather(sorted(saved_config.made_longer(self.config, self.workdir)))[0]
        if longer:
            new_restart = "optimizer.restart_epoch" in longer
            loop.check_longer(self.windows, self.config, self.workdir, new_restart=new_restart)

    def _validate(self, model: Recommender) -> dict[str, float]:
        """The metrics of the validation split, with history items left in."""
        ranking = self.ranker.rank(model, self.split.validation, self.list_length)
        ks, num_items = self.config.evaluation.ks, self.dataset.num_items
        ranks, items = np.asarray(ranking.target_rank), np.asarray(ranking.items)
        metrics = summarize(ranks, items, num_items, ks)
        are_equal = shows_everybody_the_same(items, self.split.validation.targets, num_items)
        self._warn_of_equal_lists(are_equal, metrics[f"coverage@{SELECTION_K}"])
        return metrics

    def _warn_of_equal_lists(self, are_equal: bool, coverage: float) -> None:
        """Warns once: at the second validation in a row whose lists are nearly equal, or at the only one of the run."""
        self._equal_lists = self._equal_lists + 1 if are_equal else 0
        training = self.config.training
        if not self._warned and self._equal_lists == min(2, -(-training.epochs // training.evaluate_every_epochs)):
            self._warned = True
            distributed.warn(
                __name__,
                f"validation/coverage@{SELECTION_K} is {coverage:.2g}: nearly all users get the same items, so the "
                "model ranks by popularity; give it more steps (fewer config.training.batch_rows, more "
                "config.training.epochs) or another config.optimizer.learning_rate; docs/llm_training.md says what "
                "else to try",
            )

    @_on_mesh
    def evaluate(self, split: str = "test") -> dict[str, Any]:
        """Judges the best checkpoint, and writes the report.

        Args:
          split: "test", reported in `workdir/report`, or "validation", in `workdir/report_validation`.

        Returns:
          The metrics of the report's metrics.json. `NDCG@10` leaves history items in the lists, `filtered/NDCG@10`
          takes them out.

        Raises:
          UserError: there is no such split, or no checkpoint.
        """
        cases, model = self._judged_cases(split), self.best_model()
        with ProgressLine() as line, line.doing(f"judging the {split} split"):
            rankings = {
                LEFT_IN: self.ranker.rank(model, cases, self.list_length),
                FILTERED: self.ranker.rank(model, cases, self.list_length, filter_history=True),
            }
        facts = {"model": self.config.model, "num_parameters": parameters.total(model), **self._cost}
        return self._report(self._report_folder(split), split, rankings, facts, self.log())

    def judge_predictions(self, file: str | Path, split: str = "test") -> dict[str, Any]:
        """Judges another system's recommendations on the run's data, and writes the report to the folder FILE.report.

        Args:
          file: see `evaluation.predictions`.

        Returns:
          The metrics of the report's metrics.json.

        Raises:
          UserError: the file can't be read, or does not fit the data.
        """
        file = Path(os.path.expanduser(file))
        rankings = predictions.read(file, self.dataset, self._judged_cases(split), self.list_length)
        unknown = dict.fromkeys(("num_parameters", "train_seconds", "train_targets_per_second"))
        folder = file.with_name(f"{file.name}.report")
        return self._report(folder, split, rankings, {"model": file.stem, **unknown}, [])

    def _report(
        self, folder: Path, split: str, rankings: Mapping[str, Ranking], facts: dict[str, Any], log: list[dict]
    ) -> dict[str, Any]:
        """Writes the report of the rankings, given by protocol, and of the reference rankings."""
        if not distributed.is_main():
            return {}
        cases, dataset = self.cases(split), self.dataset
        oracle = oracle_folder(self.config.data, self.cache_dir)
        references = reference_rankings(self.split.train, dataset.num_items, cases, self.list_length, oracle)
        facts = facts | {
            "dataset": dataset.name,
            "split": split,
            "num_users": len(np.unique(cases.users)),
            "num_cases": len(cases),
            "num_items": dataset.num_items,
        }
        ranked = {"model": rankings, **references}
        judged = Judged(facts, ranked, cases, self.split.train, dataset.num_items, self.config.evaluation.ks)
        metrics = write_report(folder, judged, log)
        saved_ranking.write(folder, rankings, cases)
        print(f"judged {self.list_length} recommendations for each of {len(cases):,} cases; the report is in {folder}")
        return metrics

    def recommend(self, histories: Any, k: int = 10, *, filter_history: bool = False) -> Any:
        """The top-K items for any histories, including those of users who are not in the data.

            run.recommend([["B7", "B2"], ["B9"]], k=10)

        Items that the catalog does not have are left out, counted in the result, and reported in a warning. A history
        without any known item gets the most popular items.

        Args:
          histories: lists of item ids, oldest first; or a polars or pandas frame with one row per interaction, whose
            columns have the names of `config.data.log` (by default user, item and, if there is one, timestamp).
          k: the length of the lists.
          filter_history: whether the items of a history are left out of its list.

        Returns:
          For lists `Recommendations`; for a frame the same kind of frame with the columns user, rank, item and score.

        Raises:
          UserError: k is more than the model or the catalog can list, or the frame lacks a column.
        """
        asked = Histories.read(histories, self.dataset, self.config.data.log)
        asked.warn_of_unknown()
        items, scores = self.lists(asked.cases(), k, filter_history)
        popular = popularity.most_popular(self.split.train, self.dataset.num_items)[:k]
        return asked.answer(asked.recommendations(items, scores, popular))

    @_on_mesh
    def lists(
        self, cases: EvaluationCases, k: int = SELECTION_K, filter_history: bool = False
    ) -> tuple[Int[np.ndarray, "C K"], Float[np.ndarray, "C K"]]:
        """The best checkpoint's top-K lists for evaluation cases, as item indices, and their scores.

        Raises:
          UserError: k is more than the model or the catalog can list.
        """
        self.check_list_length(k)  # Before the checkpoint is read.
        model = self.best_model()
        if not len(cases):
            return np.zeros((0, k), np.int32), np.zeros((0, k), np.float32)
        if self._best_catalog is None:
            self._best_catalog = self.ranker.catalog(model)
        return self.ranker.lists(model, cases, k, filter_history, self._best_catalog)

    def check_list_length(self, k: int) -> None:
        """
        Raises:
          UserError: k is more than the model or the catalog can list.
        """
        num_items = self.dataset.num_items
        if not isinstance(k, int | np.integer) or not 1 <= k <= num_items:
            raise UserError(f"k: can't be {k}; give a number from 1 to {num_items}, the items of {self.dataset.name}")
        self._check_beam(self.model, k, "give a smaller k")

    @_on_mesh
    def lists_fingerprint(self) -> str:
        """A fingerprint of what lists depend on besides the histories: the best checkpoint, the items and the training
        data."""
        self.best_model()
        train, step = self.split.train, self._best_step
        checkpoint = [] if step is None else [self.workdir / "checkpoints" / str(step) / digests.FILE_NAME]
        learned = self._learned_items() | self._learned_contents()
        return fingerprint(self.config.model, learned, train.values, train.offsets, *checkpoint)

    def _check_beam(self, model: Recommender, k: int, remedy: str) -> None:
        """
        Raises:
          UserError: the model's beam is narrower than a list.
        """
        if k > (width := getattr(model, "beam_width", k)):
            raise UserError(f"config.{self.config.model}.beam_width: {width} can't fill a list of {k}; {remedy}")

    def cases(self, split: str = "") -> EvaluationCases:
        """The evaluation cases of a split. "" is every user's whole history, with target 0, which means nothing.

        Raises:
          UserError: there is no such split.
        """
        if not split:
            users = np.arange(len(self.dataset.sequences), dtype=np.int32)
            return EvaluationCases(users, self.dataset.sequences, np.zeros_like(users))
        return self._judged_cases(split)

    def _judged_cases(self, split: str) -> EvaluationCases:
        """
        Raises:
          UserError: there is no such split.
        """
        if split not in SPLITS:
            raise UserError(f'split: "{split}" is unknown; choose one of {", ".join(SPLITS)}')
        return getattr(self.split, split)

    @_on_mesh
    def item_vectors(self) -> Float[np.ndarray, "N D"]:
        """The best checkpoint's item vectors, in the order of `dataset.item_ids`. Their dot products with
        `user_vectors` are the scores that lists are sorted by, but for the bias of `simgr.repeat_bias`.

        Raises:
          UserError: the model does not score by vectors.
        """
        model = self._model_with_vectors()
        graphdef, state = nnx.split(model)
        vectors = jax.jit(lambda state: nnx.merge(graphdef, state).item_vectors(nnx.merge(graphdef, state).catalog()))
        return np.asarray(vectors(state), np.float32)

    @_on_mesh
    def user_vectors(self, histories: Any) -> Float[np.ndarray, "B D"]:
        """The best checkpoint's vector of each user, given histories as for `recommend`. A history without any known
        item has the vector 0.

        Raises:
          UserError: the model does not score by vectors.
        """
        model = self._model_with_vectors()
        asked = Histories.read(histories, self.dataset, self.config.data.log)
        asked.warn_of_unknown()
        vectors = np.zeros((len(asked.sequences), self.item_vectors().shape[1]), np.float32)
        if len(cases := asked.cases()):
            vectors[cases.users] = self.ranker.ask(model, cases, "user_vectors")
        return vectors

    def _model_with_vectors(self) -> Recommender:
        model = self.best_model()
        if not hasattr(model, "item_vectors"):
            raise UserError(f'config.model: "{self.config.model}" does not score items by vectors; simgr does')
        return model

    @_on_mesh
    def export(self, output: str | Path, *, dtype: str = "", filter_history: bool = False) -> None:
        """Writes the best checkpoint as a folder for Transformers, with its catalog as an item index (docs/export.md).

        Args:
          output: the folder to write; it must not exist yet.
          dtype: "float32" or "bfloat16"; "" is the base model's own.
          filter_history: whether the exported program leaves a history's items out of its list.

        Raises:
          UserError: the model is not SimGR, or the folder can't be written.
        """
        export_folder.write(self, Path(os.path.expanduser(output)), dtype, filter_history)

    # What the run left in its workdir.

    def log(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; none for a model that is not trained.

        Raises:
          UserError: a line can't be read.
        """
        return read_log(self.workdir / "metrics.jsonl") if self.options.is_trained else []

    def report(self, split: str = "test") -> dict[str, Any]:
        """The metrics.json of a report that was written before.

        Raises:
          UserError: there is none.
        """
        return read_json_object(self._report_folder(split) / "metrics.json")

    def saved_ranking(self, split: str = "test") -> CaseRankings:
        """The lists and ranks of a report that was written before.

        Raises:
          UserError: there are none.
        """
        return saved_ranking.read(self._report_folder(split))

    def _report_folder(self, split: str) -> Path:
        return self.workdir / ("report" if split == "test" else f"report_{split}")

    # What the run learns from.

    def _learned_items(self) -> dict[str, str]:
        return {"items": fingerprint(self.dataset.item_ids)}

    def _learned_contents(self) -> dict[str, str]:
        """Fingerprints of what the model knows about the items besides their index."""
        learned = {}
        if self.semantic_ids is not None:
            learned["semantic_ids"] = fingerprint(self.semantic_ids.codes.astype(np.int32))
        if self.options.reads_item_texts:
            learned["item_readings"] = self.item_reader.fingerprint
        if len(self.prompt.text_tokens):
            learned["text_tokens"] = fingerprint(self.prompt.text_tokens)
        return learned
