"""The computation's dtype that suits the devices."""

from __future__ import annotations

from pathlib import Path

# What Linux calls units that multiply matrices of bfloat16: on x86 AMX, on Arm the extension BF16. With AVX-512 BF16,
# which multiplies vectors, XLA's float32 is faster (results/computation_dtype.json).
_CPU_FLAGS = {"amx_bf16", "bf16"}


def choose_dtype(platform: str, cpu_info: Path = Path("/proc/cpuinfo")) -> str:
    """The dtype that is faster: "bfloat16" on accelerators and on CPUs that have units for it, otherwise "float32".

    Args:
      platform: JAX's name, like "cpu" or "tpu".
      cpu_info: lists the CPU's flags. Without this file, a CPU counts as one without such units.
    """
    if platform != "cpu":
        return "bfloat16"
    lines = cpu_info.read_text(encoding="utf-8").splitlines() if cpu_info.exists() else []
    flags = (line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features")))
    return "bfloat16" if _CPU_FLAGS & set(next(flags, ())) else "float32"
