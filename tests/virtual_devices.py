"""Several devices on one machine, for processes that tests start."""

from __future__ import annotations

import os


def environment(devices: int) -> dict[str, str]:
    """This process's environment, with as many virtual CPU devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
