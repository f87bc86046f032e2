"""What the bodies of Pallas kernels through Triton share: tiles of arrays, and MXFP4 that becomes floats in registers.

Kernels see the checkpoint's own bytes: byte j of a row holds element 2j in its low four bits and 2j + 1 in its high
ones, and sixteen bytes share a scale. So activations come apart in even and odd elements; codes stay as they are.
"""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float, UInt8, UInt16

__all__ = [
    "BYTES_OF_BLOCK",
    "Halves",
    "Matrix",
    "Span",
    "Tiling",
    "decode",
    "load",
    "matrix_products",
    "one",
    "scale_of",
    "span",
    "split_pairs",
    "store",
    "unzip",
    "vector_products",
]

BYTES_OF_BLOCK: Final = 16
"""Bytes of codes under one scale."""


class Tiling(Protocol):
    """What of a kernel's settings its loop over a row's bytes depends on."""

    @property
    def block_k(self) -> int:
        """Bytes of a row of weights to a step."""


class Halves(NamedTuple):
    """Refs of activations whose rows came apart by :func:`split_pairs`.

    Attributes:
        even: [M, K / 2].
        odd: [M, K / 2].
    """

    even: Any
    odd: Any


class Matrix(NamedTuple):
    """Refs of an MXFP4 matrix, or of a stack of them of which a program reads one.

    Attributes:
        codes: [..., N, K / 2], uint8.
        scales: [..., N, K / 32], uint8.
        of_stack: index of the matrix; empty where there is no stack.
    """

    codes: Any
    scales: Any
    of_stack: tuple[Any, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """N, and the bytes of a row."""
        n, nbytes = self.codes.shape[-2:]
        return n, nbytes


def split_pairs(x: Float[Array, "m k"]) -> tuple[Float[Array, "m k/2"], Float[Array, "m k/2"]]:
    """The even and the odd elements of each row."""
    pairs = x.reshape(x.shape[0], -1, 2)
    return pairs[..., 0], pairs[..., 1]


def unzip(values: Float[Array, " n"]) -> tuple[Float[Array, " n/2"], Float[Array, " n/2"]]:
    """The even and the odd elements within a kernel, where nothing can be sliced."""
    pairs = values.reshape(-1, 2)
    is_odd = jnp.broadcast_to(jnp.arange(2) == 1, pairs.shape)
    return jnp.where(is_odd, 0, pairs).sum(axis=-1), jnp.where(is_odd, pairs, 0).sum(axis=-1)


def decode(codes: UInt16[Array, "*tile"]) -> Float[Array, "*tile"]:
    """The values of codes 0 .. 15, in float32.

    Exponent and mantissa of a code are those of a float16 that is 2 ** 14 too small, subnormal ones included: 1 is the
    code 0.5 there. The product is exact.
    """
    bits = ((codes & 7) << 9) | ((codes & 8) << 12)
    return jax.lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32) * 2.0**14


def scale_of(scales: UInt8[Array, "*tile"]) -> Float[Array, "*tile"]:
    """2 ** (scale - 127) in float32: byte 0 is subnormal, byte 255 NaN."""
    wide = scales.astype(jnp.uint32)
    bits = jnp.where(wide == 0, jnp.uint32(1 << 22), jnp.where(wide == 255, jnp.uint32(0x7FC0_0000), wide << 23))
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


class Span(NamedTuple):
    """Indices along an axis, as many as a power of two, of which some may lie beyond it.

    Attributes:
        indices: a slice, or an array.
        is_there: for each whether it is within the axis.
    """

    indices: Any
    is_there: Array


def span(start: Any, count: int, end: int) -> Span:
    """`count` indices from `start` on, of an axis of `end`."""
    return Span(pl.ds(start, count), start + jnp.arange(count) < end)


def one(index: Any) -> Span:
    """A single index, which is there."""
    return Span(pl.ds(index, 1), jnp.ones(1, bool))


def load(ref: Any, rows: Span, columns: Span, of_stack: tuple[Any, ...] = ()) -> Array:
    """A tile, with zeros beyond the array, which is one in a stack of them if there is one."""
    mask = rows.is_there[:, None] & columns.is_there[None]
    tile: Array = pltriton.load(ref.at[(*of_stack, *_index(rows, columns))], mask=mask, other=0)
    return tile


def store(ref: Any, rows: Span, columns: Span, tile: Array) -> None:
    """Writes a tile in the dtype of `ref`, but not beyond the array."""
    mask = rows.is_there[:, None] & columns.is_there[None]
    pltriton.store(ref.at[_index(rows, columns)], tile.astype(ref.dtype), mask=mask)


def _index(rows: Span, columns: Span) -> tuple[Any, Any]:
    """Of a tile; where rows are chosen one by one, columns must be, too, for the interpreter."""
    if isinstance(rows.indices, jax.Array):
        every = columns.indices
        return rows.indices[:, None], (every.start + jnp.arange(every.size))[None]
    return rows.indices, columns.indices


def vector_products(
    tiling: Tiling, x: Halves, x_rows: Sequence[Any], w: Matrix, rows: Span
) -> tuple[Float[Array, " n"], ...]:
    """Some rows of a matrix by each of a few rows of x, lane by lane in float32: the matrix is read once."""
    _, nbytes = w.shape
    blocks = tiling.block_k // BYTES_OF_BLOCK

    def add_tile(tile: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        columns = span(tile * tiling.block_k, tiling.block_k, nbytes)
        packed = load(w.codes, rows, columns, w.of_stack).astype(jnp.uint16)
        low, high = decode(packed & 15), decode(packed >> 4)
        factors = scale_of(load(w.scales, rows, span(tile * blocks, blocks, w.scales.shape[-1]), w.of_stack))

        def add_row(row: Any, sum_of_row: Array) -> Array:
            even, odd = (load(half, one(row), columns).astype(jnp.float32) for half in x)
            products = low * even + high * odd
            # Scaled once for a block, not for each element.
            of_blocks = products.reshape(products.shape[0], blocks, BYTES_OF_BLOCK).sum(axis=-1)
            return sum_of_row + (of_blocks * factors).sum(axis=-1)

        return tuple(add_row(row, sum_of_row) for row, sum_of_row in zip(x_rows, sums, strict=True))

    zeros = (jnp.zeros(rows.is_there.shape, jnp.float32),) * len(x_rows)
    sums: tuple[Array, ...] = jax.lax.fori_loop(0, pl.cdiv(nbytes, tiling.block_k), add_tile, zeros)
    return sums


def matrix_products(
    tiling: Tiling, parts: Sequence[Halves], x_rows: Span, w: Matrix, rows: Span, *, is_needed: Array | bool = True
) -> Float[Array, "m n"]:
    """Some rows of x by some rows of a matrix on the tensor cores; x is the sum of its parts.

    bfloat16 is multiplied as it is, other dtypes as exact float32. Nothing is read where it is not needed.
    """
    _, nbytes = w.shape
    # A weight has three bits and a power of two: exact in bfloat16, unless float16's x need another dtype.
    operand = jnp.bfloat16 if parts[0].even.dtype == jnp.bfloat16 else jnp.float32
    blocks = tiling.block_k // BYTES_OF_BLOCK

    def add_tile(tile: Array, sums: Float[Array, "m n"]) -> Float[Array, "m n"]:
        columns = span(tile * tiling.block_k, tiling.block_k, nbytes)
        packed = load(w.codes, rows, columns, w.of_stack).astype(jnp.uint16)
        scales = load(w.scales, rows, span(tile * blocks, blocks, w.scales.shape[-1]), w.of_stack)
        factors = _spread(scale_of(scales))
        for half, values in enumerate((packed & 15, packed >> 4)):
            weights = (decode(values) * factors).astype(operand)
            for part in parts:
                x_tile = load(part[half], x_rows, columns).astype(operand)
                sums += pltriton.dot(x_tile, weights.T, allow_tf32=False)
        return sums

    zeros = jnp.zeros((x_rows.is_there.size, rows.is_there.size), jnp.float32)

    def add_tiles() -> Float[Array, "m n"]:
        sums: Array = jax.lax.fori_loop(0, pl.cdiv(nbytes, tiling.block_k), add_tile, zeros)
        return sums

    # Not a loop without turns: Triton wants its bounds of one type, and a number that is computed has another.
    out: Array = add_tiles() if is_needed is True else jax.lax.cond(is_needed, add_tiles, lambda: zeros)
    return out


def _spread(scales: Float[Array, "n blocks"]) -> Float[Array, "n 16*blocks"]:
    """Each scale for each of its block's bytes."""
    rows, blocks = scales.shape
    return jnp.broadcast_to(scales[:, :, None], (rows, blocks, BYTES_OF_BLOCK)).reshape(rows, blocks * BYTES_OF_BLOCK)
