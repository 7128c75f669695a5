"""`simgr_jax.compare`, as the binary."""

import fcntl
import json
import runpy
import shutil

import numpy as np
import pytest

from simgr_jax.comparison import runs
from simgr_jax.comparison.runs import RunFailed
from simgr_jax.errors import UserError
from simgr_jax.run import Run
from tests.tiny_config import VALUES

METRICS = ("HR@1", "HR@5", "HR@10", "NDCG@5", "NDCG@10", "entropy@10", "coverage@10")
METRICS += tuple(f"filtered/{metric}" for metric in METRICS)
ROWS = ("simgr", "sasrec", "popularity")


@pytest.fixture(scope="session")
def options(root):
    """Three rows of the comparison on the embedded data. Each run takes seconds."""
    levels = "semantic_ids.quantizer.levels"  # Every row that reads it sets its own.
    tiny = [f"--config.base.{key}={value}" for key, value in VALUES.items() if key != levels]
    tiny.append(f"--config.shared.long_ids.{levels}={VALUES[levels]}")
    rows = ("--config.trial_epochs=0", f"--config.rows={ROWS}")
    return (
        *(f"--config={root}/configs/compare.py:synthetic", *tiny, *rows),
        *("--config.inference.batch_size=64", "--config.inference.batches=2", "--config.inference.rounds=2"),
    )


class Launcher:
    """Trains in this process, which imports JAX once.

    Attributes:
      launched: the names of the runs' workdirs.
      failures: what is raised instead, by that name.
    """

    def __init__(self):
        self.launched, self.failures = [], {}

    def __call__(self, arguments, workdir, title):
        self.launched.append(workdir.name)
        if workdir.name in self.failures:
            raise self.failures[workdir.name]
        assert arguments == ["simgr_jax.train", f"--workdir={workdir}"]
        run = Run.load(workdir)
        run.train()
        run.evaluate()


@pytest.fixture
def launcher(monkeypatch):
    launcher = Launcher()
    monkeypatch.setattr(runs, "launch", launcher)
    return launcher


@pytest.fixture(scope="module")
def compared(run_binary, options, make_once, tmp_path_factory):
    """The folder of a finished comparison. Copy it before changing anything in it."""

    def compare(folder):
        launcher = Launcher()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runs, "launch", launcher)
            assert run_binary("compare", *options, f"--workdir={folder}") == 0
        assert launcher.launched == list(ROWS)

    return shutil.copytree(make_once("compared", compare), tmp_path_factory.mktemp("compared") / "workdir")


@pytest.fixture
def folder(compared, tmp_path):
    return shutil.copytree(compared, tmp_path / "workdir")


def read(file):
    return json.loads(file.read_text(encoding="utf-8"))


def test_one_command_trains_evaluates_and_compares(compared):
    figures = read(compared / "comparison.json")
    assert list(figures["models"]) == list(ROWS)
    assert (figures["dataset"], figures["split"], figures["num_users"]) == ("synthetic", "test", 200)
    assert (figures["failed"], figures["not_trained"]) == ({}, [])
    for name, model in figures["models"].items():
        report = read(compared / "runs" / name / "report" / "metrics.json")
        assert {key: model[key] for key in METRICS} == {key: report[key] for key in METRICS}
        assert model["num_parameters"] == report["num_parameters"]
        assert model["users_per_second"] > 0 and len(model["users_per_second/rounds"]) == 2
        assert ("NDCG@10/difference" in model) == (name != "simgr")
    assert figures["models"]["popularity"]["NDCG@10"] == figures_of_popularity(compared)
    assert figures["inference"] == {"batch_size": 64, "batches": 2, "rounds": 2, "users": 128}
    assert figures["base"]["training.epochs"] == 1


def figures_of_popularity(folder):
    """As every report has them."""
    return read(folder / "runs" / "simgr" / "report" / "metrics.json")["popularity/NDCG@10"]


def test_its_folder_is_as_designed(compared):
    there = {path.name for path in compared.iterdir()}
    pictures = {"accuracy.png", "diversity.png", "speed.png"}
    assert there == {"runs", "cache", "comparison.json", "comparison.md", "inference.json", ".lock"} | pictures
    lines = (compared / "comparison.md").read_text(encoding="utf-8").splitlines()
    assert [line.split()[1] for line in lines[4:7]] == list(ROWS)
    (second,) = (n for n, line in enumerate(lines) if line.startswith("The same lists with history items taken out"))
    assert [line.split()[1] for line in lines[second + 2 :][:5]] == ["model", "---", *ROWS]
    # One folder for all: no run has its own.
    assert not list(compared.glob("runs/*/cache"))


def test_a_run_is_an_ordinary_workdir(run_binary, folder, tmp_path):
    workdir = folder / "runs" / "sasrec"
    assert run_binary("evaluate", f"--workdir={workdir}", "--split=validation") == 0
    assert run_binary("recommend", f"--workdir={workdir}", f"--output={tmp_path / 'top.jsonl'}") == 0
    assert read(workdir / "report_validation" / "metrics.json")["model"] == "sasrec"


def test_what_is_finished_stays_as_it_is(run_binary, options, folder, launcher, capfd):
    before = {path: path.read_bytes() for path in folder.glob("[!.]*.*") if path.suffix != ".png"}
    assert run_binary("compare", *options, f"--workdir={folder}") == 0
    assert launcher.launched == []
    assert before == {path: path.read_bytes() for path in before}
    output = capfd.readouterr().out
    assert "measuring" not in output and "popularity" in output


def test_a_comparison_can_move(run_binary, options, folder, tmp_path, launcher):
    """Its runs' configs say where the cache was; speed is measured anew where it is now."""
    for file in folder.glob("runs/*/config.json"):
        file.write_text(json.dumps(read(file) | {"cache_dir": str(tmp_path / "gone" / "cache")}))
    (folder / "inference.json").unlink()
    assert run_binary("compare", *options, f"--workdir={folder}") == 0
    assert launcher.launched == [] and (folder / "inference.json").exists()


def test_a_run_of_other_data_is_refused_before_anything_is_trained(run_binary, options, folder, launcher, capfd):
    """The log was exported anew since."""
    shutil.rmtree(folder / "runs" / "sasrec")
    file = folder / "runs" / "simgr" / "report" / "ranking.npz"
    with np.load(file) as arrays:
        changed = dict(arrays) | {"targets": np.roll(arrays["targets"], 1)}
    np.savez(file, **changed)
    assert run_binary("compare", *options, f"--workdir={folder}") == 2
    error = capfd.readouterr().err
    assert error.startswith(
        f"error: {folder}/runs/simgr: was judged on other data than config.base.data; give the old "
    )
    assert error.count("\n") == 1 and launcher.launched == []


def test_only_what_is_asked_for_is_trained(run_binary, options, folder, launcher):
    for name in ("sasrec", "simgr"):
        shutil.rmtree(folder / "runs" / name)
    assert run_binary("compare", *options, "--only=sasrec", f"--workdir={folder}") == 0
    assert launcher.launched == ["sasrec"]
    figures = read(folder / "comparison.json")
    assert list(figures["models"]) == ["sasrec", "popularity"] and figures["not_trained"] == ["simgr"]
    # With other models, speed is measured anew.
    assert all(model["users_per_second"] > 0 for model in figures["models"].values())
    assert read(folder / "inference.json")["speeds"].keys() == {"sasrec", "popularity"}


def test_a_changed_config_of_a_finished_run_is_refused(run_binary, options, folder, launcher, capfd):
    changed = "--config.base.optimizer.weight_decay=0.5"
    assert run_binary("compare", *options, changed, f"--workdir={folder}") == 2
    message = f"{folder}/runs/simgr/config.json:optimizer.weight_decay: the run here has 0.01, not 0.5; continue with"
    assert message in capfd.readouterr().err
    assert launcher.launched == []


@pytest.mark.parametrize(("by_user", "code"), [(True, 2), (False, 1)])
def test_a_failure_leaves_the_others_alone(run_binary, options, folder, launcher, capfd, by_user, code):
    shutil.rmtree(folder / "runs" / "sasrec")
    launcher.failures["sasrec"] = RunFailed("[the] reason", by_user)
    assert run_binary("compare", *options, f"--workdir={folder}") == code
    figures = read(folder / "comparison.json")
    assert list(figures["models"]) == ["simgr", "popularity"] and figures["failed"] == {"sasrec": "[the] reason"}
    assert "- sasrec: [the] reason\n" in (folder / "comparison.md").read_text()
    error = capfd.readouterr().err
    assert error.startswith("error: sasrec: failed") and error.count("\n") == 1


def test_a_row_that_is_refused_leaves_the_others_alone(run_binary, options, folder, launcher, capfd):
    shutil.rmtree(folder / "runs" / "sasrec")
    launcher.failures["sasrec"] = UserError("a file: is not there; give it")
    assert run_binary("compare", *options, f"--workdir={folder}") == 2
    assert read(folder / "comparison.json")["failed"] == {"sasrec": "a file: is not there; give it"}
    assert capfd.readouterr().err == "error: sasrec: failed: a file: is not there; give it\n"


def test_a_table_without_speeds_is_better_than_none(run_binary, options, folder, launcher, capfd):
    """Somebody removed a finished run's checkpoints, and asks for another measurement."""
    shutil.rmtree(folder / "runs" / "sasrec" / "checkpoints")
    assert run_binary("compare", *options, "--config.inference.rounds=1", f"--workdir={folder}") == 2
    figures = read(folder / "comparison.json")
    assert list(figures["models"]) == list(ROWS)
    assert {model["users_per_second"] for model in figures["models"].values()} == {None}
    error = capfd.readouterr().err
    assert error.startswith("error: users/s: not measured: ") and error.count("\n") == 1


def test_two_comparisons_do_not_share_a_folder(run_binary, options, folder, launcher, capfd):
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run_binary("compare", *options, f"--workdir={folder}") == 2
    assert f"error: {folder}: a comparison is at work in it already" in capfd.readouterr().err
    assert run_binary("compare", *options, f"--workdir={folder}") == 0


@pytest.mark.slow
def test_a_failure_in_a_process_of_its_own(run_binary, options, tmp_path, capfd, root, monkeypatch):
    """What only the model's creation finds wrong; popularity has no heads."""
    monkeypatch.chdir(root)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    options = [option for option in options if not option.startswith("--config.rows")]
    broken = ("--config.rows=('simgr', 'popularity')", "--config.base.backbone.kv_heads=3")
    assert run_binary("compare", *options, *broken, f"--workdir={tmp_path}") == 2
    error = capfd.readouterr().err
    assert error.startswith("error: simgr: failed: config.backbone.kv_heads: ") and error.count("\n") == 1
    assert "config.backbone.kv_heads" in (tmp_path / "runs" / "simgr" / "output.log").read_text()
    figures = read(tmp_path / "comparison.json")
    assert list(figures["models"]) == ["popularity"]
    assert figures["failed"]["simgr"].startswith("config.backbone.kv_heads: ")


@pytest.mark.parametrize("dataset", ["beauty", "instruments"])
def test_an_override_is_one_rows(root, dataset):
    config = runpy.run_path(str(root / "configs" / "compare.py"))["get_config"](dataset)
    config.models.tiger.overrides.training.row_length = 7
    config.models.sasrec.trials.trial1.optimizer.learning_rate = 9.0
    config.shared.short_ids.semantic_ids.collisions = "keep"
    assert config.models.lcrec.overrides.training.row_length == 128
    assert config.models.bert4rec.trials.trial1.optimizer.learning_rate == 5e-4
    assert config.models.sasrec.trials.trial2.optimizer.learning_rate == 1e-3
    assert config.shared.long_ids.semantic_ids.collisions == "level"


def test_a_group_of_keys_without_any(run_binary, root, tmp_path, capfd):
    text = (root / "configs" / "compare.py").read_text().replace("__file__", repr(str(root / "configs" / "compare.py")))
    file = tmp_path / "compare.py"
    file.write_text(
        text.replace(
            '"models": models,', '"models": models | {"x": models["popularity"] | {"overrides": {}, "trials": None}},'
        )
    )
    assert run_binary("compare", f"--config={file}:synthetic", f"--workdir={tmp_path}") == 2
    assert f"error: {file}:synthetic: config.models.x.trials: is None; it is a group" in capfd.readouterr().err


def option(argument, message):
    """A case whose comparison is right otherwise."""
    return pytest.param(("OPTIONS", argument, "--workdir=TMP"), message, id=argument)


def config_file(name, message):
    return pytest.param((f"--config=ROOT/configs/{name}", "--workdir=TMP"), message, id=name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(("--workdir=TMP",), "--config: is missing", id="no config"),
        pytest.param(("OPTIONS",), "--workdir: is missing", id="no workdir"),
        config_file("compare.py:books", "compare.py:books: no such dataset; choose one of beauty, "),
        config_file("scaling.py:books", "scaling.py:books: no such dataset; choose one of beauty, "),
        config_file("quickstart.py", "the config has no such key; did you mean config.base."),
        option("--only=simgr,sasrex", '--only: "sasrex" is not in config.rows; choose from simgr, sasrec'),
        option("--config.base.modle=simgr", "config.base.modle: the config has no such key; did you mean "),
        option("--config.models.simgr.overrides.modle=simgr", "did you mean config.models.simgr.overrides.model?"),
        # A key that the row leaves to the base.
        option(
            "--config.models.simgr.overrides.backbone.width=8",
            "config.models.simgr.overrides.backbone.width: is not set in ROOT/configs/compare.py:synthetic, so",
        ),
        option(
            "--config.models.sasrec.trials.trial1.optimizer.learning_rate=fast", "'fast' is not of type float; give a"
        ),
        option("--config.base.training=1", "config.base.training: is a group of keys; set them one by one, like"),
        option(
            "--config.models.sasrec.shares=long_ids",
            'config.shared.long_ids.semantic_ids.collisions: is not read by model "sasrec"; leave it out: the model',
        ),
        option("--config.base.rpg.temperature=0.1", "config.base.rpg.temperature: has no effect, as every"),
        pytest.param(
            ("--config=ROOT/configs/compare.py:synthetic", "--config.base.data.format=p5", "--workdir=TMP"),
            "config.base.data.path: not set; set it to the folder",
            id="no data",
        ),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_trained(
    arguments, message, run_binary, options, launcher, root, tmp_path, capfd
):
    fill_in = lambda text: text.replace("ROOT", str(root)).replace("TMP", str(tmp_path))  # noqa: E731
    arguments = [one for text in arguments for one in (options if text == "OPTIONS" else [fill_in(text)])]
    assert run_binary("compare", *arguments) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert fill_in(message) in error
    assert launcher.launched == []


@pytest.mark.parametrize("dataset", ["beauty", "toys", "instruments", "synthetic"])
@pytest.mark.parametrize("file", ["compare.py", "scaling.py"])
def test_every_datasets_config_is_a_comparison(run_binary, root, tmp_path, launcher, file, dataset, capfd):
    """Whatever it says is right, up to the data, which are not here."""
    config = f"--config={root}/configs/{file}:{dataset}"
    missing = ("--config.base.data.format=p5", f"--config.base.data.path={tmp_path / 'none'}")
    assert run_binary("compare", config, *missing, f"--workdir={tmp_path / 'w'}") == 2
    assert f"{tmp_path / 'none'}: no such folder" in capfd.readouterr().err


def test_a_model_of_the_comparison_is_a_config_of_its_own(run_binary, root, tmp_path, capfd):
    get_config = runpy.run_path(f"{root}/configs/rivals.py")["get_config"]
    config = get_config("beauty-lcrec")
    assert (config.data.name, config.model, config.training.row_length) == ("beauty", "lcrec", 128)
    for wrong, known in (("beauty", "simgr, simgr_short_ids, "), ("books-simgr", "beauty, toys, ")):
        assert run_binary("train", f"--config={root}/configs/rivals.py:{wrong}", f"--workdir={tmp_path}") == 2
        error = capfd.readouterr().err
        assert f"rivals.py:{wrong}: is not DATASET-ROW" in error and known in error and error.count("\n") == 1
