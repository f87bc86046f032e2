"""write_slots: checked once, computed by one of several implementations."""

from jax.typing import ArrayLike
from jaxtyping import Array, Float, Integer

from tensorport.kernels import native as native_kernels
from tensorport.kernels.arguments import float_array, integer_array, same_size
from tensorport.kernels.registry import Implementation, ImplementationName, Op
from tensorport.kernels.write_slots import native, xla

__all__ = ["OP", "write_slots"]


def _arguments(array: ArrayLike, rows: ArrayLike, slots: ArrayLike) -> tuple[Array, Array, Array]:
    array, rows = float_array("array", array, 4), float_array("rows", rows, 4)
    slots = integer_array("slots", slots, 2)
    same_size("B, the rows of the batch", {"array": array.shape[0], "rows": rows.shape[0], "slots": slots.shape[0]})
    same_size("T, the number of rows", {"rows": rows.shape[1], "slots": slots.shape[1]})
    same_size("G, the number of heads", {"array": array.shape[2], "rows": rows.shape[2]})
    same_size("D, the size of a head", {"array": array.shape[3], "rows": rows.shape[3]})
    return array, rows.astype(array.dtype), slots


OP = Op(
    "write_slots",
    _arguments,
    Implementation("native", native.write_slots, native_kernels.refuses, elsewhere=xla.write_slots),
    Implementation("xla", xla.write_slots),
)


def write_slots(
    array: Float[ArrayLike, "b s g d"],
    rows: Float[ArrayLike, "b t g d"],
    slots: Integer[ArrayLike, "b t"],
    *,
    implementation: ImplementationName = "auto",
) -> Float[Array, "b s g d"]:
    """The array with rows in slots: what a cache of keys or values is after some tokens.

    Rows for slots below 0 or at S and above are left out. The other slots of a row of the batch must differ: of rows
    for the same one, any may stay.

    Args:
        array: [B, S, G, D].
        rows: [B, T, G, D]; rounded to the dtype of `array`.
        slots: [B, T].
        implementation: see :func:`tensorport.kernels.explain`.

    Returns:
        In the dtype of `array`, on its device. Under `jit` in its memory where it is donated, or used no more:
        `native` then costs what the rows do. Differentiable with respect to `array` and `rows`.

    Raises:
        NotImplementedError: the named implementation cannot run here; says why.
        TypeError, ValueError: dtypes or shapes do not fit.
    """
    inputs = _arguments(array, rows, slots)
    return OP.choose(implementation, *inputs).run(*inputs)
