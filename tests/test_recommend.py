"""`simgr_jax.recommend`, as the binary."""

import json

import pytest


@pytest.fixture(scope="module")
def shop(trained_workdir):
    """({user: items}, [item]) of the embedded data, as their files have them."""
    (folder,) = (trained_workdir / "cache").glob("synthetic-*/")
    rows = [line.split() for line in (folder / "user_sequence.txt").read_text().splitlines()]
    items = [line.split()[0] for line in (folder / "item_plain_text.txt").read_text().splitlines()]
    return {user: items for user, *items in rows}, items


@pytest.fixture
def recommend(run_binary, trained_workdir, tmp_path):
    def recommend(*options):
        file = tmp_path / "new folder" / "out.jsonl"
        assert run_binary("recommend", f"--workdir={trained_workdir}", f"--output={file}", *options) == 0
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        assert all(line.keys() == {"user", "items"} for line in lines)
        assert [path.name for path in file.parent.iterdir()] == ["out.jsonl"]
        return [(line["user"], line["items"]) for line in lines]

    return recommend


@pytest.mark.parametrize(
    ("options", "k"), [((), 10), (("--k=25",), 25), (("--k=60", "--split=test"), 60), (("--k=1",), 1)]
)
def test_each_user_gets_k_different_known_items_once(recommend, shop, options, k):
    sequences, items = shop
    lines = recommend(*options)
    assert [user for user, _ in lines] == list(sequences)
    for _, recommended in lines:
        assert len(set(recommended)) == len(recommended) == k
        assert set(recommended) <= set(items)


def test_a_longer_list_begins_with_the_shorter_one(recommend):
    longer = dict(recommend("--k=25"))
    assert all(longer[user][:10] == items for user, items in recommend())


def test_whole_histories_are_continued_by_default_and_earlier_ones_for_a_split(recommend):
    whole, test, validation = recommend(), recommend("--split=test"), recommend("--split=validation")
    assert whole != test != validation != whole


def test_history_items_are_left_out_where_that_is_asked_for(recommend, shop):
    sequences, _ = shop
    filtered, whole = dict(recommend("--filter_history")), dict(recommend("--k=60"))
    for user, items in filtered.items():
        assert items == [item for item in whole[user] if item not in sequences[user]][:10]


def test_the_same_command_writes_the_same_file(recommend):
    assert recommend() == recommend()


def test_a_model_still_recommends_when_interactions_are_added(run_binary, tiny_options, shop, tmp_path, capfd):
    """Its semantic IDs come from co-occurrence, so fitting them again would give others."""
    log, workdir, file = tmp_path / "log.csv", tmp_path / "workdir", tmp_path / "out.jsonl"
    rows = [(user, item, time) for user, items in shop[0].items() for time, item in enumerate(items)]

    def write(rows):
        log.write_text("user,item,timestamp\n" + "".join(f"{user},{item},{time}\n" for user, item, time in rows))

    def recommend():
        assert run_binary("recommend", f"--workdir={workdir}", f"--output={file}") == 0
        return {line["user"]: line["items"] for line in map(json.loads, file.read_text().splitlines())}

    write(rows)
    data = ("--config.data.format=log", f"--config.data.path={log}", "--config.data.k_core=0")
    embeddings = "--config.semantic_ids.embeddings.names=('interactions',)"
    assert run_binary("train", *tiny_options, *data, embeddings, "--noreport", f"--workdir={workdir}") == 0
    before, users = recommend(), list(shop[0])
    newcomer = [("someone new", item, time) for _, item, time in rows[:3]]
    write(rows + [(user, rows[0][1], 1000) for user in users[:100]] + newcomer)
    after = recommend()
    assert after.keys() == before.keys() | {"someone new"}
    assert all(after[user] == before[user] for user in users[100:])
    assert any(after[user] != before[user] for user in users[:100])

    (workdir / "semantic_ids.npz").unlink()
    assert run_binary("recommend", f"--workdir={workdir}", f"--output={file}") == 2
    assert f"error: {workdir}/trained_on.json:semantic_ids: have changed since" in capfd.readouterr().err
