"""What measures speed and memory: `python -m benchmarks.NAME` writes `results/NAME.json`."""
