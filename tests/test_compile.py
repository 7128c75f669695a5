"""The binary, as it is called: a process of its own, since its devices are chosen before the first is used."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.usefixtures("optimized_programs")

TINY_LLM = (
    "--config=configs/llm.py",
    "--config.simgr.history=tokens",
    "--config.backbone.checkpoint=tests/huggingface/golden/qwen3",
    "--config.training.row_length=128",
    "--config.semantic_ids.quantizer.codebook_size=16",
    "--config.simgr.item_encoder=mean",
    "--num_items=1000",
)
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


@pytest.fixture
def compile_binary(root):
    def run(*arguments):
        command = [sys.executable, "-m", "simgr_jax.compile", *arguments]
        # Devices that a test runner was given are not those that are asked for.
        environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
        return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)

    return run


@pytest.mark.slow
def test_virtual_cpu_devices(compile_binary):
    result = compile_binary(
        *TINY_LLM, "--config.backbone.dtype=float32", "--config.mesh.data=2", "--topology=cpu:4", "--config.lora.rank=0"
    )
    assert result.returncode == 0, result.stderr
    assert "4 devices, mesh data 2, fsdp 2, tensor 1" in result.stdout
    assert re.search(r"matrix products +[\d.]+ [MG]FLOP\n", result.stdout)
    # Gradients are summed over the data axis.
    assert re.search(r"all-reduce +[\d.]+ [KM]B", result.stdout)


@needs_libtpu
def test_a_slice_of_tpus(compile_binary):
    result = compile_binary(*TINY_LLM, "--topology=v5e:2x2")
    assert result.returncode == 0, result.stderr
    assert "4 devices, mesh data 1, fsdp 4, tensor 1" in result.stdout
    assert re.search(r"peak [\d.]+ MiB of 16 GiB HBM: fits", result.stdout)
    assert re.search(r"all three at once +[\d.]+ ms, utilisation [\d.]+%", result.stdout)
    assert "not counted" not in result.stdout


@needs_libtpu
def test_exit_code_1_where_it_does_not_fit(compile_binary):
    # A batch of a billion tokens.
    result = compile_binary(
        *TINY_LLM, "--topology=v5e:2x2", "--config.training.row_length=16384", "--config.training.batch_rows=65536"
    )
    assert result.returncode == 1, result.stderr
    assert re.search(r"peak [\d.]+ GiB of 16 GiB HBM: does not fit\n$", result.stdout)


def test_a_mesh_that_is_not_the_devices(compile_binary):
    result = compile_binary("--config=configs/quickstart.py", "--topology=cpu:3", "--num_items=9")
    assert result.returncode == 2
    assert result.stderr.startswith("error: config.training.batch_rows: 16 can't be split over the 3 devices")
    assert (result.stderr.count("\n"), result.stdout) == (1, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--topology: is missing; give --topology=..."),
        (("--topology=v7:2x2",), "--topology=v7:2x2: is unknown; give one of "),
        (("--topology=cpu:8", "--num_items=0"), "--num_items: 0 is not positive; "),
        (("--topology=cpu:8", "--num_items=many"), "--num_items=many: "),
    ],
)
def test_mistakes(run_binary, root, capsys, arguments, message):
    assert run_binary("compile", f"--config={root}/configs/quickstart.py", *arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"error: {message}")
    assert (err.count("\n"), out) == (1, "")
