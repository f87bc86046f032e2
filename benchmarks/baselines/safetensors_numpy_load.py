"""What people write by hand: safetensors to NumPy, then jax.device_put; for load_job.py."""

from pathlib import Path

import jax
import ml_dtypes  # noqa: F401 (without it safetensors knows no bfloat16)
from safetensors.numpy import load_file


def load(source: Path, _shapes: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    arrays = {}
    for file in sorted(source.glob("*.safetensors")):
        arrays.update({name: jax.device_put(array) for name, array in load_file(file).items()})
    return arrays
