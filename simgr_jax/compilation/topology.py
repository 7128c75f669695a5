"""The devices to compile for: a slice of TPUs that needn't be here, or some of this machine's CPU."""

from __future__ import annotations

import importlib.util
import os
import re
from typing import NamedTuple

import jax

from simgr_jax.compilation.chips import CHIPS, Chip
from simgr_jax.errors import UserError

# Of all releases of libtpu, the one that this JAX can read.
INSTALL = f'pip install "jax[tpu]=={jax.__version__}"'

# libtpu asks the cloud's metadata server, and complains on stderr, where these don't tell it what it wants to know. It
# lets in one process at a time for the sake of chips that are not used here.
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
      devices: one for each chip, or for each virtual CPU device.
      chip: None for CPUs.
      shape: of the slice.
    """

    devices: list[jax.Device]
    chip: Chip | None
    shape: tuple[int, ...]


def open_topology(name: str) -> Topology:
    """
    Args:
      name: "v5e:16x16" and the like, or "cpu:8". No device may have been used before: JAX keeps to the platforms that
        it has begun with.

    Raises:
      UserError: there is no such topology, or libtpu is not installed.
    """
    # Nothing runs, and a machine that has TPUs may be using them.
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
        raise UserError(f"--topology={name}: compiling for TPUs takes their compiler, libtpu; {INSTALL}")
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    from jax.experimental import topologies

    # One device for the two cores of a chip, as JAX has them on v4 itself.
    cores = {"chip_config_name": "megacore"} if generation == "v4" else {}
    description = topologies.get_topology_desc(platform="tpu", topology_name=name, **cores)
    return Topology(list(description.devices), CHIPS[generation], tuple(map(int, shape.split("x"))))
