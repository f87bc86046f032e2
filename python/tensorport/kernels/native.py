"""Kernels in Rust, which XLA calls on CPU as parts of a compiled program.

They are registered with XLA once in a process, when first asked for. That never takes JAX's CPU backend down: a kernel
that XLA refused before the backend started would. So the backend starts first, and a refusal is a reason to tell.

>>> if native.unavailable() is None:
...     y = jax.lax.platform_dependent(x, cpu=lambda x: native.call("tensorport.v1.op", result, x), default=xla)
"""

import threading
from collections.abc import Mapping, Sequence
from typing import Any, Final

import jax
import numpy as np

from tensorport import _core
from tensorport.kernels.registry import Device
from tensorport.kernels.varying import vary_alike

__all__ = ["FLOATS", "ROUNDS_TO_INT8", "as_float", "call", "refuses", "unavailable", "update"]

FLOATS: Final = ("bfloat16", "float32")
"""Dtypes of activations that native kernels take."""

ROUNDS_TO_INT8: Final = "rounds x to int8, and runs where it is named alone"
"""Why no kernel that does so is chosen automatically."""

_LOCK: Final = threading.Lock()
_NOT_TRIED: Final = "not registered yet"
_refusal: str | None = _NOT_TRIED


def unavailable() -> str | None:
    """Why native kernels cannot run in this process; None if they can, and then they are registered.

    Starts JAX's backends. Safe from several threads.
    """
    global _refusal  # noqa: PLW0603 - XLA's registry is one for the process, and so is what it said
    # Read without the lock: once None it stays so.
    if _refusal is None:
        return None
    with _LOCK:
        if _refusal is _NOT_TRIED:
            try:
                jax.devices("cpu")
            except RuntimeError as fault:
                # Not kept: backends may be cleared and started again.
                return f"JAX has no CPU backend: {fault}"
            _refusal = _register()
        return _refusal


def refuses(device: Device, x: Any, *others: Any) -> str | None:
    """What speaks against all native kernels for activations `x`; None if nothing does."""
    if device.platform != "cpu":
        return "runs on CPU alone"
    if x.dtype.name not in FLOATS:
        return f"found x in {x.dtype}, expected one of {', '.join(FLOATS)}"
    for leaf in jax.tree.leaves((x, others)):
        if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and len(leaf.devices()) > 1:
            return "arrays are spread over devices, and only within jax.shard_map does each compute its part"
    return unavailable()


def as_float(array: jax.Array) -> jax.Array:
    """In a dtype that native kernels take: as it is, or as float32."""
    return array if array.dtype.name in FLOATS else array.astype(np.float32)


def _register() -> str | None:
    for name, handler in _core.ffi_targets().items():
        try:
            jax.ffi.register_ffi_target(name, handler, platform="cpu")
        # What JAX raises for what XLA refuses: JaxRuntimeError is a RuntimeError.
        except (RuntimeError, TypeError, ValueError) as fault:
            return f"XLA refused {name}: {fault}"
    return None


def call(
    target: str,
    results: jax.ShapeDtypeStruct | Sequence[jax.ShapeDtypeStruct],
    *args: jax.Array,
    **attributes: int | float | np.generic,
) -> Any:
    """Has a native kernel compute within a program that XLA compiles for CPU.

    Arguments reach it in their own memory, without a copy, as long as they are whole arrays: arguments of the program,
    carries of loops, reshapes of those. A slice is copied by XLA first.

    Under `vmap` it is called once for each element. It has no gradient: JAX raises ValueError. In a program compiled
    for anything but CPU, XLA does not find it: :mod:`tensorport.kernels.registry` chooses by platform.

    Args:
        target: the kernel's name, such as `tensorport.v1.probe`.
        results: what it computes: one, or several.
        args: its arrays.
        attributes: NumPy scalars go as they are, an int as int32, a float as float32.

    Returns:
        An array if `results` is one, else a list or tuple of them.

    Raises:
        NotImplementedError: native kernels cannot run in this process; says why.
        TypeError, OverflowError: an attribute is no scalar, or does not fit.
        jax.errors.JaxRuntimeError: when it runs and fails; says why.
    """
    return _call(target, results, args, attributes, None)


def update(target: str, array: jax.Array, *args: jax.Array, **attributes: int | float | np.generic) -> jax.Array:
    """As :func:`call`, of a kernel whose result is its first argument with changes, in its memory.

    XLA copies the array first where something else needs it as it was.
    """
    result = jax.ShapeDtypeStruct(array.shape, array.dtype)
    out: jax.Array = _call(target, result, (array, *args), attributes, {0: 0})
    return out


def _call(
    target: str,
    results: jax.ShapeDtypeStruct | Sequence[jax.ShapeDtypeStruct],
    args: Sequence[jax.Array],
    attributes: Mapping[str, int | float | np.generic],
    aliases: dict[int, int] | None,
) -> Any:
    reason = unavailable()
    if reason is not None:
        raise NotImplementedError(f"{target}: {reason}")
    scalars = {name: _scalar(name, value) for name, value in attributes.items()}
    # JAX wants the arguments to differ alike between devices, and takes results for the same on all.
    args = vary_alike(args)
    function = jax.ffi.ffi_call(target, results, vmap_method="sequential", input_output_aliases=aliases)
    computed = function(*args, **scalars)
    return vary_alike((args, computed))[1]


def _scalar(name: str, value: Any) -> np.generic:
    if isinstance(value, np.generic):
        return value
    if isinstance(value, int):
        return np.int32(value)
    if isinstance(value, float):
        return np.float32(value)
    raise TypeError(f"attribute {name}: found {value!r}, expected a number")
