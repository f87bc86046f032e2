"""write_slots in plain JAX.

On CPU, XLA converts a whole array of bfloat16 to float32 and back for it (JAX 0.10.2), whatever the operation: scatter,
dynamic_update_slice, or a select.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

__all__ = ["write_slots"]


def write_slots(
    array: Float[Array, "b s g d"], rows: Float[Array, "b t g d"], slots: Int32[Array, "b t"]
) -> Float[Array, "b s g d"]:
    """The array with the rows in their slots."""
    # Negative indices would count from the end.
    slots = jnp.where(slots < 0, array.shape[1], slots)
    row = jnp.arange(array.shape[0], dtype=jnp.int32)[:, None]
    return array.at[row, slots].set(rows, mode="drop")
