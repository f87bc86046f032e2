"""How much memory a model takes on each device of a mesh: by shapes alone, before anything is loaded."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from tensorport.models.gpt_oss.cache import Cache, LayerCache, slots_of
from tensorport.models.gpt_oss.config import Config
from tensorport.models.gpt_oss.decoder import GptOss
from tensorport.models.gpt_oss.names import parameter_shapes
from tensorport.models.gpt_oss.sharding import auto_mesh, cache_sharding, check_mesh, rows_spec, sharding_rules
from tensorport.mxfp4.types import MXFP4Array
from tensorport.reports import _Report, human_bytes
from tensorport.sharding import rule_of

__all__ = ["DeviceMemory", "memory_per_device"]


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class DeviceMemory(_Report):
    """Bytes on each device while a step runs.

    Attributes:
        parameters: weights.
        cache: keys and values.
        temporary: what the compiled step needs besides.
        peak: all of it, and what the step returns.
    """

    parameters: int
    cache: int
    temporary: int
    peak: int

    def _lines(self) -> list[tuple[str, str]]:
        return [(field.name, human_bytes(getattr(self, field.name))) for field in dataclasses.fields(self)]


def memory_per_device(
    config: Config,
    mesh: Mesh,
    *,
    batch: int = 1,
    max_length: int = 4096,
    tokens: int = 1,
    dtype: DTypeLike = jnp.bfloat16,
) -> DeviceMemory:
    """Compiles a step for a mesh, and asks the compiler what each device needs. No weights are read or made.

    >>> mesh = jax.make_mesh((8,), ("expert",))
    >>> gpt_oss.memory_per_device(gpt_oss.load_config("gpt-oss-120b"), mesh)

    Args:
        config: of the model.
        mesh: devices, which may be fewer or smaller than those to come: of a CPU, say.
        batch: rows.
        max_length: positions of each row.
        tokens: of each row in one step: 1 decodes, more is a chunk of a prompt.
        dtype: of weights that are not MXFP4, and of the cache.

    Raises:
        MappingError: a mesh that does not divide the model.
    """
    mesh = auto_mesh(mesh)
    check_mesh(config, mesh)
    choose = rule_of(sharding_rules(mesh), mesh)
    params = placed_shapes(parameter_shapes(config, dtype), choose)
    everywhere = NamedSharding(mesh, PartitionSpec())
    rows = NamedSharding(mesh, rows_spec(mesh, batch))

    def layer(slots: int) -> LayerCache:
        shape = (batch, slots, config.num_key_value_heads, config.head_dim)
        array: Any = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=cache_sharding(mesh, batch))
        return LayerCache(array, array)

    lengths: Any = jax.ShapeDtypeStruct((batch,), jnp.dtype(jnp.int32), sharding=everywhere)
    cache = Cache(
        tuple(layer(slots_of(config, kind, max_length)) for kind in config.layer_types),
        lengths,
    )
    ids = jax.ShapeDtypeStruct((batch, tokens), jnp.dtype(jnp.int32), sharding=rows)
    decoder = GptOss(config, mesh)

    def step(params: Any, cache: Cache, ids: Any, positions: Any) -> Any:
        x, cache = decoder.hidden(params, ids, cache, positions)
        return decoder.logits(params, x[:, -1]), cache

    compiled = jax.jit(step, donate_argnums=1).lower(params, cache, ids, ids).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None, "all backends of JAX tell"
    peak = (
        analysis.argument_size_in_bytes
        + analysis.temp_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
    )
    return DeviceMemory(_on_device(params), _on_device(cache), analysis.temp_size_in_bytes, peak)


def placed_shapes(shapes: Any, choose: Any, prefix: str = "") -> Any:
    """Shapes with the shardings that rules give to their dotted names."""
    if isinstance(shapes, dict):
        return {key: placed_shapes(value, choose, f"{prefix}{key}.") for key, value in shapes.items()}
    name = prefix.removesuffix(".")
    if isinstance(shapes, MXFP4Array):
        # The spec of the logical array, one axis less than that of the codes.
        return MXFP4Array(*(placed_shapes(part, choose, prefix) for part in (shapes.blocks, shapes.scales)))
    return jax.ShapeDtypeStruct(shapes.shape, shapes.dtype, sharding=choose(name, shapes))


def _on_device(tree: Any) -> int:
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
