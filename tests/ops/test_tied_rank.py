import itertools

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from simgr_jax.data.dataset import Sequences
from simgr_jax.models import popularity
from simgr_jax.ops.tied_rank import num_ahead, tied_rank
from simgr_jax.ops.top_k import rank_catalog, rank_in_list


@given(num_better=st.integers(0, 4), num_tied=st.integers(0, 4))
def test_the_rank_is_the_mean_over_all_orders_of_the_ties(num_better, num_tied):
    places = [order.index(0) + 1 for order in itertools.permutations(range(num_tied + 1))]
    assert tied_rank(num_better, num_tied) == num_better + np.mean(places)


# They are few, because each is compiled anew.
LENGTHS = st.sampled_from((2, 3, 12))


@settings(deadline=None)
@given(counts=LENGTHS.flatmap(lambda n: st.lists(st.integers(0, 3), min_size=n, max_size=n)), data=st.data())
def test_every_ranking_agrees_with_brute_force(counts, data):
    """The catalog's, that within a list, and popularity's."""
    target = data.draw(st.integers(0, len(counts) - 1))
    better = sum(count > counts[target] for count in counts)
    tied = sum(count == counts[target] for count in counts) - 1
    expected = np.mean([better + 1 + place for place in range(tied + 1)])

    scores, targets, k = jnp.asarray([counts], jnp.float32), np.array([target]), len(counts)
    ranking = rank_catalog(scores, jnp.asarray(targets), k)
    in_list = rank_in_list(ranking.items, ranking.scores, jnp.asarray(targets))
    # Each item occurs as often in training as its count says.
    train = Sequences.from_lists([np.repeat(np.arange(k), counts)])
    popular = popularity.rank(train, k, targets, k)
    assert ranking.target_rank[0] == in_list[0] == popular.target_rank[0] == expected


@settings(deadline=None)
@given(scores=LENGTHS.flatmap(lambda n: st.lists(st.integers(0, 3), min_size=n, max_size=n)), data=st.data())
def test_items_that_are_not_counted_are_ahead_of_nobody(scores, data):
    counted = data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores)))
    ahead = num_ahead(jnp.asarray([scores], jnp.float32), jnp.full((1, 1), 2.0), jnp.asarray([counted]))
    assert ahead[0] == sum(
        {3: 1, 2: 0.5}.get(score, 0) for score, counts in zip(scores, counted, strict=True) if counts
    )
