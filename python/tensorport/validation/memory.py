"""How much memory there is, to choose a dtype by."""

import os
from pathlib import Path

import jax

from tensorport.checkpoint import Checkpoint

__all__ = ["choose_dtype", "host_available_bytes"]


def choose_dtype(checkpoint: Checkpoint) -> str:
    """float32 if half of the default device's available memory has room for the model in it, else bfloat16."""
    needed = sum(
        spec.nbytes if spec.dtype.kind in "iub" else spec.nbytes * 4 // spec.dtype.itemsize
        for spec in checkpoint.specs.values()
    )
    stats = jax.local_devices()[0].memory_stats() or {}
    available = (
        stats["bytes_limit"] - stats.get("bytes_in_use", 0) if "bytes_limit" in stats else host_available_bytes()
    )
    return "float32" if needed <= available / 2 else "bfloat16"


def host_available_bytes() -> float:
    """Memory that programs can still get without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        (line,) = [line for line in lines if line.startswith("MemAvailable:")]
        return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2
