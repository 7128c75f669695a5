"""Measures a first try with an LLM, the command of docs/llm.md on the embedded shop: how long until the first loss, and
how much memory.

    python -m benchmarks.first_loss --checkpoint=DIR [--users=1500] [--until=loss] [key=value ...]

`key=value` overrides the config, like training.batch_rows=16. The run ends after its first loss or its first
validation. Writes results/first_loss.json: wall and CPU seconds at each line that the run prints, the longest silence,
and the peak of its memory until then. Needs Linux.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from benchmarks import record

ENDS = {"loss": "  loss ", "validation": " validation/"}
_TICKS = os.sysconf("SC_CLK_TCK")


def used(pid: int) -> dict[str, float]:
    """CPU seconds of a process so far, and the peak of its memory in GiB."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {
        "cpu_seconds": (int(fields[11]) + int(fields[12])) / _TICKS,
        "peak_gib": round(int(status["VmHWM"].split()[0]) / 2**20, 2),
    }


def measure(command: list[str], until: str) -> list[dict[str, float | str]]:
    """What the command has used when it prints each line, up to the first with `until`."""
    began, lines = time.monotonic(), []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=record.ROOT) as process:
        for text in process.stdout:
            lines.append({"line": text.rstrip(), "seconds": round(time.monotonic() - began, 1)} | used(process.pid))
            print(lines[-1], flush=True)
            if until in text:
                process.send_signal(signal.SIGTERM)
                break
        else:
            raise SystemExit(f'the run ended, exit code {process.wait()}, without a line with "{until}"')
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="the LLM's GGUF file or folder")
    parser.add_argument("--users", type=int, default=1500)
    parser.add_argument("--until", choices=ENDS, default="loss")
    parser.add_argument("overrides", nargs="*", help="key=value of the config")
    args = parser.parse_args()

    overrides = ["data.format=synthetic", f"data.synthetic.num_users={args.users}", *args.overrides]
    with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, "-m", "simgr_jax.train", "--config=llm", f"--workdir={workdir}"]
        command += [f"--config.backbone.checkpoint={args.checkpoint}"]
        lines = measure([*command, *(f"--config.{override}" for override in overrides)], ENDS[args.until])
    first = next(line for line in lines if ENDS["loss"] in line["line"])
    figures = {
        "first_loss": {name: first[name] for name in ("seconds", "cpu_seconds", "peak_gib")},
        "longest_silence": round(max(b["seconds"] - a["seconds"] for a, b in pairwise([{"seconds": 0.0}, *lines])), 1),
        "peak_gib": lines[-1]["peak_gib"],
        "lines": lines,
    }
    config = {"checkpoint": Path(args.checkpoint).name, "users": args.users, "overrides": args.overrides}
    record.write("first_loss", figures, config, seed=0)


if __name__ == "__main__":
    main()
