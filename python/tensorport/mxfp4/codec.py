"""quantize() and dequantize(): MXFP4 in plain JAX, exact to the last bit on every backend.

XLA flushes subnormals on CPU, and MXFP4 under the smallest scales is subnormal. So values are taken apart and put
together as integers; floats are compared and multiplied only where nothing can be flushed that would not round to zero.
"""

from typing import Any, Final, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32, Integer, UInt8

from tensorport.convert import _choice
from tensorport.mxfp4 import _host
from tensorport.mxfp4.types import MX_BLOCK_BYTES, MX_BLOCK_SIZE, MXFP4Array

__all__ = ["Rounding", "ScaleRule", "decode", "dequantize", "fake_quantize", "quantize"]

ScaleRule: TypeAlias = Literal["floor", "ceil", "nearest"]
Rounding: TypeAlias = Literal["nearest", "stochastic"]

FLOATS: Final = ("bfloat16", "float16", "float32", "float64")
"""Dtypes that are quantized and decoded to."""

_MAX_FINITE_SCALE: Final = 252  # under it the largest code, 6 * 2 ** 125, is finite in bfloat16 and float32
_INFINITE_SCALE: Final = 254  # under it the largest codes are infinite in bfloat16 and float32
_NAN_SCALE: Final = 255  # OCP MX v1.0, 5.4.1

# Halfway between neighbouring magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6; at a tie the upper one is taken where its code is
# even.
_UP_ABOVE: Final = (0.25, 1.25, 2.5, 5.0)
_UP_FROM: Final = (0.75, 1.75, 3.5)

_RANDOM_BITS: Final = 24  # as many as the significand of float32 has


def quantize(
    x: Any,
    *,
    scale_rule: ScaleRule = "floor",
    rounding: Rounding = "nearest",
    key: Array | None = None,
) -> MXFP4Array:
    """Quantizes an array to MXFP4: blocks of 32 values along the last axis share a power of two.

    NumPy arrays are quantized by the Rust core on all cores, and the result has NumPy leaves; `jax.Array`s (and
    tracers) by XLA where they are. Both give the same bits.

    Special values. Zeros keep their sign; a block of zeros has scale byte 0. Subnormals are values like any other, in
    every dtype. A NaN makes its block NaN (scale byte 255, codes 0), for E2M1 has none. In a block with an infinity the
    infinities stay: scale byte 254, under which codes of 6 decode to infinities in bfloat16 and float32, and finite
    values below 2 ** 125 to zero. Otherwise scale bytes are at most 252, so that all codes decode to finite values in
    bfloat16 and float32; what lies beyond 6 * 2 ** 125 saturates.

    Args:
        x: bfloat16, float16, float32 or float64 [..., K], K a multiple of 32.
        scale_rule: the exponent of a block's scale is floor(log2(amax)) - 2, where amax is its largest magnitude, and
            one more under some rules. `floor` (OCP MX v1.0): never; magnitudes above 6 times the scale saturate.
            `ceil`: where amax is above 6 times the scale, so that nothing saturates. `nearest`: where amax is at least
            7 times the scale: the finest scale under which amax comes out with the least error.
        rounding: of elements to the magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6 times the scale: `nearest`, ties to the even
            code, or `stochastic`, up with a probability of 24 bits that is the distance to the neighbour below, so that
            the expectation is the value itself where nothing saturates (use `ceil`).
        key: a key of `jax.random`, for `stochastic` alone.

    Returns:
        Codes and scales: logical shape [..., K], 17 bytes for 32 values.

    Raises:
        TypeError: `x` is not an array of one of those dtypes.
        ValueError: K is not a multiple of 32, or an option is none of those above.

    Source: OCP Microscaling Formats (MX) v1.0, 6.3; `ceil` is the ROUND_UP of OpenAI's triton_kernels, `nearest` the
        EVEN of torchao.
    """
    _choice("scale_rule", scale_rule, get_args(ScaleRule))
    _choice("rounding", rounding, get_args(Rounding))
    if (key is not None) != (rounding == "stochastic"):
        found = "no key" if key is None else "a key"
        raise ValueError(f"key: found {found} with rounding={rounding!r}, expected one for 'stochastic' alone")
    if not (hasattr(x, "shape") and hasattr(x, "dtype")):
        raise TypeError(f"x: found {type(x).__name__}, expected an array")
    if jnp.dtype(x.dtype).name not in FLOATS:
        raise TypeError(f"x: found an array of {x.dtype}, expected one of {', '.join(FLOATS)}")
    if not x.shape or x.shape[-1] % MX_BLOCK_SIZE:
        raise ValueError(f"x: found shape {tuple(x.shape)}, expected (..., K) with K a multiple of {MX_BLOCK_SIZE}")
    if isinstance(x, np.ndarray):
        if key is None:
            return MXFP4Array(*_host.encode(x, scale_rule))
        if x.dtype == np.float64 and not _has_float64():
            raise TypeError("x: found float64, which JAX narrows, expected float32 for stochastic rounding")
        blocks, scales = _encode(jnp.asarray(x), key, scale_rule=scale_rule)
        return MXFP4Array(np.asarray(blocks), np.asarray(scales))
    return MXFP4Array(*_encode(x, key, scale_rule=scale_rule))


def dequantize(w: MXFP4Array, dtype: DTypeLike = jnp.bfloat16) -> Any:
    """Decodes an MXFP4Array to a dense array of its logical shape [..., K].

    Exact in bfloat16 and float32 for scale bytes 0 to 252 with every code, on every backend: also where the result is
    subnormal. Under 253 and 254 the largest codes are infinite there; 255 is NaN. float64 holds all. float16 rounds to
    nearest even, is exact for scale bytes 104 to 140, and infinite beyond its range.

    Args:
        w: codes and scales. With NumPy leaves the Rust core decodes, on all cores, and the result is a NumPy array that
            cannot be written; otherwise XLA decodes, where the leaves are.
        dtype: bfloat16, float16, float32 or float64 (in JAX only with `jax_enable_x64`).

    Raises:
        TypeError: `w` is no MXFP4Array.
        ValueError: `dtype` is none of those.

    Source: value formula from OCP Microscaling Formats (MX) v1.0; nibble order from the gpt-oss checkpoints.
    """
    if not isinstance(w, MXFP4Array):
        raise TypeError(f"w: found {type(w).__name__}, expected an MXFP4Array")
    if dtype is None:  # which NumPy takes for float64
        raise TypeError("dtype: found None, expected a float dtype")
    wanted = jnp.dtype(dtype)
    if wanted.name not in FLOATS:
        raise ValueError(f"dtype: found {wanted.name}, expected one of {', '.join(FLOATS)}")
    if isinstance(w.blocks, np.ndarray) and isinstance(w.scales, np.ndarray):
        return _host.decode(w.blocks, w.scales, wanted)
    if wanted == jnp.float64 and not _has_float64():
        raise ValueError("dtype: found float64 while jax_enable_x64 is off, expected float32")
    return _decode_jitted(w.blocks, w.scales, dtype=wanted)


def fake_quantize(
    x: Any, *, scale_rule: ScaleRule = "floor", rounding: Rounding = "nearest", key: Array | None = None
) -> Float[Array, "*batch k"]:
    """Quantizes and decodes at once: `x` as MXFP4 would hold it, in its own dtype, for quantization-aware training.

    Finite values stay finite: in float16, what MXFP4 rounds beyond 65504 becomes that.

    The gradient is that of the identity (a straight-through estimator): rounding has none of its own, and saturated
    values keep learning.

    Args:
        x: a floating array [..., K]; what follows are the arguments of :func:`quantize`.
        scale_rule: see :func:`quantize`.
        rounding: see :func:`quantize`.
        key: see :func:`quantize`.

    Raises:
        TypeError, ValueError: as :func:`quantize`.

    Source: Bengio et al., Estimating or Propagating Gradients Through Stochastic Neurons, 2013.
    """
    x = jnp.asarray(x)
    w = quantize(jax.lax.stop_gradient(x), scale_rule=scale_rule, rounding=rounding, key=key)
    if x.dtype == jnp.float16:
        # MXFP4 rounds up beyond float16 where a block's scale does; what was finite stays finite.
        largest = float(np.finfo(np.float16).max)
        values = dequantize(w, jnp.float32)
        decoded = jnp.where(jnp.isfinite(x), jnp.clip(values, -largest, largest), values).astype(jnp.float16)
    else:
        decoded = dequantize(w, x.dtype)
    return _straight_through(x, decoded)


@jax.custom_jvp
def _straight_through(x: Array, decoded: Array) -> Array:  # noqa: ARG001 - its tangent is what counts
    return decoded


@_straight_through.defjvp
def _straight_through_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    return primals[1], tangents[0]


def _has_float64() -> bool:
    """Whether JAX holds float64, or narrows it."""
    return jax.dtypes.canonicalize_dtype(np.float64) == np.float64


def decode(
    blocks: UInt8[Array, "*batch groups 16"], scales: UInt8[Array, "*batch groups"], dtype: DTypeLike
) -> Float[Array, "*batch k"]:
    """Decodes codes and scales to a float dtype, for use within other functions: nothing is checked, nothing jitted."""
    shifts = jax.lax.broadcasted_iota(jnp.int32, (*blocks.shape, 2), blocks.ndim) * 4
    codes = (blocks[..., None].astype(jnp.int32) >> shifts) & 15
    scale = scales[..., None, None].astype(jnp.int32)
    magnitude, sign = codes & 7, codes >> 3
    shape = (*scales.shape[:-1], MX_BLOCK_SIZE * scales.shape[-1])
    dtype = jnp.dtype(dtype)
    if dtype == jnp.float64:
        return _float64(magnitude, sign, scale).reshape(shape)
    bits = _bfloat16_bits(magnitude, scale) | sign << 15
    # A NaN without a sign, as the core makes it.
    bits = jnp.where(scale == _NAN_SCALE, 0x7FC0, bits).reshape(shape)
    if dtype == jnp.bfloat16:
        return jax.lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.bfloat16)
    return jax.lax.bitcast_convert_type(bits << 16, jnp.float32).astype(dtype)


_decode_jitted = jax.jit(decode, static_argnames="dtype")


def _bfloat16_bits(magnitude: Int32[Array, "..."], scale: Int32[Array, "..."]) -> Int32[Array, "..."]:
    """bfloat16 bits of a magnitude (a code without its sign) under a scale byte, NaN aside; float32's are these << 16.

    Exponent and mantissa of E2M1 stand in a code as in bfloat16, 6 bits lower: from code 2 on the bits are
    (scale - 1) * 128 + code * 64. Code 1 is the subnormal of E2M1, 0.5, and code 0 is zero. Where the exponent comes
    out below 1, under scale bytes 0 and 1, the value is a subnormal of bfloat16, in units of 2 ** -133.
    """
    normal = (scale - 1) * 128 + (magnitude << 6) - jnp.where(magnitude == 1, 64, 0)
    subnormal = (magnitude << 5) << jnp.minimum(scale, 1)
    bits = jnp.where(normal < 128, subnormal, jnp.minimum(normal, 0x7F80))
    return jnp.where(magnitude == 0, 0, bits)


def _float64(
    magnitude: Int32[Array, "..."], sign: Int32[Array, "..."], scale: Int32[Array, "..."]
) -> Float[Array, "..."]:
    """The values in float64, where all are normal."""
    exponent = (scale + (magnitude >> 1) + (1023 - 128)).astype(jnp.uint64)
    half = jnp.where(magnitude >= 2, magnitude & 1, 0).astype(jnp.uint64)
    bits = jnp.where(magnitude == 0, 0, exponent << 52 | half << 51) | sign.astype(jnp.uint64) << 63
    bits = jnp.where(scale == _NAN_SCALE, jnp.uint64(0x7FF8 << 48), bits)
    return jax.lax.bitcast_convert_type(bits, jnp.float64)


def _encode_impl(
    x: Float[Array, "*batch k"], key: Array | None, *, scale_rule: ScaleRule
) -> tuple[UInt8[Array, "*batch groups 16"], UInt8[Array, "*batch groups"]]:
    x = x.reshape(*x.shape[:-1], x.shape[-1] // MX_BLOCK_SIZE, MX_BLOCK_SIZE)
    bits, layout = _bits(x)
    magnitudes = bits & layout.magnitude_mask
    amax = jnp.max(magnitudes, axis=-1, keepdims=True)  # bits of magnitudes are ordered as the magnitudes are
    scale = _scale(amax, layout, scale_rule)
    scaled = _scaled(magnitudes, scale, layout)
    codes = _nearest(scaled) if key is None else _stochastic(scaled, key)
    codes |= (bits >> layout.sign_shift).astype(jnp.int32) << 3
    codes = jnp.where(scale == _NAN_SCALE, 0, codes).reshape(*x.shape[:-1], MX_BLOCK_BYTES, 2)
    packed = codes[..., 0] | codes[..., 1] << 4
    return packed.astype(jnp.uint8), scale[..., 0].astype(jnp.uint8)


_encode = jax.jit(_encode_impl, static_argnames="scale_rule")


class _Layout:
    """How a float dtype lies in an unsigned integer."""

    def __init__(self, float_dtype: DTypeLike, mantissa_bits: int) -> None:
        self.float_dtype = jnp.dtype(float_dtype)
        self.dtype = jnp.dtype(f"uint{8 * self.float_dtype.itemsize}")
        self.mantissa_bits = mantissa_bits
        self.sign_shift = 8 * self.float_dtype.itemsize - 1
        self.bias = (1 << (self.sign_shift - mantissa_bits - 1)) - 1
        self.magnitude_mask = self.dtype.type((1 << self.sign_shift) - 1)
        self.mantissa_mask = self.dtype.type((1 << mantissa_bits) - 1)
        self.infinity = self.dtype.type((2 * self.bias + 1) << mantissa_bits)


_FLOAT32: Final = _Layout(np.float32, 23)
_FLOAT64: Final = _Layout(np.float64, 52)


def _bits(x: Float[Array, "..."]) -> tuple[Integer[Array, "..."], _Layout]:
    """The bits of the values, in float64 for float64 and in float32 for all narrower dtypes."""
    if x.dtype == jnp.float64:
        return jax.lax.bitcast_convert_type(x, jnp.uint64), _FLOAT64
    if x.dtype == jnp.bfloat16:
        return jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32) << 16, _FLOAT32
    # Subnormals of float16 are normal in float32.
    return jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32), _FLOAT32


def _scale(amax: Integer[Array, "..."], layout: _Layout, scale_rule: ScaleRule) -> Int32[Array, "..."]:
    """Scale bytes from the bits of the largest magnitudes."""
    # floor(log2(amax)) + bias; for zeros and subnormals 0, which is below any scale byte's.
    exponent = (amax >> layout.mantissa_bits).astype(jnp.int32) - layout.bias
    mantissa = amax & layout.mantissa_mask
    half = layout.dtype.type(1 << (layout.mantissa_bits - 1))
    match scale_rule:
        case "floor":
            up = jnp.zeros_like(mantissa, bool)
        case "ceil":  # above 1.5, so that amax is above 6 times the scale
            up = mantissa > half
        case "nearest":  # from 1.75 on, so that amax is at least 7 times the scale
            up = mantissa >= half + half // 2
    byte = jnp.clip(exponent - 2 + up.astype(jnp.int32) + 127, 0, _MAX_FINITE_SCALE)
    byte = jnp.where(amax == layout.infinity, _INFINITE_SCALE, byte)
    return jnp.where(amax > layout.infinity, _NAN_SCALE, byte)


def _scaled(
    magnitudes: Integer[Array, "... 32"], scale: Int32[Array, "... 1"], layout: _Layout
) -> Float[Array, "... 32"]:
    """Magnitudes divided by their scale; exact, but zero where the result is far below 0.25 and 8 for infinities."""
    field = (magnitudes >> layout.mantissa_bits).astype(jnp.int32)
    exponent = field - (scale - 127)
    mantissa = magnitudes & layout.mantissa_mask
    normal = jnp.maximum(exponent, 0).astype(layout.dtype) << layout.mantissa_bits | mantissa
    normal = jnp.where(exponent < 1, layout.dtype.type(0), normal)
    # Subnormals are their mantissa times 2 ** (1 - bias - mantissa_bits); as integers no one flushes them.
    factor = (127 + 1 - layout.mantissa_bits) - scale
    factor = jnp.maximum(factor, 0).astype(layout.dtype) << layout.mantissa_bits
    as_float = mantissa.astype(layout.float_dtype) * jax.lax.bitcast_convert_type(factor, layout.float_dtype)
    scaled = jnp.where(field == 0, as_float, jax.lax.bitcast_convert_type(normal, layout.float_dtype))
    return jnp.where(magnitudes >= layout.infinity, layout.float_dtype.type(8), scaled)


def _nearest(scaled: Float[Array, "..."]) -> Int32[Array, "..."]:
    """The nearest magnitude's code; saturates at 6, whose code is 7."""
    code = jnp.zeros(scaled.shape, jnp.int32)
    for middle in _UP_ABOVE:
        code += (scaled > middle).astype(jnp.int32)
    for middle in _UP_FROM:
        code += (scaled >= middle).astype(jnp.int32)
    return code


def _stochastic(scaled: Float[Array, "..."], key: Array) -> Int32[Array, "..."]:
    """The code below, or the one above with the probability of the distance to the one below."""
    # Magnitudes are 0.5 apart below 2, 1 apart below 4, then 2 apart; 0 is code 0, 2 is code 4 and 4 is code 6.
    step = jnp.where(scaled < 2, 0.5, jnp.where(scaled < 4, 1.0, 2.0)).astype(scaled.dtype)
    first = jnp.where(scaled < 2, 0, jnp.where(scaled < 4, 2, 4))
    steps = scaled / step
    below = jnp.floor(steps)
    random = jax.random.bits(key, scaled.shape, jnp.uint32) >> (32 - _RANDOM_BITS)
    up = (steps - below) * (1 << _RANDOM_BITS) > random.astype(scaled.dtype)
    return jnp.minimum(first + below.astype(jnp.int32) + up.astype(jnp.int32), 7)
