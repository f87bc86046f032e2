"""Keys and values of the tokens so far: all of them in full layers, the last ones in sliding layers."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from tensorport.kernels.registry import ImplementationName
from tensorport.kernels.write_slots.api import write_slots
from tensorport.models.gpt_oss.config import Config, LayerType

__all__ = ["Cache", "LayerCache", "empty_cache", "slots_of"]


class LayerCache(NamedTuple):
    """One layer's keys and values in slots: the token at position p is in slot p modulo the number of slots.

    A full layer has a slot for every position, a sliding one a ring of `sliding_window` slots, or of all positions if
    these are fewer.

    Attributes:
        keys: [B, slots, G, D], rotated.
        values: [B, slots, G, D].
    """

    keys: Float[Array, "b slots g d"]
    values: Float[Array, "b slots g d"]

    @classmethod
    def empty(
        cls,
        batch: int,
        slots: int,
        key_heads: int,
        head_dim: int,
        *,
        dtype: DTypeLike,
        sharding: jax.sharding.NamedSharding | None = None,
    ) -> "LayerCache":
        """Slots that hold nothing: [batch, slots, key_heads, head_dim] twice."""
        shape = (batch, slots, key_heads, head_dim)
        return cls(jnp.zeros(shape, dtype, device=sharding), jnp.zeros(shape, dtype, device=sharding))

    def positions(self, lengths: Int32[Array, " b"]) -> Int32[Array, "b slots"]:
        """The position in each slot when a row has so many tokens; -1 where there is none yet."""
        slots = self.keys.shape[1]
        last = lengths[:, None] - 1
        position = last - (last - jnp.arange(slots, dtype=jnp.int32)[None]) % slots
        # Beyond the buffer of a full layer nothing is right any more; the model says so.
        return jnp.where(position >= 0, position, -1)

    def write(
        self,
        keys: Float[Array, "b t g d"],
        values: Float[Array, "b t g d"],
        positions: Int32[Array, "b t"],
        lengths: Int32[Array, " b"],
        *,
        implementation: ImplementationName = "auto",
    ) -> "LayerCache":
        """With the tokens at `positions`; of those that meet in one slot the last, of those at -1 none.

        Args:
            keys: of the tokens.
            values: of the tokens.
            positions: of the tokens.
            lengths: of the rows, these tokens included.
            implementation: of :func:`tensorport.kernels.write_slots`. On a mesh it must be `xla`.
        """
        slots = self.keys.shape[1]
        stays = (positions >= 0) & (positions >= lengths[:, None] - slots)
        slot = jnp.where(stays, positions % slots, slots)
        return LayerCache(
            write_slots(self.keys, keys, slot, implementation=implementation),
            write_slots(self.values, values, slot, implementation=implementation),
        )


class Cache(NamedTuple):
    """The cache of all layers.

    Attributes:
        layers: one for each layer.
        lengths: [B] tokens in each row. A smaller number forgets the last ones, but for what a ring has overwritten.
    """

    layers: tuple[LayerCache, ...]
    lengths: Int32[Array, " b"]

    def max_length(self, config: Config) -> int | None:
        """Positions that there are slots for; None if all layers are rings of a whole window, which never end."""
        slots = [layer.keys.shape[1] for layer in self.layers]
        bounded = [
            count
            for count, kind in zip(slots, config.layer_types, strict=True)
            if kind == "full_attention" or count < config.sliding_window
        ]
        return min(bounded, default=None)


def slots_of(config: Config, kind: LayerType, max_length: int) -> int:
    """Slots of a layer in a cache for so many positions."""
    return min(config.sliding_window, max_length) if kind == "sliding_attention" else max_length


def empty_cache(
    config: Config,
    batch: int,
    max_length: int,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    sharding: jax.sharding.NamedSharding | None = None,
) -> Cache:
    """A cache without tokens; 2 B G D slots elements for each layer.

    Args:
        config: of the model.
        batch: rows, B.
        max_length: positions that a row may have.
        dtype: of keys and values; the model's.
        sharding: of [B, slots, G, D].
    """
    if batch < 1 or max_length < 1:
        raise ValueError(f"empty_cache: found batch {batch} and max_length {max_length}, expected at least 1 of each")

    def layer(kind: LayerType) -> LayerCache:
        slots = slots_of(config, kind, max_length)
        sizes = batch, slots, config.num_key_value_heads, config.head_dim
        return LayerCache.empty(*sizes, dtype=dtype, sharding=sharding)

    return Cache(tuple(layer(kind) for kind in config.layer_types), jnp.zeros(batch, jnp.int32))
