import copy
import json
import os
import shutil
import signal
import threading
import time

import pytest
from comparisons import config, rates, write_report, written_config

from simgr_jax.comparison import runs as runs_lib
from simgr_jax.comparison.rows import read
from simgr_jax.comparison.runs import RunFailed, Runs, finished_workdirs
from simgr_jax.errors import UserError
from simgr_jax.run import Run
from simgr_jax.workdir import config_file


@pytest.fixture
def launched(monkeypatch):
    """Instead of training, a learning rate's score on validation is 1 / (1 + |rate - .02|), and in full training
    1 / (1 + |rate - .1|). Returns the workdirs' names in the order of their launches, and what fails, which tests may
    fill in."""
    names, failures = [], {}

    def launch(arguments, workdir, title):
        names.append(workdir.name)
        assert arguments[-1] == f"--workdir={workdir}"
        if workdir.name in failures:
            raise failures[workdir.name]
        values = written_config(workdir)
        best = 0.02 if values["training.epochs"] == 2 else 0.1
        score = 1 / (1 + abs(values["optimizer.learning_rate"] - best))
        if arguments[0] == "simgr_jax.evaluate":
            assert arguments[1] == "--split=validation"
            write_report(workdir)
            (workdir / "report").rename(workdir / "report_validation")
        elif values["model"] != "item_knn":
            (workdir / "checkpoints").mkdir(exist_ok=True)
            lines = [
                {"step": 1, "validation/NDCG@10": score},
                {"step": 2, "validation/NDCG@10": score / 2},
                {"step": 3},
            ]
            (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if "--noreport" not in arguments and arguments[0] == "simgr_jax.train":
            write_report(workdir)

    monkeypatch.setattr(runs_lib, "launch", launch)
    return names, failures


def begin(folder, finalists=1, **models):
    values = config(**models)
    values.finalists = finalists
    rows = read(values)
    return Runs(folder, values, rows), rows


def test_the_best_trial_is_trained_in_full(launched, tmp_path):
    runs, (row,) = begin(tmp_path, a={"trials": rates(0.5, 0.01, 0.1), "seeds": (7,)})
    tuning = runs.tune(row)
    assert launched[0] == ["a-1", "a-2", "a-3"]
    assert tuning.chosen == 1 and tuning.values == {"optimizer.learning_rate": 0.01}
    assert [trial.score for trial in tuning.trials] == pytest.approx([1 / 1.48, 1 / 1.01, 1 / 1.08])

    trial = written_config(tmp_path / "trials" / "a-3")
    expected = {"optimizer.learning_rate": 0.1, "training.epochs": 2, "seed": 7, "cache_dir": str(tmp_path / "cache")}
    assert trial.items() >= expected.items()
    assert not (tmp_path / "trials" / "a-3" / "report").exists()

    runs.train(row, 7, tuning)
    full = written_config(tmp_path / "runs" / "a")
    expected = {"optimizer.learning_rate": 0.01, "training.epochs": 30, "seed": 7, "cache_dir": str(tmp_path / "cache")}
    assert full.items() >= expected.items()
    assert list(runs.finished(row)) == [7]


def test_finalists_are_trained_in_full_and_the_best_of_them_is_the_run(launched, tmp_path):
    models = {"a": {"trials": rates(0.5, 0.01, 0.1, 0.03), "seeds": (7, 8)}}
    runs, (row,) = begin(tmp_path, finalists=3, **models)
    assert runs.tuning(row) is None
    tuning = runs.tune(row)
    # The best trial first; the worst is not in.
    assert launched[0] == ["a-1", "a-2", "a-3", "a-4", *("a-2", "a-4", "a-3")]
    assert tuning.values == {"optimizer.learning_rate": 0.1}
    full = [trial.full_score for trial in tuning.trials]
    assert full[0] is None and full[1:] == pytest.approx([1 / 1.09, 1, 1 / 1.07])

    final = tmp_path / "finals" / "a-3"
    assert written_config(final)["training.epochs"] == 30 and not (final / "report").exists()
    learned = final / "checkpoints" / "weights"
    learned.write_text("learned")
    for seed in row.seeds:
        runs.train(row, seed, tuning)
    assert (tmp_path / "runs" / "a" / "checkpoints" / "weights").read_text() == "learned"
    assert written_config(tmp_path / "runs" / "a") == written_config(final)
    # No trial had the other seed.
    assert not (tmp_path / "runs" / "a-8" / "checkpoints" / "weights").exists()

    del launched[0][:]
    runs, (row,) = begin(tmp_path, finalists=3, **models)
    runs.check(row)
    assert runs.tune(row) == tuning
    runs.train(row, 7, tuning)
    assert launched[0] == [] and list(runs.finished(row)) == [7, 8]


def test_a_finalist_that_fails_is_not_chosen(launched, tmp_path):
    """As one whose loss explodes later."""
    models = {"a": {"trials": rates(0.02, 0.03, 0.1)}}
    runs, (row,) = begin(tmp_path, **models)
    runs.tune(row)
    runs, (row,) = begin(tmp_path, finalists=2, **models)
    launched[1]["a-2"] = RunFailed("config.optimizer.learning_rate: the loss was not finite", by_user=True)
    tuning = runs.tune(row)
    assert tuning.chosen == 0 and tuning.trials[1].full_score is None
    assert tuning.trials[1].full_failure.endswith("the loss was not finite")
    shutil.rmtree(tmp_path / "finals")
    launched[1]["a-1"] = RunFailed("config.optimizer.learning_rate: nor this one's", by_user=True)
    with pytest.raises(RunFailed, match="nor this one's"):
        runs.tune(row)
    assert runs.tuning(row) is None


def test_with_one_trial_left_there_is_no_final(launched, tmp_path):
    runs, (row,) = begin(tmp_path, finalists=2, a={"trials": rates(0.02, 0.1)})
    launched[1]["a-1"] = RunFailed("config.optimizer.learning_rate: the loss was not finite", by_user=True)
    tuning = runs.tune(row)
    assert tuning.chosen == 1 and not tuning.is_final
    assert launched[0] == ["a-1", "a-2"]


def test_a_run_that_was_tuned_otherwise_is_no_longer_the_rows(launched, tmp_path):
    runs, (row,) = begin(tmp_path, a={"trials": rates(0.02, 0.1)})
    runs.train(row, 0, runs.tune(row))
    runs, (row,) = begin(tmp_path, finalists=2, a={"trials": rates(0.02, 0.1)})
    tuning = runs.tune(row)
    with pytest.raises(UserError, match=r"learning_rate: the run here has 0.02, not 0.1; .* remove .*runs/a, and"):
        runs.train(row, 0, tuning)


def test_what_is_finished_is_not_trained_again(launched, tmp_path):
    models = {"a": {"trials": rates(0.1, 0.2), "seeds": (0, 1)}}
    runs, (row,) = begin(tmp_path, **models)
    launched[1]["a-2"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        runs.tune(row)
    del launched[1]["a-2"], launched[0][:]

    for expected in (["a-2", "a", "a-1"], []):
        runs, (row,) = begin(tmp_path, **models)
        runs.check(row)
        tuning = runs.tune(row)
        for seed in row.seeds:
            runs.train(row, seed, tuning)
        assert launched[0] == expected
        del launched[0][:]
    assert written_config(tmp_path / "runs" / "a-1")["seed"] == 1


def test_without_trials_the_row_is_trained_as_it_is(launched, tmp_path):
    runs, (row,) = begin(tmp_path, a={})
    tuning = runs.tune(row)
    assert (tuning.trials, tuning.chosen, tuning.values) == ((), None, {})
    runs.train(row, 0, tuning)
    assert launched[0] == ["a"]


def test_a_run_that_was_cut_off_and_then_evaluated_is_not_finished(launched, tmp_path):
    """Its checkpoint is of a part of the training, but it has a report."""
    runs, (row,) = begin(tmp_path, a={})
    launched[1]["a"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        runs.train(row, 0, runs.tune(row))
    write_report(tmp_path / "runs" / "a")
    assert list(runs.finished(row)) == []
    shutil.rmtree(tmp_path / "runs" / "a" / "report")
    launched[1].clear()
    runs.train(row, 0, runs.tune(row))
    assert list(runs.finished(row)) == [0]


def test_trials_without_anything_to_train_are_evaluated(launched, tmp_path):
    trials = {"trial1": {"item_knn": {"shrinkage": 5.0}}}
    runs, (row,) = begin(tmp_path, a={"overrides": {"model": "item_knn"}, "trials": trials})
    tuning = runs.tune(row)
    report = json.loads((tmp_path / "trials" / "a-1" / "report_validation" / "metrics.json").read_text())
    assert tuning.trials[0].score == report["NDCG@10"]


def test_a_trial_that_fails_by_its_settings_is_not_chosen(launched, tmp_path):
    models = {"a": {"trials": rates(0.02, 0.1)}}
    runs, (row,) = begin(tmp_path, **models)
    launched[1]["a-1"] = RunFailed("config.optimizer.learning_rate: the loss was not finite", by_user=True)
    tuning = runs.tune(row)
    assert tuning.chosen == 1
    assert tuning.trials[0].score is None and tuning.trials[0].failure.endswith("the loss was not finite")
    runs, (row,) = begin(tmp_path, **models)
    assert runs.tune(row) == tuning
    assert launched[0] == ["a-1", "a-2"]


def test_where_all_trials_fail_the_row_does_and_may_be_tried_again(launched, tmp_path):
    runs, (row,) = begin(tmp_path, a={"trials": rates(0.1, 0.2)})
    launched[1].update({name: RunFailed(f"config.{name} is bad", by_user=True) for name in ("a-1", "a-2")})
    with pytest.raises(RunFailed, match="a-1 is bad"):
        runs.tune(row)
    assert runs.tuning(row) is None
    launched[1].clear()
    assert runs.tune(row).chosen == 0


@pytest.mark.parametrize(("reason", "by_user"), [("IndexError", False), ("/data/log.csv: is not there", True)])
def test_a_trial_that_does_not_fail_by_its_settings_is_tried_again(launched, tmp_path, reason, by_user):
    runs, (row,) = begin(tmp_path, a={"trials": rates(0.02, 0.1)})
    launched[1]["a-1"] = RunFailed(reason, by_user)
    with pytest.raises(RunFailed, match=reason):
        runs.tune(row)
    launched[1].clear()
    assert runs.tune(row).chosen == 0


def test_a_changed_config_of_a_run_is_an_error(launched, tmp_path):
    runs, (row,) = begin(tmp_path, a={"trials": rates(0.1)})
    runs.train(row, 0, runs.tune(row))
    for changed, key in (
        ({"trials": rates(0.3)}, "trials/a-1/config.json:optimizer.learning_rate: the run here has 0.1, not 0.3"),
        ({"trials": {}}, "runs/a/config.json:optimizer.learning_rate: the run here has 0.1, not 0.002"),
    ):
        runs, (row,) = begin(tmp_path, a=changed)
        with pytest.raises(UserError) as error:
            runs.check(row)
        assert key in str(error.value)


def test_what_never_began_may_be_corrected(launched, tmp_path):
    runs, (row,) = begin(tmp_path, a={})
    launched[1]["a"] = RunFailed("no such folder", by_user=True)
    with pytest.raises(RunFailed):
        runs.train(row, 0, runs.tune(row))
    launched[1].clear()
    runs, (row,) = begin(tmp_path, a={"overrides": {"training": {"epochs": 3}}})
    runs.check(row)
    runs.train(row, 0, runs.tune(row))
    assert written_config(tmp_path / "runs" / "a")["training.epochs"] == 3


TAKES_OVER = {"overrides": {"model": "rpg", "rpg": {"decoding": "graph"}}, "trained_as": "a"}


def test_a_row_takes_over_what_another_learned(launched, tmp_path):
    rows_open = {"overrides": {"model": "rpg", "training": {"batch_rows": 0}}}
    models = {"a": rows_open | {"trials": rates(0.1, 0.2), "seeds": (0, 1)}}
    takes_over = copy.deepcopy(TAKES_OVER)
    takes_over["overrides"]["training"] = {"batch_rows": 0}
    runs, (source, row) = begin(tmp_path, **models, b=takes_over)
    with pytest.raises(RunFailed, match="takes over the models of a, which is not trained; train that too"):
        runs.tune(row)
    tuning = runs.tune(source)
    runs.train(source, 0, tuning)
    chosen = Run.load(tmp_path / "runs" / "a")
    chosen._choose("training.batch_rows", 8)
    config_file.save(chosen.config.to_dict(), chosen.workdir)
    learned = tmp_path / "runs" / "a" / "checkpoints" / "10" / "weights"
    learned.parent.mkdir()
    learned.write_text("learned")

    assert runs.tune(row) == tuning
    runs.train(row, 0, tuning)
    assert launched[0] == ["a-1", "a-2", "a", "b"]
    assert (tmp_path / "runs" / "b" / "checkpoints" / "10" / "weights").read_text() == "learned"
    values = written_config(tmp_path / "runs" / "b")
    assert (values["rpg.decoding"], values["optimizer.learning_rate"]) == ("graph", 0.1)
    assert values["training.batch_rows"] == 8
    with pytest.raises(RunFailed, match="takes over a-1, which is not trained"):
        runs.train(row, 1, tuning)


def test_what_was_taken_over_is_taken_anew_when_the_other_row_was_trained_again(launched, tmp_path, monkeypatch):
    """With other trials, too, of which another did best."""
    for content, trials in (("first", rates(0.1, 0.2)), ("second", rates(0.3, 0.2))):
        models = {"a": {"overrides": {"model": "rpg"}, "trials": trials}, "b": TAKES_OVER}
        runs, (source, row) = begin(tmp_path, **models)
        for one in (source, row):
            runs.check(one)
        times = iter((content, f"{content}, taken over"))
        monkeypatch.setattr(runs_lib, "_now", lambda: next(times))  # noqa: B023
        runs.train(source, 0, runs.tune(source))
        (tmp_path / "runs" / "a" / "checkpoints" / "weights").write_text(content)
        assert list(runs.finished(row)) == []
        shutil.rmtree(tmp_path / "runs" / "b" / "report", ignore_errors=True)
        assert list(finished_workdirs(tmp_path)) == ["a"]
        runs.train(row, 0, runs.tune(row))
        assert (tmp_path / "runs" / "b" / "checkpoints" / "weights").read_text() == content
        assert list(runs.finished(row)) == [0] and list(finished_workdirs(tmp_path)) == ["a", "b"]
        assert (
            written_config(tmp_path / "runs" / "b")["optimizer.learning_rate"] == {"first": 0.1, "second": 0.2}[content]
        )
        shutil.rmtree(tmp_path / "runs" / "a")
        for number in (1, 2):
            shutil.rmtree(tmp_path / "trials" / f"a-{number}")


def test_a_run_of_its_own_is_not_one_that_was_taken_over(launched, tmp_path):
    runs, (_, row) = begin(tmp_path, a={"overrides": {"model": "rpg"}}, b=TAKES_OVER | {"trained_as": ""})
    runs.train(row, 0, runs.tune(row))
    runs, (source, row) = begin(tmp_path, a={"overrides": {"model": "rpg"}}, b=TAKES_OVER)
    runs.train(source, 0, runs.tune(source))
    assert list(runs.finished(row)) == []


def module(tmp_path, monkeypatch, code):
    """Where `python -m program` runs the code."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "program.py").write_text(code)
    return ["program", "--some=flag"]


def test_a_process_writes_its_log(tmp_path, monkeypatch):
    program = module(tmp_path, monkeypatch, "import sys\nprint(sys.argv[1])\nprint('[red]', file=sys.stderr)")
    for times in (1, 2):
        runs_lib.launch(program, tmp_path, "a [title]")
        assert (tmp_path / "output.log").read_text().count("--some=flag\n") == times
    assert "[red]\n" in (tmp_path / "output.log").read_text()


@pytest.mark.parametrize(
    ("code", "reason", "by_user"),
    [
        ("import sys\nprint('x')\nprint('error: file:3: is wrong; mend it', file=sys.stderr)\nsys.exit(2)",
         "file:3: is wrong; mend it", True),
        ("1 / 0", "ZeroDivisionError: division by zero", False),
        ("import os\nos.kill(os.getpid(), 9)", "was ended by SIGKILL", False),
    ],
)  # fmt: skip
def test_a_failed_process_says_why(code, reason, by_user, tmp_path, monkeypatch):
    with pytest.raises(RunFailed) as failure:
        runs_lib.launch(module(tmp_path, monkeypatch, code), tmp_path, "title")
    assert (str(failure.value), failure.value.by_user) == (reason, by_user)


def test_a_run_ends_with_the_comparison(tmp_path, monkeypatch):
    """By SIGTERM, as from a scheduler."""
    program = module(tmp_path, monkeypatch, "import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(600)")
    log, handler = tmp_path / "output.log", signal.getsignal(signal.SIGTERM)

    def terminate():
        while not (log.exists() and log.read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=terminate)
    thread.start()
    with pytest.raises(SystemExit) as end:
        runs_lib.launch(program, tmp_path, "title")
    thread.join()
    assert end.value.code == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)
    assert signal.getsignal(signal.SIGTERM) == handler
