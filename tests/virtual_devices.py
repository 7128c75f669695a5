"""Several devices or processes on one machine, for what tests start."""

from __future__ import annotations

import os

# Two processes that compute together hung on the CPU where they found their programs in the compile cache.
UNCACHED = {"JAX_ENABLE_COMPILATION_CACHE": "false"}


def environment(devices: int) -> dict[str, str]:
    """This process's environment, with as many virtual CPU devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
