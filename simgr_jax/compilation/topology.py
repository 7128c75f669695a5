"""The devices to compile for: a TPU slice, which need not be present, or virtual CPU devices."""

from __future__ import annotations

import importlib.util
import math
import os
import re
from typing import NamedTuple

import jax

from simgr_jax.devices.chips import CHIPS, Chip
from simgr_jax.errors import UserError

# Installs the libtpu release that matches this JAX.
INSTALL = f'pip install "jax[tpu]=={jax.__version__}"'

# Without these, libtpu asks the cloud's metadata server and complains on stderr. It also admits only one process at a
# time, to protect chips, but none are used here.
_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


class Topology(NamedTuple):
    """
    Attributes:
      devices: one per chip, or the virtual CPU devices.
      chip: None for CPUs.
      shape: the slice's sides, in chips.
    """

    devices: list[jax.Device]
    chip: Chip | None
    shape: tuple[int, ...]


def open_topology(name: str) -> Topology:
    """
    Args:
      name: e.g. "v5e:16x16" or "cpu:8".

    Call this before JAX uses any device, because JAX cannot change platforms afterwards.

    Raises:
      UserError: there is no such topology, or libtpu is not installed.
    """
    # Nothing will run, and another process may be using this machine's TPUs.
    jax.config.update("jax_platforms", "cpu")
    if found := re.fullmatch(r"cpu:([1-9][0-9]*)", name):
        count = int(found[1])
        jax.config.update("jax_num_cpu_devices", count)
        return Topology(jax.devices(), None, (count,))
    generation, _, shape = name.partition(":")
    if generation not in CHIPS or shape not in CHIPS[generation].topologies:
        known = "; ".join(f"{chip.name}:{', '.join(chip.topologies)}" for chip in CHIPS.values())
        raise UserError(f"--topology={name}: is unknown; give one of {known}; or cpu:8, any number of CPU devices")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"--topology={name}: compiling for TPUs needs libtpu; {INSTALL}")
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    from jax.experimental import topologies

    sides = tuple(map(int, shape.split("x")))
    # On v4, JAX shows the two cores of a chip as one device.
    options: dict[str, object] = {"chip_config_name": "megacore"} if generation == "v4" else {}
    if math.prod(sides) == 1:
        # libtpu assumes hosts of several chips.
        options["chips_per_host_bounds"] = (1, 1, 1)
    description = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    return Topology(list(description.devices), CHIPS[generation], sides)
