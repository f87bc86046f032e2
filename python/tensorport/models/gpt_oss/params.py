"""Parameters of a gpt-oss from a checkpoint in either layout, or a converted tree of it."""

import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from tensorport.checkpoint import Checkpoint
from tensorport.errors import MappingError
from tensorport.load import check_split_params, load_split_params
from tensorport.models.gpt_oss.config import Config
from tensorport.models.gpt_oss.names import (
    ExpertLayout,
    experts_are_transposed,
    original_names,
    original_parts,
    parameter_shapes,
)
from tensorport.models.gpt_oss.sharding import check_mesh
from tensorport.progress import Progress
from tensorport.reports import LoadReport
from tensorport.sharding import ShardingLike

__all__ = ["check_model_params", "load_model_params"]


def load_model_params(
    source: str | os.PathLike[str],
    config: Config,
    *,
    dtype: DTypeLike,
    sharding: ShardingLike | None = None,
    mesh: Mesh | None = None,
    workers: int | None = None,
    progress: Progress = False,
) -> tuple[dict[str, Any], LoadReport]:
    """Nested dicts under the names of Hugging Face, whatever the layout; and what reading them took.

    Every tensor of the checkpoint is used once. Experts are MXFP4Arrays if the checkpoint has codes, and dense arrays
    if it was dequantized: [out, in] by `convert`, [in, out] by transformers.

    Raises:
        CheckpointError: the bytes of the source are wrong.
        MappingError: names, shapes, dtypes or shardings do not fit the configuration; says all that do not.
        ValueError: a dtype that is neither bfloat16 nor float32.
    """
    dtype = jnp.dtype(dtype)
    if dtype.name not in ("bfloat16", "float32"):
        # Activations of gpt-oss pass the largest float16.
        raise ValueError(f"dtype: found {dtype.name}, expected bfloat16 or float32")
    if mesh is not None:
        check_mesh(config, mesh)
    return load_split_params(
        source, **_layout(source, config, dtype, mesh), sharding=sharding, mesh=mesh, workers=workers, progress=progress
    )


def check_model_params(source: str | os.PathLike[str], config: Config) -> None:
    """Looks whether every tensor has its place, shape and kind of dtype; reads headers and no tensor data.

    Raises:
        CheckpointError: the headers of the source are wrong.
        MappingError: says all that does not fit the configuration.
    """
    check_split_params(source, **_layout(source, config, jnp.dtype(jnp.bfloat16)))


def _layout(
    source: str | os.PathLike[str], config: Config, dtype: DTypeLike, mesh: Mesh | None = None
) -> dict[str, Any]:
    """What is to be made of a checkpoint, by its layout."""
    specs = Checkpoint(source).specs
    is_original = any(name.startswith("block.") for name in specs)
    experts_are: ExpertLayout = "dense"
    if any(name.endswith(("_blocks", ".blocks")) for name in specs):
        experts_are = "mxfp4"
    elif any(
        experts_are_transposed(config, spec.shape)
        for name, spec in specs.items()
        if name.endswith("experts.gate_up_proj")
    ):
        experts_are = "transposed"
    if experts_are == "transposed" and mesh is not None and mesh.shape.get("tensor", 1) > 1:
        raise MappingError(
            f"{Path(source)}: found experts [in, out], expected [out, in] or MXFP4 to be divided over the axis tensor; "
            "the axis expert divides either"
        )
    return {
        "target": parameter_shapes(config, dtype, experts_are),
        "parts": original_parts(config) if is_original else {},
        "rename": original_names if is_original else None,
        "dtype": dtype,
    }
