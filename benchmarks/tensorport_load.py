"""tensorport.load_params, for load_job.py; both tensors of an MXFP4 pair as they are stored, like all other jobs."""

from pathlib import Path
from typing import Any

import jax
from tensorport import load_params


def load(source: Path, _shapes: dict[str, jax.ShapeDtypeStruct], **options: Any) -> dict[str, jax.Array]:
    return load_params(source, mxfp4="raw", nested=False, **options)
