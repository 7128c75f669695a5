import itertools

import numpy as np
import pytest
from matplotlib.image import imread

from simgr_jax.comparison import pictures
from simgr_jax.evaluation.metrics import names as metric_names

METRICS = metric_names()


def figures(names, speeds=True):
    """Models of two kinds, some close to each other."""
    generator, models = np.random.default_rng(0), {}
    for number, name in enumerate(names):
        values = generator.random(len(METRICS)).round(1)
        models[name] = {
            "family": f"kind {number % 2}",
            "overrides": {"model": name},
            "num_parameters": 1000 * (number + 1),
            "users_per_second": 10.0 ** (1 + number % 3) if speeds else None,
        }
        for metric, value in zip(METRICS, values, strict=True):
            models[name] |= {
                metric: value,
                f"{metric}/ci95_low": max(value - 0.1, 0),
                f"{metric}/ci95_high": value + 0.1,
            }
    return {"dataset": "tiny", "models": models}


NAMES = [f"model_{number}" for number in range(9)]


def test_pictures_are_pngs(tmp_path):
    files = pictures.write(tmp_path, figures(NAMES))
    assert [file.name for file in files] == ["accuracy.png", "diversity.png", "speed.png"]
    assert all(imread(file).std() > 0.01 for file in files)
    assert sorted(tmp_path.iterdir()) == sorted(files)


@pytest.mark.parametrize(
    ("names", "speeds", "files"),
    [("ab", False, ["accuracy.png", "diversity.png"]), ("a", True, ["accuracy.png"])],
)
def test_what_there_is_nothing_to_draw_for_is_left_out(tmp_path, names, speeds, files):
    assert [file.name for file in pictures.write(tmp_path, figures(names, speeds))] == files


def test_accuracy_has_the_best_at_the_top():
    values = figures(NAMES)
    (axes,) = pictures.draw_accuracy(values).axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert sorted(names) == NAMES
    accuracy = [values["models"][name]["NDCG@10"] for name in names]
    assert accuracy == sorted(accuracy)


@pytest.mark.parametrize("draw", [pictures.draw_diversity, pictures.draw_speed])
def test_names_hide_no_other_name(draw):
    for axes in draw(figures(NAMES)).axes:
        labels = [label for label in axes.texts if label.get_text()]
        assert sorted(label.get_text() for label in labels) == NAMES
        boxes = [label.get_window_extent() for label in labels]
        assert not any(first.overlaps(second) for first, second in itertools.combinations(boxes, 2))


def test_rows_that_differ_only_in_their_backbone_are_a_line_from_the_smallest():
    values = figures(["simgr_large", "simgr_small", "sasrec_small", "sasrec_large", "hstu"])
    for name, model in values["models"].items():
        kind, _, size = name.partition("_")
        model["overrides"] = {"model": kind} | ({"backbone.width": 64} if size == "large" else {})
        model["num_parameters"] = 500 if size == "large" else 100
    (axes,) = pictures.draw_scaling(values).axes
    lines = dict(zip(axes.get_legend_handles_labels()[1], axes.containers, strict=True))
    assert lines.keys() == {"simgr", "sasrec"}
    for kind, container in lines.items():
        sizes, accuracy = container.lines[0].get_data()
        assert list(sizes) == [100, 500]
        assert list(accuracy) == [values["models"][f"{kind}_{size}"]["NDCG@10"] for size in ("small", "large")]


def test_sizes_are_drawn_where_there_are_several(tmp_path):
    values = figures(["a_1", "a_2"])
    for model in values["models"].values():
        model["overrides"] = {}
    assert "scaling.png" in [file.name for file in pictures.write(tmp_path, values)]


def bias(**found):
    beam = {str(width): {"found@10": 1 - 1 / width, "mass@10": 1 - 0.5 / width} for width in (5, 20)}
    return {"spells": {"beam": beam} | found.pop("spells", {}), **found}


def test_bias_has_what_beams_find_and_distances_from_the_nearest(tmp_path):
    figures = bias(spells={"truth": {"kl": 2.0}}, scores={"truth": {"kl": 0.5}, "joint": {"kl": 9.0}})
    beams, distances = pictures.draw_bias(figures).axes
    assert [list(line.get_ydata()) for line in beams.lines] == [[0.8, 0.95], [0.9, 0.975]]
    assert [list(line.get_xdata()) for line in beams.lines] == [[5, 20]] * 2
    assert [label.get_text() for label in distances.get_yticklabels()] == ["spells", "scores"]
    assert [bar.get_width() for bar in distances.patches] == [2.0, 0.5]
    assert imread(pictures.write_bias(tmp_path / "bias.png", figures)).std() > 0.01


def test_without_a_known_truth_distances_are_from_the_joint_model():
    _, distances = pictures.draw_bias(bias(scores={"joint": {"kl": 9.0}})).axes
    assert "joint" in distances.get_title()


def test_where_there_is_no_bias_to_draw_there_is_no_picture(tmp_path):
    assert pictures.write_bias(tmp_path / "bias.png", {"scores": {"exact": {}}}) is None
    assert not list(tmp_path.iterdir())
