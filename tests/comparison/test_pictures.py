import itertools

import numpy as np
import pytest
from matplotlib.image import imread

from simgr_jax.comparison import pictures
from simgr_jax.evaluation.metrics import METRICS


def figures(names, speeds=True):
    """Models of two kinds, some close to each other."""
    generator, models = np.random.default_rng(0), {}
    for number, name in enumerate(names):
        values = generator.random(len(METRICS)).round(1)
        models[name] = {
            "family": f"kind {number % 2}",
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
