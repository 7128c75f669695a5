from __future__ import annotations

import importlib.util
import re
import subprocess
import sys

import pytest

from simgr_jax.compilation import step_report
from simgr_jax.compilation.cost import Cost, Traffic
from simgr_jax.compilation.step_report import GIB, Memory, Report
from simgr_jax.compilation.topology import Topology, open_topology
from simgr_jax.devices.chips import CHIPS
from simgr_jax.errors import UserError

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")

V5E = Topology([None] * 256, CHIPS["v5e"], (16, 16))
MESH = {"data": 4, "fsdp": 64, "tensor": 1}
OUT_OF_MEMORY = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
    "temporaries (32.50G) exceeds available HBM (15.75G). HLO module: jit_train_step.\n"
    "See https://openxla.org/xla/errors/error_1000 for more details."
)


def test_a_step_that_fits():
    cost = Cost(197e12, 819e9 / 2, {"all-gather": Traffic(36, 30e9), "all-reduce": Traffic(2, 20e9)}, {"kernel": 36})
    found = Report(V5E, MESH, 61.4, None, Memory(4 * GIB, 0, 5 * GIB, GIB // 2), cost, model_flops=98.5e12)
    assert found.fits
    assert found.times == (1.0, 0.5, 0.25)
    assert found.utilisation(found.times.bound) == 0.5
    text = "\n".join(step_report.lines(found))
    assert "256 devices, mesh data 4, fsdp 64, tensor 1; compiled in 61 s" in text
    assert re.search(r"arguments +4.00 GiB", text)
    assert "peak 9.50 GiB of 16 GiB HBM: fits" in text
    assert re.search(r"matrix products +197.00 TFLOP +1,000.000 ms", text)
    assert re.search(r"collectives +50.00 GB +250.000 ms", text)
    assert text.index("all-gather") < text.index("all-reduce")
    assert "not counted: kernel, 36 times" in text
    assert re.search(r"all three at once +1,000.00 ms, utilisation 50.0%", text)
    assert re.search(r"one after the other +1,750.00 ms, utilisation 28.6%", text)


def test_a_step_that_does_not_fit():
    found = Report(V5E, MESH, 61.4, round(32.5 * GIB), None, None, model_flops=98.5e12)
    assert not found.fits
    assert step_report.lines(found)[-1] == "peak 32.50 GiB of 16 GiB HBM: does not fit"


def test_a_cpu_has_no_rates():
    found = Report(Topology([None] * 8, None, (8,)), MESH, 3, None, Memory(10, 0, 2**20, 0), Cost(1e6, 1e3), 1e6)
    assert found.fits
    text = "\n".join(step_report.lines(found))
    assert "peak 1.00 MiB" in text
    assert "1.00 MFLOP" in text
    assert "utilisation" not in text


@pytest.mark.parametrize(
    ("message", "needed"),
    [(OUT_OF_MEMORY, 32.5 * GIB), ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem.", None)],
)
def test_the_needed_bytes_are_read_from_the_compilers_error(message, needed):
    assert step_report.needed_bytes(message) == needed


@pytest.mark.parametrize("name", ["v5e", "v5e:3x3", "v9:2x2", "v5p:4x4", "cpu:0", "cpu", "16x16"])
def test_unknown_topologies_are_refused_with_the_known_ones(name):
    with pytest.raises(UserError) as error:
        open_topology(name)
    message = str(error.value)
    assert message.startswith(f"--topology={name}: is unknown; give one of v4:1x1x1, ")
    assert "v5e:1x1, 2x2, 2x4, 4x4" in message
    assert message.endswith("or cpu:8, any number of CPU devices")


@needs_libtpu
def test_every_listed_topology_has_as_many_devices_as_chips():
    # In a process of its own, as it chooses the platform.
    code = """
import math
from simgr_jax.compilation.topology import open_topology
from simgr_jax.devices.chips import CHIPS
for chip in CHIPS.values():
    for name in chip.topologies:
        opened = open_topology(f"{chip.name}:{name}")
        assert len(opened.devices) == math.prod(opened.shape), (chip.name, name)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_missing_libtpu_is_reported(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'libtpu; pip install "jax\[tpu\]==[\d.]+"$'):
        open_topology("v5e:4x4")
