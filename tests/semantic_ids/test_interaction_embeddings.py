"""Item embeddings from the training sequences."""

import numpy as np

from simgr_jax.data.dataset import Sequences
from simgr_jax.semantic_ids import interaction_embeddings
from simgr_jax.semantic_ids.interaction_embeddings import cooccurrence


def test_items_that_occur_together_are_close_and_lone_items_zero():
    rng = np.random.default_rng(0)
    # Items 0-9 and 10-19 never occur together; item 20 occurs alone, item 21 never.
    sequences = [rng.permutation(10)[:5] + 10 * (i % 2) for i in range(400)] + [[20, 20]]
    embeddings = cooccurrence(Sequences.from_lists(sequences), num_items=22, dim=8, seed=0, window=3)
    assert embeddings.shape == (22, 8)
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embeddings[:20], axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(embeddings[20:], 0)
    similarity = embeddings @ embeddings.T
    assert np.abs(similarity[:10, 10:20]).max() < 1e-3


def test_counts_match_a_loop_over_pairs():
    rng = np.random.default_rng(1)
    sequences = [rng.integers(0, 6, rng.integers(1, 9)).tolist() for _ in range(30)]
    expected = np.zeros((6, 6))
    for sequence in sequences:
        for i, first in enumerate(sequence):
            for j in range(i + 1, min(i + 3, len(sequence))):
                if first != sequence[j]:
                    expected[first, sequence[j]] += 1 / (j - i)
                    expected[sequence[j], first] += 1 / (j - i)
    counts = interaction_embeddings._pair_counts(Sequences.from_lists(sequences), 6, window=2)
    np.testing.assert_allclose(counts.toarray(), expected, rtol=1e-6)
    with np.errstate(divide="ignore"):
        information = np.log(expected * expected.sum() / np.outer(expected.sum(0), expected.sum(1)))
    np.testing.assert_allclose(
        interaction_embeddings._ppmi(counts).toarray(), np.maximum(information, 0), rtol=1e-5, atol=1e-6
    )


def test_full_rank_embeddings_keep_the_angles_of_the_ppmi():
    rng = np.random.default_rng(2)
    train = Sequences.from_lists([rng.integers(0, 12, 6) for _ in range(60)])
    ppmi = interaction_embeddings._ppmi(interaction_embeddings._pair_counts(train, 12, 5)).toarray()
    left, singular_values, _ = np.linalg.svd(ppmi)
    expected = left * np.sqrt(singular_values)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    embeddings = cooccurrence(train, 12, dim=12, seed=0, window=5)
    np.testing.assert_allclose(embeddings @ embeddings.T, expected @ expected.T, atol=1e-4)
