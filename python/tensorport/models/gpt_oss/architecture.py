"""gpt-oss as the registry of models sees it."""

import os
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh
from jax.typing import DTypeLike

from tensorport.kernels.registry import ImplementationName
from tensorport.models.gpt_oss.config import Config, is_original
from tensorport.models.gpt_oss.decoder import GptOss
from tensorport.models.gpt_oss.params import check_model_params, load_model_params
from tensorport.models.gpt_oss.sharding import auto_mesh, sharding_rules
from tensorport.models.registry import Architecture, Loaded
from tensorport.progress import Progress
from tensorport.sharding import ShardingLike

__all__ = ["ARCHITECTURE"]


def _load(
    source: str | os.PathLike[str],
    fields: Mapping[str, Any],
    where: str,
    *,
    dtype: DTypeLike,
    sharding: ShardingLike | None,
    mesh: Mesh | None,
    implementation: ImplementationName,
    workers: int | None,
    progress: Progress,
) -> Loaded:
    config = Config.from_json(fields, where)
    if mesh is not None:
        mesh = auto_mesh(mesh)
        sharding = sharding_rules(mesh) if sharding is None else sharding
    params, report = load_model_params(
        source, config, dtype=dtype, sharding=sharding, mesh=mesh, workers=workers, progress=progress
    )
    return Loaded(GptOss(config, mesh, implementation), params, report)


def _check(source: str | os.PathLike[str], fields: Mapping[str, Any], where: str) -> None:
    check_model_params(source, Config.from_json(fields, where))


ARCHITECTURE = Architecture("gpt_oss", _load, _check, is_original)
