"""`simgr_jax.recommend --histories`: lists for a file of histories."""

import json
import warnings

import polars as pl
import pytest

from simgr_jax.errors import UserError
from simgr_jax.run import Run
from simgr_jax.serving.recommend_file import recommend_file
from simgr_jax.workdir.lock import locked


@pytest.fixture(scope="module")
def run(trained_workdir):
    return Run.load(trained_workdir)


@pytest.fixture(scope="module")
def histories(run):
    """Histories of the run's items: long, short, empty, and with ids that the catalog does not have."""
    ids = run.dataset.item_ids
    known = [[ids[item] for item in run.dataset.sequences[number][: number % 7]] for number in range(40)]
    return [*known, ["none"], [ids[3], "none", ids[5]], [ids[2]] * 50]


@pytest.fixture
def file(tmp_path, histories):
    path = tmp_path / "histories.jsonl"
    lines = [json.dumps({"user": f"u{number}", "items": items}) for number, items in enumerate(histories)]
    path.write_text("\n".join(lines) + "\n")
    return path


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("filter_history", [False, True])
@pytest.mark.parametrize("part", [7, 1000])
def test_lists_are_those_of_the_api(run, file, histories, tmp_path, part, filter_history):
    done = recommend_file(run, file, tmp_path / "out.jsonl", 5, filter_history, part)
    with warnings.catch_warnings(action="ignore"):
        expected = run.recommend(histories, k=5, filter_history=filter_history)
    assert read(tmp_path / "out.jsonl") == [
        {"user": f"u{number}", "items": items} for number, items in enumerate(expected.items)
    ]
    assert (done.lists, done.unknown, done.popular, done.bad) == (
        *(len(histories), expected.unknown),
        *(len(expected.popular), 0),
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["histories.jsonl", "out.jsonl"]


@pytest.mark.parametrize("stop", [1, 3, 6])
def test_a_job_that_is_stopped_goes_on_and_writes_the_same_file(run, file, tmp_path, monkeypatch, stop):
    file.write_text(file.read_text() + "bad\n" + file.read_text())
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    expected = recommend_file(run, file, whole, 5, False, 10)
    asked = []

    def lists(cases, *options):
        asked.append(cases)
        if len(asked) == stop + 1:
            raise KeyboardInterrupt
        return Run.lists(run, cases, *options)

    monkeypatch.setattr(run, "lists", lists)
    with pytest.raises(KeyboardInterrupt):
        recommend_file(run, file, broken, 5, False, 10)
    assert not broken.exists()
    # The kill came while the next part was written.
    with (tmp_path / "broken.jsonl.unfinished" / "lists.jsonl").open("a") as stream:
        stream.write('{"user": "u')
    assert recommend_file(run, file, broken, 5, False, 10) == expected
    assert len(asked) == 1 + 9  # No part is computed twice.
    assert broken.read_bytes() == whole.read_bytes()
    bad = [read(tmp_path / f"{name}.jsonl.bad.jsonl") for name in ("whole", "broken")]
    assert bad[0] == bad[1] and [row["number"] for row in bad[0]] == [44]
    assert not (tmp_path / "broken.jsonl.unfinished").exists()


def test_another_jobs_folder_is_not_continued(run, file, tmp_path, monkeypatch):
    def fail(*arguments):
        raise KeyboardInterrupt

    output = tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(run, "lists", fail)
        with pytest.raises(KeyboardInterrupt):
            recommend_file(run, file, output, 5, False)
    done = tmp_path / "out.jsonl.unfinished" / "done.json"
    recommend_file(run, file, output, 6, False)  # Nothing had been written.
    assert len(read(output)[0]["items"]) == 6

    original = Run.lists
    monkeypatch.setattr(run, "lists", lambda *a: fail() if done.exists() else original(run, *a))
    with pytest.raises(KeyboardInterrupt):
        recommend_file(run, file, output, 5, False, 10)
    before = done.read_bytes()
    with pytest.raises(UserError, match="is of other histories, options or another model; remove the folder"):
        recommend_file(run, file, output, 6, False, 10)
    file.write_text(file.read_text() * 2)
    with pytest.raises(UserError, match="is of other histories"):
        recommend_file(run, file, output, 5, False, 10)
    assert done.read_bytes() == before and len(read(output)[0]["items"]) == 6

    (done.parent / "lists.jsonl").write_text("")
    done.write_text(json.dumps(json.loads(before) | {"done": {"rows": 3}}))
    file.write_text(file.read_text())
    with pytest.raises(UserError, match="remove the folder to begin anew"):
        recommend_file(run, file, output, 5, False, 10)


def test_two_jobs_do_not_write_one_output(run, file, tmp_path):
    folder = tmp_path / "out.jsonl.unfinished"
    folder.mkdir()
    with locked(folder, "a job is writing"), pytest.raises(UserError, match="a job is writing in it already"):
        recommend_file(run, file, tmp_path / "out.jsonl", 5, False)


@pytest.mark.parametrize("name", ["folder", "histories.jsonl"])
def test_outputs_that_are_refused_before_any_work(run, file, tmp_path, name):
    (tmp_path / "folder").mkdir()
    before = file.read_bytes()
    with pytest.raises(UserError, match=f"{name}: is "):
        recommend_file(run, file, tmp_path / name, 5, False)
    assert file.read_bytes() == before
    with pytest.raises(UserError, match="no such file"):
        recommend_file(run, tmp_path / "none.jsonl", file, 5, False)


def test_the_command(run_binary, trained_workdir, file, histories, tmp_path, capfd):
    pl.DataFrame([{"user": row["user"], "items": row["items"]} for row in read(file)]).write_parquet(
        tmp_path / "histories.parquet"
    )
    lists = []
    for name in ("histories.jsonl", "histories.parquet"):
        output = tmp_path / f"{name}.out"
        command = ("recommend", f"--workdir={trained_workdir}", f"--output={output}", "--k=3")
        assert run_binary(*command, f"--histories={tmp_path / name}") == 0
        out, _ = capfd.readouterr()
        assert f"3 items for each of {len(histories)} histories are in {output}" in out
        assert "2 ids are not in the catalog" in out and "7 histories have no item of the catalog" in out
        lists.append(output.read_text())
    assert lists[0] == lists[1]

    file.write_text('{"user": "a", "items": []}\nnothing\n')
    assert run_binary(*command, f"--histories={file}") == 2
    assert capfd.readouterr().err == (
        f"error: {file}: 1 rows can't be read; {tmp_path / 'histories.parquet.out.bad.jsonl'} says which and why\n"
    )
    assert [line["user"] for line in read(output)] == ["a"]
    assert run_binary(*command, f"--histories={file}", "--split=test") == 2
    assert run_binary(*command, f"--histories={file}", "--k=100000") == 2
    assert "error: --k: can't be 100000" in capfd.readouterr().err
