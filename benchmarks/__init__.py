"""Benchmarks of speed, memory and accuracy: `python -m benchmarks.NAME` writes `results/NAME.json`."""
