"""Orbax restoring its own checkpoint, for load_job.py."""

from pathlib import Path

import jax
import orbax.checkpoint as ocp


def load(source: Path, shapes: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(source / "params", shapes)
