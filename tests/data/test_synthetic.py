import hashlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from simgr_jax.data import synthetic
from simgr_jax.data.dataset import Sequences
from simgr_jax.errors import UserError

SMALL = {"num_users": 50, "num_items": 40, "seed": 3}


@pytest.fixture(scope="module")
def world():
    """The quickstart's world."""
    return synthetic.generate(num_users=6000, num_items=1200, seed=0)


@pytest.fixture(scope="module")
def small_world():
    return synthetic.generate(**SMALL)


@pytest.fixture(scope="module")
def cases(world):
    """The histories and targets of leave-one-out."""
    return Sequences.from_lists(s[:-1] for s in world.sequences), np.array([s[-1] for s in world.sequences])


@pytest.fixture(scope="module")
def oracle_probabilities(world, cases):
    return world.next_item_probabilities(cases[0])


def top_10(scores):
    return np.argpartition(-scores, 10, axis=1)[:, :10]


def hit_rate(scores, targets):
    return np.mean((top_10(scores) == targets[:, None]).any(axis=1))


def transition_counts(states, items, num_states, num_items):
    counts = np.zeros((num_states, num_items))
    np.add.at(counts, (states, items), 1)
    return counts


@settings(max_examples=40, deadline=None)
@given(histories=st.lists(st.lists(st.integers(0, 39), max_size=30), max_size=6))
def test_next_item_probabilities_are_a_distribution_over_all_items(small_world, histories):
    probabilities = small_world.next_item_probabilities(histories)
    assert probabilities.shape == (len(histories), 40)
    assert (probabilities > 0).all()
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-12)


def test_next_item_probabilities_are_the_documented_mixture(small_world):
    history = [7, 30, 7, 12]
    popularity, follow, taste = (
        table.weights / table.weights.sum(axis=1, keepdims=True)
        for table in (small_world.law.popularity, small_world.law.follow, small_world.law.taste)
    )
    weights = [0.8**3, 0.8**2, 0.8, 1.0]
    liked = sum(w * taste[item] for w, item in zip(weights, history, strict=True)) / sum(weights)
    expected = 0.45 * follow[12] + 0.45 * liked + 0.1 * popularity[0]
    np.testing.assert_allclose(small_world.next_item_probabilities([history])[0], expected, rtol=1e-12)
    np.testing.assert_allclose(small_world.next_item_probabilities([[]])[0], popularity[0], rtol=1e-12)


def test_an_item_counts_less_the_longer_ago_it_was_bought(small_world):
    recent, old = small_world.next_item_probabilities([[1, 5, 2], [5, 1, 2]])
    liked_after_5 = np.argmax(small_world.law.taste.probabilities[5] - small_world.law.taste.probabilities[1])
    assert recent[liked_after_5] > old[liked_after_5]


def test_items_are_drawn_in_proportion_to_their_weights():
    table = synthetic.WeightTable(np.array([[1, 0, 2], [0, 3, 1]]))
    np.testing.assert_array_equal(table.draw(np.zeros(3, int), np.array([0, 1 / 3, 0.999])), [0, 2, 2])
    np.testing.assert_array_equal(
        table.draw(np.ones(5, int), np.array([0, 0.25, 0.5, 0.75, 1 - 2**-53])), [1, 1, 1, 2, 2]
    )


@pytest.mark.parametrize("history", [[], [4], [4, 21, 4, 9, 33, 0]])
def test_drawn_items_follow_the_stated_distribution(small_world, history):
    draws = 200_000
    rng = np.random.default_rng(11)
    items = small_world.law.draw(rng, np.tile(np.array(history, np.int64), (draws, 1)))
    expected = draws * small_world.next_item_probabilities([history])[0]
    assert expected.min() > 5  # so that chi-square is valid
    assert stats.chisquare(np.bincount(items, minlength=40), expected).pvalue > 1e-3


def test_users_follow_the_stated_distribution(world, cases, oracle_probabilities):
    """Over all users, the mean log-likelihood of the next item is minus the entropy of p, within sampling error."""
    p = oracle_probabilities
    surprise = -np.log(p[np.arange(len(p)), cases[1]])
    entropy = -(p * np.log(p)).sum(axis=1)
    difference = surprise - entropy
    assert abs(difference.mean()) < 4 * difference.std() / np.sqrt(len(p))


def test_first_items_follow_popularity(world):
    first_items = world.sequences.values[world.sequences.offsets[:-1]]
    popularity = world.next_item_probabilities([[]])[0]
    group = np.argsort(np.argsort(popularity)) // 60  # 20 groups of items, so that chi-square is valid
    observed = np.bincount(group[first_items], minlength=20)
    assert stats.chisquare(observed, 6000 * np.bincount(group, popularity)).pvalue > 1e-3


def test_oracle_hit_rate_is_what_its_probabilities_predict(cases, oracle_probabilities):
    expected = np.take_along_axis(oracle_probabilities, top_10(oracle_probabilities), axis=1).sum(axis=1)
    error = np.sqrt((expected * (1 - expected)).sum()) / len(expected)
    assert abs(hit_rate(oracle_probabilities, cases[1]) - expected.mean()) < 4 * error


def test_hit_rates_of_popularity_counting_and_the_oracle_are_far_apart(world, cases, oracle_probabilities):
    histories, targets = cases
    num_items = len(world.catalog)
    train = [s[:-2] for s in world.sequences]
    sources, successors = np.concatenate([s[:-1] for s in train]), np.concatenate([s[1:] for s in train])
    last_items = histories.values[histories.offsets[1:] - 1]

    popularity = np.bincount(np.concatenate(train), minlength=num_items) / len(sources)
    by_item = transition_counts(sources, successors, num_items, num_items)
    markov = by_item / np.maximum(by_item.sum(axis=1, keepdims=True), 1)
    category, product = world.catalog.category, world.catalog.product
    by_category = transition_counts(category[sources], successors, category.max() + 1, num_items)
    by_product = transition_counts(product[sources], successors, product.max() + 1, num_items)
    last_item_only = world.next_item_probabilities(last_items[:, None])

    rates = {
        "popularity": hit_rate(np.tile(popularity, (len(targets), 1)), targets),
        "category": hit_rate(by_category[category[last_items]], targets),
        "product": hit_rate(by_product[product[last_items]], targets),
        "markov": hit_rate(markov[last_items] + 1e-6 * popularity, targets),
        "last item only": hit_rate(last_item_only, targets),
        "oracle": hit_rate(oracle_probabilities, targets),
    }
    assert 0.03 < rates["popularity"] < 0.07, rates
    assert 0.35 < rates["oracle"] < 0.5, rates
    assert 2 * rates["popularity"] < rates["category"] < rates["product"] < rates["markov"], rates
    assert 0.6 * rates["oracle"] < rates["markov"] < 0.85 * rates["oracle"], rates
    # The older history has information that no model of the last item alone can use.
    assert rates["markov"] + 0.04 < rates["last item only"] < rates["oracle"] - 0.02, rates


def test_popularity_has_a_long_tail_without_unseen_items(world):
    counts = np.sort(np.bincount(world.sequences.values, minlength=1200))[::-1]
    assert 0.3 < counts[:120].sum() / counts.sum() < 0.5
    assert counts[600:].sum() / counts.sum() < 0.3
    assert counts[-1] >= 1


def test_tastes_drift(world):
    """Items bought in succession share their brand far more often than items bought seven apart."""
    brands = [world.catalog.brand[s] for s in world.sequences if len(s) >= 10]
    shared = {gap: np.mean(np.concatenate([b[gap:] == b[:-gap] for b in brands])) for gap in (1, 7)}
    chance = np.sum((np.bincount(np.concatenate(brands)) / sum(map(len, brands))) ** 2)
    assert shared[1] > 1.5 * shared[7] > 1.5 * chance, (shared, chance)


def test_lengths_are_those_of_a_5_core_dataset(world):
    lengths = world.sequences.lengths
    assert lengths.min() == 5
    assert lengths.max() == 24
    assert 9 < lengths.mean() < 10.5


def test_texts_name_the_attributes_of_an_item(world):
    texts, catalog = world.catalog.texts, world.catalog
    assert len(set(texts)) == len(texts) == len(set(catalog.item_ids)) == 1200
    first_of_product = texts[int(np.argmax(catalog.product == catalog.product[0]))]
    assert first_of_product.split(";")[0].endswith(texts[0].split(";")[0].split(maxsplit=4)[-1])
    for name in ("category", "brand", "line", "material"):
        same = np.flatnonzero(getattr(catalog, name) == getattr(catalog, name)[0])
        common = set.intersection(*(set(texts[i].replace(";", "").split()) for i in same))
        assert len(same) > 1
        assert common, name


def test_words_are_distinct_within_each_attribute():
    for words in (synthetic._PRODUCTS, synthetic._MATERIALS, synthetic._LINES, synthetic._ADJECTIVES):
        assert len(set(words)) == len(words)
    assert [len(words) for words in (synthetic._PRODUCTS, synthetic._MATERIALS, synthetic._LINES)] == [96, 48, 72]


def test_equal_seeds_give_equal_worlds_and_other_seeds_others(small_world):
    again = synthetic.generate(**SMALL)
    assert again.catalog.texts == small_world.catalog.texts
    np.testing.assert_array_equal(again.sequences.values, small_world.sequences.values)
    other = synthetic.generate(**{**SMALL, "seed": 4})
    assert other.catalog.texts != small_world.catalog.texts
    assert not np.array_equal(other.sequences.values, small_world.sequences.values)


def test_files_are_the_same_on_every_platform(tmp_path):
    """If the data was meant to change, put the new digests here."""
    synthetic.ensure(tmp_path, **SMALL)
    digests = {
        name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()[:16]
        for name in ("item_plain_text.txt", "user_sequence.txt")
    }
    assert digests == {"item_plain_text.txt": "d09ab407b8677881", "user_sequence.txt": "71dc21737e36e09d"}


def test_ensure_writes_the_world_in_p5_form(tmp_path, small_world):
    synthetic.ensure(tmp_path / "new" / "data", **SMALL)
    folder = tmp_path / "new" / "data"
    assert sorted(p.name for p in folder.iterdir()) == ["item_plain_text.txt", "synthetic.json", "user_sequence.txt"]
    items = [line.split(" ", 1) for line in (folder / "item_plain_text.txt").read_text().splitlines()]
    assert [text for _, text in items] == small_world.catalog.texts
    index = {item: i for i, (item, _) in enumerate(items)}
    assert len(index) == 40
    users = [line.split(" ") for line in (folder / "user_sequence.txt").read_text().splitlines()]
    assert len({user for user, *_ in users}) == 50
    for (_, *bought), expected in zip(users, small_world.sequences, strict=True):
        assert [index[item] for item in bought] == expected.tolist()


def test_ensure_adds_missing_files_and_leaves_the_others_alone(tmp_path):
    synthetic.ensure(tmp_path, **SMALL)
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns, p.stat().st_ino) for p in tmp_path.iterdir()}
    synthetic.ensure(tmp_path, **SMALL)
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns, p.stat().st_ino) for p in tmp_path.iterdir()} == before
    for name in before:
        (tmp_path / name).unlink()
        synthetic.ensure(tmp_path, **SMALL)
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {n: c for n, (c, *_) in before.items()}


@pytest.mark.parametrize("change", [{"num_users": 51}, {"num_items": 41}, {"seed": 4}])
def test_ensure_refuses_a_folder_of_other_arguments(tmp_path, change):
    synthetic.ensure(tmp_path, **SMALL)
    with pytest.raises(UserError, match=r"synthetic\.json: the data there was made with num_users=50.*choose another"):
        synthetic.ensure(tmp_path, **{**SMALL, **change})


@pytest.mark.parametrize("name", ["user_sequence.txt", "item_plain_text.txt"])
def test_other_files_are_not_overwritten_and_have_no_oracle(tmp_path, name):
    (tmp_path / name).write_text("A1 B1 B2\n")
    with pytest.raises(UserError, match=f"{name}: not what this version makes"):
        synthetic.ensure(tmp_path, **SMALL)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "A1 B1 B2\n"
    (tmp_path / "synthetic.json").write_text(json.dumps(SMALL))
    with pytest.raises(UserError, match=r"(no such file|not what this version makes)"):
        synthetic.oracle(tmp_path)


def test_oracle_is_the_world_that_ensure_wrote(tmp_path, small_world):
    synthetic.ensure(tmp_path, **SMALL)
    world = synthetic.oracle(tmp_path)
    np.testing.assert_array_equal(world.sequences.values, small_world.sequences.values)
    np.testing.assert_array_equal(
        world.next_item_probabilities(world.sequences), small_world.next_item_probabilities(small_world.sequences)
    )


@pytest.mark.parametrize("content", [None, "{", "[]", '{"num_users": 50}', json.dumps({**SMALL, "seed": "3"}), "\xff"])
def test_oracle_needs_the_arguments(tmp_path, content):
    if content is not None:
        (tmp_path / "synthetic.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"synthetic\.json: "):
        synthetic.oracle(tmp_path)


@pytest.mark.parametrize("change", [{"num_users": 0}, {"num_items": 1}, {"num_items": 6913}, {"seed": -1}])
def test_arguments_out_of_range_are_named(change):
    with pytest.raises(UserError, match=f"config.data.synthetic.{next(iter(change))}: "):
        synthetic.generate(**{**SMALL, **change})


def test_a_file_in_place_of_the_folder_is_a_users_mistake(tmp_path):
    (tmp_path / "data").write_text("")
    with pytest.raises(UserError, match=r"can't be read \(Not a directory\)"):
        synthetic.ensure(tmp_path / "data", **SMALL)
