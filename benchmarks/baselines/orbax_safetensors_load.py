"""Orbax reading safetensors files (its SafetensorsLayout), for load_job.py.

Without shapes and shardings it returns NumPy arrays; with them it places each tensor while it reads others.
"""

from pathlib import Path

import jax
import orbax.checkpoint.experimental.v1 as ocp


def load(source: Path, shapes: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    with ocp.Context(checkpoint_layout=ocp.options.CheckpointLayout.SAFETENSORS):
        return ocp.load(source, abstract_state=shapes)
