"""np.memmap over a converted tree, then jax.device_put, which aliases the mapping; for load_job.py."""

import json
from pathlib import Path

import jax
import numpy as np


def load(source: Path, shapes: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    arrays = {}
    for name, tensor in json.loads((source / "manifest.json").read_text())["tensors"].items():
        (file,) = tensor["files"]
        mapped = np.load(source / file, mmap_mode="r")
        arrays[name] = jax.device_put(mapped.view(shapes[name].dtype))
    return arrays
