import io
import itertools
import re

import pytest
from rich.console import Console

from simgr_jax.comparison import table
from simgr_jax.evaluation.metrics import names as metric_names

METRICS = metric_names()


def model(values, **more):
    """values: of all metrics, in their order."""
    figures = {"family": "a kind", "model": "simgr", "overrides": {}, "trained_as": "", "seeds": [0], "trials": []}
    figures |= {"chosen": {}, "num_parameters": 3.44e6, "train_seconds": 930.0, "users_per_second": 1234.6}
    figures |= {"catalog_seconds": 0.0123, "missing_seeds": []}
    # Without history items a list is a little better.
    for protocol, gain in (("", 0.0), ("filtered/", 0.1)):
        for name, value in zip(METRICS, values, strict=True):
            metric, value = f"{protocol}{name}", value + gain
            figures |= {metric: value, f"{metric}/ci95_low": value - 0.002, f"{metric}/ci95_high": value + 0.001}
            figures[f"{metric}/seeds"] = [value]
    return figures | more


def difference(mean, p):
    interval = {"ci95_low": mean - 0.003, "ci95_high": mean + 0.003}
    return {"mean": mean, **interval, "p": p / 2, "p_holm": p}


@pytest.fixture
def figures():
    seeds = {"seeds": [0, 1]} | {f"{metric}/seeds": [0.0411, 0.0433] for metric in METRICS}
    trials = [
        {"values": {"optimizer.learning_rate": 0.1}, "failed": "the loss was not finite"},
        {"values": {"optimizer.learning_rate": 0.2}, "validation/NDCG@10": 0.05},
    ]
    tested = {"NDCG@10/difference": difference(-0.0101, 0.0004), "HR@10/difference": difference(0.02, 1.0)}
    models = {
        "simgr": model([0.01, 0.05, 0.08, 0.03, 0.0422, 8.1234, 0.59], **seeds),
        "rival": model(
            [0.01001, 0.04, 0.1, 0.02, 0.0321, 7.9, 0.6],
            **tested,
            **{"num_parameters": 0, "train_seconds": 12.0, "users_per_second": None, "catalog_seconds": None},
            **{"trials": trials, "chosen": trials[1]["values"], "overrides": {"model": "rival"}},
        ),
    }
    return {
        **{"dataset": "tiny", "split": "test", "num_users": 22363, "num_cases": 22363, "num_items": 12101},
        **{"ks": [1, 5, 10], "reference": "simgr", "trial_epochs": 4, "finalists": 1},
        **{"models": models, "base": {"training.epochs": 14}, "not_trained": ["later"]},
        "inference": {"batch_size": 256, "batches": 4, "rounds": 5, "users": 1024},
        "failed": {"broken": "config.x: is wrong; mend it"},
    }


def rows(figures, heading="# tiny: 2 models on one test split"):
    """The rows of the Markdown table below a line of text, by name, as dictionaries by header."""
    lines = table.markdown(figures).splitlines()
    below = lines[lines.index(heading) + 2 :]
    lines = list(itertools.takewhile(lambda line: line.startswith("|"), below))
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return {line[0]: dict(zip(cells[0], line, strict=True)) for line in cells[2:]}


def test_values_have_their_intervals_and_the_best_are_bold(figures):
    found = rows(figures)
    assert found["simgr"]["NDCG@10"] == "**.0422** ±.0020" and found["rival"]["NDCG@10"] == ".0321 ±.0020"
    assert found["simgr"]["entropy@10"] == "**8.123** ±.002"
    best = {metric: [name for name in ("simgr", "rival") if "**" in found[name][metric]] for metric in METRICS}
    # HR@1 is equal as far as it is shown.
    assert best == {
        "HR@1": ["simgr", "rival"],
        **{metric: ["simgr"] for metric in ("HR@5", "NDCG@5", "NDCG@10", "entropy@10")},
        **{metric: ["rival"] for metric in ("HR@10", "coverage@10")},
    }


def test_lists_without_history_items_have_a_table_of_their_own(figures):
    heading = "The same lists with history items taken out; don't compare them with the table above."
    found = rows(figures, heading)
    assert found.keys() == {"simgr", "rival"} and list(found["simgr"]) == ["model", *METRICS]
    assert found["simgr"]["NDCG@10"] == "**.1422** ±.0020" and found["rival"]["NDCG@10"] == ".1321 ±.0020"


def test_differences_and_costs(figures):
    found = rows(figures)
    assert (found["rival"]["Δ NDCG@10"], found["rival"]["p (NDCG@10)"]) == ("−.0101 ±.0030", "<.001")
    assert (found["rival"]["Δ HR@10"], found["rival"]["p (HR@10)"]) == ("+.0200 ±.0030", "1.00")
    assert {found["simgr"][key] for key in found["simgr"] if key[0] in "Δp" and key != "parameters"} == {""}
    costs = ("parameters", "training", "trials", "users/s", "catalog")
    assert [found["simgr"][key] for key in costs] == ["3.4M", "16 min", "0", "1,235", "12 ms"]
    assert [found["rival"][key] for key in costs] == ["0", "12 s", "2", "", ""]


def test_what_failed_has_a_row_and_a_reason(figures):
    found = rows(figures)["broken"]
    assert found["HR@1"] == "failed" and set(found.values()) == {"broken", "failed", ""}
    assert "- broken: config.x: is wrong; mend it\n" in table.markdown(figures)
    assert "Not trained: later." in table.markdown(figures)


def test_the_notes_say_what_the_figures_are(figures):
    text = table.markdown(figures)
    assert "22,363 users, 12,101 items" in text
    assert "all 2 tests in this table (Holm). With 9,999 permutations none can be below .0002." in text
    assert "the median of 5 rounds of 1,024 users, 256 at once" in text
    assert "simgr: the mean of 2 seeds; they range over NDCG@10 .0411 to .0433, " in text
    assert "`training.epochs=14`" in text and "Trials: `training.epochs=4`." in text
    assert "`optimizer.learning_rate=0.1`: failed; `optimizer.learning_rate=0.2`: **.0500**" in text
    assert re.search(r"\| rival \| a kind \| `model=rival` \| 2 \|", text)


def test_what_was_trained_in_full_to_choose_is_said(figures):
    figures["finalists"] = 2
    figures["models"]["rival"]["trials"][1]["validation/NDCG@10/full"] = 0.07
    text = table.markdown(figures)
    assert "The best 2 of a model's were trained in full, to choose between them." in text
    assert "`optimizer.learning_rate=0.2`: **.0500, in full .0700**" in text
    del figures["models"]["rival"]["trials"][1]["validation/NDCG@10/full"]
    figures["models"]["rival"]["trials"][1]["failed/full"] = "the loss was not finite"
    assert "`optimizer.learning_rate=0.2`: **.0500, in full failed**" in table.markdown(figures)


def test_without_the_reference_there_are_no_differences(figures):
    del figures["models"]["simgr"]
    text = table.markdown(figures)
    assert "Δ" not in text and "permutation" not in text


def test_the_terminal_shows_the_same(figures):
    output = io.StringIO()
    Console(file=output, width=200).print(table.terminal(figures))
    for text in (
        "simgr",
        "broken",
        "failed",
        ".0422",
        "±.0020",
        "−.0101",
        "<.001",
        "3.4M",
        "16 min",
        "1,235",
        "22,363 users",
    ):
        assert text in output.getvalue()


@pytest.mark.parametrize(
    ("p", "text"),
    [(0.00099, "<.001"), (0.001, ".001"), (0.0494, ".049"), (0.5, ".500"), (0.999, "1.00"), (1.0, "1.00")],
)
def test_a_p_value(figures, p, text):
    figures["models"]["rival"]["HR@10/difference"] = difference(0.02, p)
    assert rows(figures)["rival"]["p (HR@10)"] == text


def test_seeds_that_are_missing_and_users_with_several_cases_are_said(figures):
    figures["models"]["rival"]["missing_seeds"] = [1, 2]
    figures["num_users"] = 9000
    text = table.markdown(figures)
    assert "- rival: not trained yet with seed 1, seed 2.\n" in text and "simgr: not trained" not in text
    assert "22,363 cases of 9,000 users, 12,101 items" in text
