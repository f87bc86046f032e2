"""MXFP4 by NumPy in float64 and ml_dtypes, written from the specification: an oracle for every codec of the project."""

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def decode(blocks: Array, scales: Array) -> Array:
    """The values in float64 [..., 32 G], where all of them are exact and finite but the NaNs."""
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    scale = scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    values: Array = codes.reshape(*scales.shape, 32) * scale[..., None]
    return values.reshape(*scales.shape[:-1], 32 * scales.shape[-1])


def encode(x: Array, scale_rule: str = "floor") -> tuple[Array, Array]:
    """Blocks and scales of `x` [..., K] under round-to-nearest-even."""
    with np.errstate(invalid="ignore"):  # signalling NaNs
        values = x.astype(np.float64).reshape(*x.shape[:-1], -1, 32)
    amax = np.abs(values).max(axis=-1, initial=0)
    exponent = np.full(amax.shape, -(10**6), np.int64)
    is_usual = np.isfinite(amax) & (amax > 0)
    exponent[is_usual] = np.floor(np.log2(amax[is_usual])).astype(np.int64)
    # log2 rounds: correct where it came out on the wrong side of a power of two.
    power = np.ldexp(1.0, exponent.clip(-1074, 1023))
    exponent = exponent - (is_usual & (amax < power)) + (is_usual & (amax / 2 >= power))
    scaled = np.divide(amax, np.ldexp(1.0, (exponent - 2).clip(-1074, 1023)), where=is_usual, out=np.zeros(amax.shape))
    up = {"floor": scaled > np.inf, "ceil": scaled > 6, "nearest": scaled >= 7}[scale_rule]
    byte = (exponent - 2 + up + 127).clip(0, 252)
    byte = np.where(np.isinf(amax), 254, byte)
    byte = np.where(np.isnan(values).any(axis=-1), 255, byte)
    finite_scale = np.ldexp(1.0, byte - 127)[..., None]
    values = np.where(byte[..., None] == 255, 0, values)
    # ml_dtypes rounds to nearest even and saturates; clipped before, for NumPy warns of what float32 cannot hold.
    codes = (values / finite_scale).clip(-8, 8).astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4, byte.astype(np.uint8)


def hard_values(dtype: Any, seed: int = 0) -> Array:
    """Blocks [n, 32] of what goes wrong: all exponents, ties, zeros, subnormals, NaN, infinities."""
    dtype, rng = np.dtype(dtype), np.random.default_rng(seed)
    unsigned = np.dtype(f"u{dtype.itemsize}")
    top = 2 ** (8 * dtype.itemsize)
    random_bits = rng.integers(0, top, (600, 32), np.uint64).astype(unsigned).view(dtype)
    subnormal = rng.integers(0, 64, (20, 32), np.uint64).astype(unsigned).view(dtype)
    with np.errstate(over="ignore"):
        # Every tie and its neighbourhood, under many scales; the first value of a block decides on its scale.
        ties = np.array([0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 7.5, 0.2499, 5.01])
        block = rng.choice(ties, (300, 32)) * rng.choice([-1, 1], (300, 32))
        block[:, 0] = rng.choice([4, 5, 6, 6.0625, 6.9375, 7, 7.0625, 7.9375], 300)
        scaled = (block * np.ldexp(1.0, rng.integers(-135, 128, 300))[:, None]).astype(dtype)
        magnitudes = (rng.standard_normal((300, 32)) * np.exp(rng.uniform(-80, 60, (300, 1)))).astype(dtype)
    special, info = np.zeros((8, 32), dtype), ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    special[1] = -special[1]
    special[2, 5], special[3, 7], special[4, 31], special[5, 0] = np.nan, np.inf, -np.inf, -np.nan
    special[4, 2], special[4, 3], special[5, 1] = 1, info.max, np.inf
    special[6] = info.max
    special[7] = info.smallest_subnormal
    return np.concatenate([random_bits, subnormal, scaled, magnitudes, special])
