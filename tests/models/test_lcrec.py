import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy.special import log_softmax, logsumexp

from simgr_jax.data.dataset import Sequences
from simgr_jax.errors import UserError
from simgr_jax.huggingface import families
from simgr_jax.huggingface.checkpoint import Checkpoint
from simgr_jax.huggingface.load_weights import load_transformer
from simgr_jax.inputs import prompts
from simgr_jax.inputs.batch import RankBatch
from simgr_jax.inputs.train_batches import train_batches
from simgr_jax.inputs.training_windows import TrainingWindows
from simgr_jax.models import registry, speller
from simgr_jax.models.lcrec import Options
from simgr_jax.models.lora import Frozen
from simgr_jax.models.model_inputs import Backbone, ModelInputs
from simgr_jax.ops.top_k import rank_catalog
from simgr_jax.run import Run
from simgr_jax.semantic_ids.codes import SemanticIds
from simgr_jax.training.state import create_state, make_train_step
from tests.training import tiny_run

SIZES = (4, 5, 3)
LEVELS, VOCABULARY = len(SIZES), sum(SIZES)
USERS = Sequences.from_lists(np.random.default_rng(length).integers(0, 37, length) for length in (5, 3, 6, 2))
PREFIX = np.array([VOCABULARY + 1, VOCABULARY, VOCABULARY + 1], np.int32)


@pytest.fixture(scope="session")
def twins(codes):
    """int [37, 3]; three items have the same codes, and so have two others."""
    codes = codes.copy()
    codes[[7, 30]], codes[22] = codes[1], codes[21]
    return codes


def make_config(**changes):
    config = tiny_run.config("lcrec")
    config.backbone.update(
        {"width": 8, "layers": 1, "heads": 2, "kv_heads": 1, "head_width": 4, "mlp_width": 12, "dropout": 0.0}
    )
    config.update_from_flattened_dict(changes)
    return config


def make(codes, text_embedding=None, sizes=SIZES, **changes):
    """A model whose parameters are all random, so that probabilities differ much."""
    model = tiny_run.make_model(make_config(**changes), SemanticIds(codes.astype(np.int32), sizes), USERS)
    model.text_embedding = nnx.data(text_embedding)
    generator = np.random.default_rng(3)
    random = lambda x: jnp.asarray(generator.normal(0.2, 0.5, x.shape), jnp.float32)  # noqa: E731
    nnx.update(model, jax.tree.map(random, nnx.state(model, nnx.Param)))
    return model


def tokens_of(codes):
    return codes + np.array([0, 4, 9])


@nnx.jit
def _states(model, inputs, segment_ids, positions):
    return model.backbone(model._embed(inputs), segment_ids, positions)


def next_token(model, sequences):
    """log p(token | sequence), float64 [S, V]; each sequence is read alone."""
    rows = -len(sequences) % 64 + len(sequences)  # A multiple of 64, so that few shapes are compiled.
    lengths = np.array([len(s) for s in sequences] + [1] * (rows - len(sequences)))
    inputs = np.zeros((rows, 24), np.int32)
    for row, sequence in zip(inputs, sequences, strict=False):
        row[: len(sequence)] = sequence
    positions = np.broadcast_to(np.arange(24), inputs.shape)
    states = _states(model, inputs, (positions < lengths[:, None]).astype(np.int32), positions)
    last = np.asarray(states, np.float64)[np.arange(rows), lengths - 1][: len(sequences)]
    return log_softmax(last @ np.asarray(model.embedding[...], np.float64).T, axis=1)


def likelihoods(model, history, tokens):
    """log p(item's tokens | history), [N], for tokens [N, L]."""
    scores = np.zeros(len(tokens))
    for level in range(tokens.shape[1]):
        sequences = [[*history, *item[:level]] for item in tokens]
        scores += next_token(model, sequences)[np.arange(len(tokens)), tokens[:, level]]
    return scores


def rank_batch(codes, histories=((3, 1, 20), (30,), (36, 2, 2, 5, 9)), targets=(22, 30, 5), prefix=()):
    inputs, items = np.zeros((len(histories), 18), np.int32), np.full((len(histories), 6), -1, np.int32)
    lengths = np.zeros(len(histories), np.int32)
    for row, history in enumerate(histories):
        sequence = [*prefix, *tokens_of(codes)[list(history)].reshape(-1)]
        inputs[row, : len(sequence)], lengths[row] = sequence, len(sequence)
        items[row, : len(history)] = history
    return RankBatch(inputs, lengths, items, np.array(targets, np.int32))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _answer(graphdef, question, arguments, state, batch):
    model = nnx.merge(graphdef, state)
    return getattr(model, question)(batch, model.catalog(), *arguments)


def ask(model, question, batch, *arguments):
    """What the model's method `question` returns."""
    graphdef, state = nnx.split(model)
    return jax.tree.map(np.asarray, _answer(graphdef, question, arguments, state, batch))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_the_loss_is_the_cross_entropy_of_each_targets_tokens(twins, label_smoothing):
    """The loss of packed windows equals that of each history read alone behind the prefix."""
    text_embedding = nnx.Param(jnp.asarray(np.random.default_rng(5).normal(size=(2, 8)), jnp.float32))
    model = make(twins, text_embedding, **{"lcrec.label_smoothing": label_smoothing})
    prompt = prompts.Prompt(PREFIX, prompts.token_prompt(tokens_of(twins)).pieces, 0, np.arange(2))
    windows = TrainingWindows(USERS, prompt, max_items=4, row_length=34, windows=Options().windows)
    batches = train_batches(windows, 2, seed=0)
    batch = next(batches)
    batches.close()
    assert batch.segment_ids.max() > 1 and not batch.valid.all()

    losses = []
    for row, column in zip(*np.nonzero(batch.valid), strict=True):
        end = batch.readouts[row, column] + 1
        history = batch.inputs[row, :end][batch.segment_ids[row, :end] == batch.segment_ids[row, end - 1]]
        assert history[:3].tolist() == PREFIX.tolist()
        target = tokens_of(twins)[batch.targets[row, column]]
        log_p = next_token(model, [[*history, *target[:level]] for level in range(LEVELS)])
        chosen = log_p[np.arange(LEVELS), target]
        losses.append(-((1 - label_smoothing) * chosen + label_smoothing * log_p.mean(axis=1)).sum())
    loss, scalars = nnx.jit(lambda model, batch: model.loss(batch, nnx.Rngs(dropout=0)))(model, batch)
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(scalars["token_loss"], np.mean(losses) / LEVELS, rtol=1e-5)


def test_an_items_likelihood_is_that_of_its_tokens(twins, monkeypatch):
    """Also if items are scored in chunks, of which the last is not full."""
    monkeypatch.setattr(speller, "_SCORING_FLOATS", 3 * LEVELS * 36 * 8)
    text_embedding = nnx.Param(jnp.ones((2, 8)))
    model, batch = make(twins, text_embedding), rank_batch(twins, prefix=PREFIX)
    found = ask(model, "item_log_likelihoods", batch)
    tokens = tokens_of(twins)
    expected = np.stack(
        [likelihoods(model, row[:length], tokens) for row, length in zip(batch.inputs, batch.lengths, strict=True)]
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(found[:, [1, 1, 21]], found[:, [7, 30, 22]])
    np.testing.assert_allclose(
        ask(model, "log_probabilities", batch), log_softmax(expected, axis=1), rtol=1e-4, atol=1e-4
    )
    distinct = np.delete(expected, [7, 30, 22], axis=1)
    np.testing.assert_allclose(ask(model, "log_item_mass", batch), logsumexp(distinct, axis=1), rtol=1e-4, atol=1e-4)


def test_likelihoods_sum_to_one_over_all_token_sequences():
    """Items are only some of these sequences."""
    every = np.array(list(itertools.product(range(4), range(5), range(3))))
    model, batch = make(every), rank_batch(every)
    history = batch.inputs[0, : batch.lengths[0]]
    total = logsumexp(likelihoods(model, history, np.array(list(itertools.product(range(VOCABULARY), repeat=3)))))
    np.testing.assert_allclose(total, 0, atol=1e-9)
    assert -5 < ask(model, "log_item_mass", batch)[0] < -0.1


@pytest.mark.parametrize("filter_history", [False, True])
def test_a_beam_as_wide_as_the_catalog_ranks_all_items(twins, filter_history):
    model, batch = make(twins, **{"lcrec.beam_width": 37}), rank_batch(twins)
    ranking = ask(model, "rank", batch, 20, filter_history)
    scores = ask(model, "item_log_likelihoods", batch).copy()
    if filter_history:
        for row, history in zip(scores, batch.history, strict=True):
            row[history[history >= 0]] = -np.inf
    expected = rank_catalog(jnp.asarray(scores), jnp.asarray(batch.targets), 20)
    np.testing.assert_allclose(ranking.scores, expected.scores, rtol=1e-4, atol=1e-4)
    in_history = [filter_history and target in row for target, row in zip(batch.targets, batch.history, strict=True)]
    np.testing.assert_array_equal(ranking.target_rank, np.where(in_history, np.inf, expected.target_rank))
    np.testing.assert_array_equal(ranking.items, expected.items)


def plain_beam(model, history, tokens, width):
    """Beam search without a cache: the items that it finds and their scores, best first."""
    beams = [((), 0.0)]
    for level in range(LEVELS):
        log_p = next_token(model, [[*history, *prefix] for prefix, _ in beams])
        grown = {
            (*prefix, token): score + row[token]
            for (prefix, score), row in zip(beams, log_p, strict=True)
            for token in {int(item[level]) for item in tokens if tuple(item[:level].tolist()) == prefix}
        }
        beams = sorted(grown.items(), key=lambda beam: -beam[1])[:width]
    spelled = {tuple(item): index for index, item in enumerate(tokens.tolist())}
    return [spelled[beam] for beam, _ in beams], [score for _, score in beams]


@pytest.mark.parametrize("width", [2, 3])
def test_a_narrow_beam_finds_what_a_plain_one_finds(codes, width):
    model, batch = make(codes), rank_batch(codes)
    items, scores = ask(model, "beam", batch, width)
    best = np.argsort(-ask(model, "item_log_likelihoods", batch), axis=1)[:, :width]
    for row, length in enumerate(batch.lengths):
        history = batch.inputs[row, :length]
        expected_items, expected_scores = plain_beam(model, history, tokens_of(codes), width)
        np.testing.assert_array_equal(items[row], expected_items)
        np.testing.assert_allclose(scores[row], expected_scores, rtol=1e-4, atol=1e-4)
    assert (items != best).any()  # Otherwise a narrow beam would be no different from a wide one.


def test_a_target_that_the_beam_did_not_keep_has_no_rank(codes):
    """Padding holds another token here, which makes no difference."""
    model, batch = make(codes, **{"lcrec.beam_width": 4}), rank_batch(codes)
    items, _ = ask(model, "beam", batch, 4)
    others = np.setdiff1d(np.arange(37), items[2])
    inputs = np.where(np.arange(18) < batch.lengths[:, None], batch.inputs, 5)
    batch = batch._replace(inputs=inputs, targets=np.array([items[0, 3], items[1, 0], others[0]]))
    ranking = ask(model, "rank", batch, 3, False)
    np.testing.assert_array_equal(ranking.items, items[:, :3])
    np.testing.assert_array_equal(ranking.target_rank, [4, 1, np.inf])


def test_items_of_a_single_token_are_ranked():
    codes = np.random.default_rng(0).permutation(12)[:, None]
    model = make(codes, sizes=(12,), **{"lcrec.beam_width": 12})
    inputs = np.array([[3, 4, 0], [7, 0, 0]], np.int32)
    batch = RankBatch(inputs, np.array([2, 1], np.int32), np.full((2, 3), -1, np.int32), np.array([5, 6], np.int32))
    expected = next_token(model, [[3, 4], [7]])[:, codes[:, 0]]
    np.testing.assert_allclose(ask(model, "log_probabilities", batch), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(ask(model, "rank", batch, 12, False).items, np.argsort(-expected, axis=1))


@pytest.mark.slow
def test_an_adapted_llm_trains_its_adapters_and_the_token_embeddings(root, codes):
    checkpoint = Checkpoint(root / "tests" / "huggingface" / "golden" / "qwen3")
    decoder = load_transformer(checkpoint, families.transformer_config(checkpoint.config, max_length=24), "bfloat16")
    generator = np.random.default_rng(0)
    embedding = generator.normal(0, 0.1, (VOCABULARY, 16)).astype(np.float32)
    text = jnp.asarray(generator.normal(0, 0.1, (2, 16)), jnp.bfloat16)
    config = make_config(**{"lora.rank": 2})
    ids = SemanticIds(codes.astype(np.int32), SIZES)
    inputs = ModelInputs(37, ids, USERS, lambda: Backbone(decoder, embedding, text), nnx.Rngs(0))
    model = registry.create(config, inputs)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    assert set(params) == {"backbone", "embedding"} and nnx.state(model, Frozen)

    prompt = prompts.Prompt(PREFIX, prompts.token_prompt(ids.tokens).pieces, 0, np.arange(2))
    batches = train_batches(TrainingWindows(USERS, prompt, 4, 24, Options().windows), 2, seed=0)
    batch = next(batches)
    batches.close()
    optimizer = optax.adam(3e-2)
    state = create_state(params, optimizer, ema_decay=0.0)
    step = make_train_step(graphdef, optimizer, 0.0, 0, state)
    losses = []
    for _ in range(3):
        state, scalars = step(state, rest, batch)
        losses.append(float(scalars["loss"]))
    assert losses[2] < losses[1] < losses[0]


def test_the_backbone_has_positions_for_the_item_that_is_spelled(codes, tmp_path):
    prompt = prompts.Prompt(PREFIX, prompts.token_prompt(tokens_of(codes)).pieces, 0, np.arange(2))
    # Rows of 14 are filled by longer histories when they are ranked.
    for row_length, longest in ((0, 3 + 4 * 3 + 3), (14, 14 + 3)):
        run = Run(make_config(**{"data.max_items": 4, "training.row_length": row_length}), tmp_path)
        run.prompt = prompt
        assert run.longest_sequence == longest


def test_text_between_items_is_refused(codes):
    with pytest.raises(UserError, match=r"^config\.prompt\.item: has more than .*leave the text out"):
        make(codes, **{"prompt.item": "\n{codes}"})


@pytest.mark.parametrize(("key", "value"), [("beam_width", 0), ("label_smoothing", 1.0)])
def test_an_impossible_option_is_named_by_its_key(key, value):
    with pytest.raises(UserError, match=rf"^config\.lcrec\.{key}: can't be {value}; give"):
        Options(**{key: value})
