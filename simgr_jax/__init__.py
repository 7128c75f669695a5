"""Trains an LLM to recommend by scoring every item at once (SimGR, arXiv 2602.07847)."""

import os

# Of transformers only tokenizers and config files are used; without PyTorch, which nothing here needs, it would begin
# every run with a warning.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
