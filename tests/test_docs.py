"""What README.md, CONTRIBUTING.md, CHANGELOG.md and docs/ name exists, and the site can be built from them."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import ml_collections
import pytest

from simgr_jax import config_keys, default_config
from simgr_jax.models import registry

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
FOLDERS = ("simgr_jax", "configs", "docs", "results", "benchmarks", "launch", "tests", "examples")
# The changelog also names what is gone.
CURRENT_PAGES = [page for page in PAGES if page.name != "CHANGELOG.md"]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ +(.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: no such file"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"


@pytest.mark.parametrize("page", CURRENT_PAGES, ids=name)
def test_paths_of_the_repository_exist(page):
    paths = re.findall(rf"(?<![\w/.-])(?:{'|'.join(FOLDERS)})/[\w./-]*", page.read_text(encoding="utf-8"))
    for path in paths:
        path = path.rstrip(".")
        if not re.search(r"[A-Z]{3}", path):  # NAME.py stands for any.
            assert (ROOT / path).exists(), f"{path}: no such file"


@pytest.mark.parametrize("page", CURRENT_PAGES, ids=name)
def test_named_tests_exist(page):
    for file, test in re.findall(r"(tests/[\w/]+\.py)::(\w+)", page.read_text(encoding="utf-8")):
        assert (ROOT / file).is_file(), f"{file}: no such file"
        defined = re.search(rf"^def {test}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
        assert defined, f"{file}::{test}: no such test"


def test_every_fault_has_a_test():
    rows = re.findall(r"^\| .*", (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8"), re.MULTILINE)
    faults = [row for row in rows if row != "| fault | what happens now | test |"]
    assert len(faults) > 50
    for row in faults:
        assert re.fullmatch(r"\|[^|]+\|[^|]+\|( `tests/[\w/]+\.py::test_\w+`,?)+ \|", row), row


@pytest.mark.parametrize("page", CURRENT_PAGES, ids=name)
def test_commands_are_modules(page):
    for module in re.findall(r"python -m ([\w.]+)", page.read_text(encoding="utf-8")):
        if module.partition(".")[0] in ("simgr_jax", "benchmarks"):
            assert importlib.util.find_spec(module), f"python -m {module}: no such module"


@pytest.mark.parametrize("page", CURRENT_PAGES, ids=name)
def test_named_configs_exist(page):
    for config in re.findall(r"--config=(\w+)(?![\w./])", page.read_text(encoding="utf-8")):
        assert (ROOT / "configs" / f"{config}.py").is_file(), f"--config={config}: no such config"


def keys(config: ml_collections.ConfigDict) -> set[str]:
    """All keys, and all groups of keys."""
    leaves = config_keys.flat(config)
    return {".".join(leaf.split(".")[:depth]) for leaf in leaves for depth in range(1, leaf.count(".") + 2)}


@pytest.mark.parametrize("page", CURRENT_PAGES, ids=name)
def test_config_keys_exist(page):
    known = keys(default_config.get_config())
    comparison = runpy.run_path(str(ROOT / "configs" / "compare.py"))["get_config"]("synthetic")
    rows = keys(comparison) | {f"base.{key}" for key in known}
    for key in re.findall(r"\bconfig\.([a-z][\w.]*[\w])", page.read_text(encoding="utf-8")):
        if key in ("json", "md", "py") or key in known or key in rows:
            continue
        override = re.fullmatch(r"models\.(\w+)\.overrides\.(.*)", key)
        assert override and override[1] in comparison.models and override[2] in known, f"config.{key}: no such key"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_pages_are_short(page):
    assert len(page.read_text(encoding="utf-8").splitlines()) <= (130 if page.name == "README.md" else 120)


def test_every_model_is_in_the_tables():
    for page in ("README.md", "docs/models.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        for model in registry.MODELS:
            assert f"`{model}`" in text, f"{page}: lacks {model}"


# Rows of the README's table, by the names in the result.
RESULTS = {
    "SimGR, long IDs": "simgr",
    "SimGR, short IDs": "simgr_short_ids",
    "TIGER": "encoder_decoder",
    "RPG": "parallel",
    "LC-Rec": "autoregressive",
    "SASRec, full cross-entropy": "sasrec",
    "popularity": "popularity",
}
COLUMNS = {"HR@10": 4, "NDCG@10": 4, "entropy@10": 3, "coverage@10": 4, "users_per_second": 0}


def figures(result: str) -> dict:
    return json.loads((ROOT / "results" / f"{result}.json").read_text(encoding="utf-8"))["figures"]


def test_the_readme_has_the_figures_of_the_quickstart():
    found, readme = figures("quickstart"), (ROOT / "README.md").read_text(encoding="utf-8")
    rows = [line.split() for line in readme.splitlines()]
    for metric in ("HR@10", "NDCG@10", "coverage@10"):
        row = [metric]
        for key in (metric, f"popularity/{metric}", f"oracle/{metric}"):
            half = (found[f"{key}/ci95_high"] - found[f"{key}/ci95_low"]) / 2
            row += [f"{found[key]:.4f}", "±", f"{half:.4f}"]
        assert row in rows


def test_the_readme_has_the_figures_of_the_comparison():
    models = figures("compare_beauty")["models"]
    best = {column: max(models[row][column] for row in RESULTS.values()) for column in COLUMNS}
    expected = []
    for label, row in RESULTS.items():
        cells = []
        for column, digits in COLUMNS.items():
            cell = f"{models[row][column]:,.{digits}f}".removeprefix("0")
            cells.append(f"**{cell}**" if models[row][column] == best[column] else cell)
        expected.append(f"| {label} | {' | '.join(cells)} |")
    assert "\n".join(expected) in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_site_is_built_without_a_warning(tmp_path):
    """Which mkdocs gives for a broken link, a page that the menu lacks, or an unknown name of the API reference."""
    pytest.importorskip("mkdocs", reason="make docs installs it")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "Recommendations" in (tmp_path / "site" / "api.html").read_text(encoding="utf-8")
