"""write_slots in Rust, on CPU: in the array's memory, where nothing else needs what was there."""

import jax
from jaxtyping import Array, Float, Int32

from tensorport.kernels import native
from tensorport.kernels.write_slots import xla

__all__ = ["write_slots"]


@jax.custom_jvp
def write_slots(
    array: Float[Array, "b s g d"], rows: Float[Array, "b t g d"], slots: Int32[Array, "b t"]
) -> Float[Array, "b s g d"]:
    """The array with the rows in their slots; derivatives by the implementation `xla`."""
    return native.update("tensorport.v1.write_slots", array, rows, slots)


@write_slots.defjvp
def _write_slots_jvp(primals: tuple[Array, Array, Array], tangents: tuple[Array, Array, Array]) -> tuple[Array, Array]:
    array, rows, slots = primals
    _, tangent = jax.jvp(lambda array, rows: xla.write_slots(array, rows, slots), (array, rows), tangents[:2])
    return write_slots(array, rows, slots), tangent
