"""Bias figures of tiny trained runs, one of each kind, on the embedded data."""

import json
import shutil

import jax
import numpy as np
import pytest

from simgr_jax.comparison.decoding_bias import measure
from simgr_jax.comparison.runs import load_finished
from simgr_jax.data import synthetic

SHORT_IDS = (
    "--config.semantic_ids.quantizer.name=residual_kmeans",
    "--config.semantic_ids.quantizer.levels=2",
)
USERS = 50

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def workdirs(run_binary, tiny_options, trained_workdir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    runs = {"rpg": (), "lcrec": SHORT_IDS, "popularity": (), "item_knn": ()}
    for name, options in runs.items():
        arguments = (*tiny_options, *options, f"--config.model={name}", f"--workdir={folder / name}")
        assert run_binary("train", *arguments) == 0
    return {"simgr": trained_workdir} | {name: folder / name for name in runs}


@pytest.fixture(scope="module")
def figures(workdirs):
    runs = {name: load_finished(workdir, {"evaluation.batch_size": 32}) for name, workdir in workdirs.items()}
    return measure(runs, users=USERS, beam_widths=(5, 60), joint="lcrec")


def test_every_model_with_a_distribution_has_figures(figures):
    assert list(figures) == ["simgr", "rpg", "lcrec", "popularity"]


def test_models_that_score_every_item_lose_nothing(figures):
    for name in ("simgr", "rpg", "popularity"):
        assert figures[name]["exact/NDCG@10"] == pytest.approx(figures[name]["decoded/NDCG@10"], abs=1e-6)
        assert figures[name]["decoded/difference"]["mean"] == pytest.approx(0, abs=1e-6)
    assert figures["simgr"]["search"] == pytest.approx({key: 1 for key in figures["simgr"]["search"]}, abs=1e-5)


def test_a_beam_as_wide_as_the_catalog_loses_nothing_and_a_narrow_one_does(figures):
    narrow, whole = figures["lcrec"]["beam"]["5"], figures["lcrec"]["beam"]["60"]
    assert whole == pytest.approx({key: 1 for key in whole}, abs=1e-5)
    assert narrow["found@10"] <= 0.5  # Five of ten at most.
    assert 0 < narrow["found@5"] <= 1 and 0 < narrow["mass@10"] < 1
    assert "beam" not in figures["simgr"]


def test_only_models_of_codes_can_leave_the_catalog(figures):
    assert 0 < figures["rpg"]["off_catalog_mass"] < 1
    assert 0 < figures["lcrec"]["off_catalog_mass"] < 1
    assert "off_catalog_mass" not in figures["simgr"]


def test_distances_are_from_the_truth_and_from_the_joint_model(figures, workdirs):
    run = load_finished(workdirs["simgr"], {})
    cases = run.split.test
    chosen = np.unique(np.linspace(0, len(cases) - 1, USERS).round().astype(int))
    with run.mesh():
        predicted = run.ranker.ask(run.best_model(), cases, "log_probabilities")[chosen]
    np.testing.assert_allclose(jax.nn.logsumexp(predicted, axis=1), 0, atol=1e-5)
    (folder,) = (workdirs["simgr"] / "cache").glob("synthetic-*/")
    truth = synthetic.oracle(folder).next_item_probabilities([cases.histories[case] for case in chosen])
    kl = np.sum(truth * (np.log(np.maximum(truth, 1e-300)) - predicted), axis=1).mean()
    assert figures["simgr"]["truth"]["kl"] == pytest.approx(kl, rel=1e-4)
    assert "joint" not in figures["lcrec"]
    for name in ("simgr", "rpg", "popularity"):
        assert figures[name]["joint"]["kl"] > 0


def test_without_any_distribution_there_is_nothing_to_measure(workdirs, run_binary, tmp_path, capsys):
    run = shutil.copytree(workdirs["item_knn"], tmp_path / "runs" / "item_knn")
    (run / "finished.json").write_text('{"finished": "2026-01-01"}')
    assert run_binary("bias", f"--workdir={tmp_path}") == 2
    message = (
        f"error: {tmp_path / 'runs'}: no model there has a distribution over items; train one that does, like simgr\n"
    )
    assert capsys.readouterr().err == message


def test_the_binary_writes_figures_and_a_table(figures, workdirs, run_binary, tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    for name, workdir in workdirs.items():
        shutil.copytree(workdir, tmp_path / "runs" / name)
        # As simgr_jax.compare leaves it.
        (tmp_path / "runs" / name / "finished.json").write_text('{"finished": "2026-01-01"}')
    # The comparison's own, wherever it was when they were trained.
    (tmp_path / "cache").mkdir()
    options = (f"--users={USERS}", "--batch_size=32", "--beam_widths=5,60")
    assert run_binary("bias", f"--workdir={tmp_path}", *options) == 0
    assert list((tmp_path / "cache").glob("dataset-*.npz"))
    written = json.loads((tmp_path / "bias.json").read_text())
    assert written["models"].keys() == figures.keys()
    assert written["models"]["rpg"]["truth"] == pytest.approx(figures["rpg"]["truth"])
    lines = (tmp_path / "bias.md").read_text().splitlines()
    header = next(line for line in lines if "KL from truth" in line).split(" | ")
    simgr = next(line for line in lines if line.startswith("| simgr")).split(" | ")
    assert simgr[header.index("KL from truth")] == f"{figures['simgr']['truth']['kl']:.3f}"
    assert sum(line.startswith("| lcrec | ") for line in lines) == 3  # Itself, and two beams.
    for mistake, message in (
        (
            (f"--workdir={tmp_path / 'runs'}",),
            f"{tmp_path / 'runs' / 'runs'}: holds no finished run; run simgr_jax.compare",
        ),
        (("--beam_widths=5,0",), "--beam_widths: can't be 5,0; give numbers from 1"),
        (("--beam_widths=wide",), "--beam_widths: can't be wide; give numbers from 1"),
        (("--joint=item_knn",), '--joint: "item_knn" has no distribution over items; choose another'),
        (("--joint=tiger",), f'--joint: "tiger" is not in {tmp_path / "runs"}; choose from item_knn, lcrec, '),
    ):
        capsys.readouterr()
        assert run_binary("bias", f"--workdir={tmp_path}", *mistake) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {message}") and error.count("\n") == 1
