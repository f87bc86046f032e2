"""The codec of NumPy arrays against ml_dtypes and against float64 arithmetic in NumPy."""

import signal
import subprocess
import sys
import textwrap
import threading
import time
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from tensorport import _core
from tensorport.mxfp4 import _host

BF16: Any = ml_dtypes.bfloat16
DTYPES = [np.float64, np.float32, np.float16, BF16]
RULES = ["floor", "ceil", "nearest"]
Bytes = NDArray[np.uint8]


def exact(blocks: Bytes, scales: Bytes) -> NDArray[np.float64]:
    """What blocks and scales stand for, by the dtypes of ml_dtypes."""
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    factors = scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    values: NDArray[np.float64] = codes.reshape(*scales.shape, 32) * factors[..., None]
    return values.reshape(*scales.shape[:-1], 32 * scales.shape[-1])


def cast(values: NDArray[np.float64], dtype: Any) -> NDArray[Any]:
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        rounded: NDArray[Any] = values.astype(dtype)
    return rounded


def expected_scales(x: NDArray[Any], rule: str) -> Bytes:
    """The scale byte of each block of 32 on the last axis, in float64: frexp and comparisons."""
    with np.errstate(invalid="ignore"):  # NumPy complains of a NaN in frexp on some processors
        amax = np.abs(x.astype(np.float64)).max(axis=-1)
        fraction, exponent = np.frexp(amax)  # fraction in [0.5, 1)
    byte = exponent.astype(np.int64) - 1 - 2 + 127
    byte += {"floor": False, "ceil": fraction > 0.75, "nearest": fraction >= 0.875}[rule]
    byte = np.where(amax == 0, 0, np.clip(byte, 0, 252))
    byte = np.where(np.isnan(amax), 255, np.where(np.isinf(amax), 254, byte))
    return byte.astype(np.uint8)


def expected_codes(x: NDArray[Any], scales: Bytes) -> Bytes:
    """The bytes of blocks of 32: comparisons in float64, and what ml_dtypes says where it rounds once."""
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        scaled = np.ldexp(x.astype(np.float64), 127 - scales.astype(np.int64)[..., None])
        codes = np.signbit(scaled).astype(np.uint8) << np.uint8(3)
        for code, middle in enumerate([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]):
            # A tie goes up where the upper code is the even one.
            codes += np.abs(scaled) >= middle if code % 2 else np.abs(scaled) > middle
        if x.dtype != np.float64:  # those it rounds to float32 first
            theirs = np.clip(scaled, -6.0, 6.0).astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
            np.testing.assert_array_equal(codes[scales != 255], theirs[scales != 255])
    codes[scales == 255] = 0
    packed: Bytes = codes[..., 0::2] | codes[..., 1::2] << np.uint8(4)
    return packed


def assert_encodes(x: NDArray[Any], workers: int | None = None) -> None:
    in_blocks = x.reshape(*x.shape[:-1], x.shape[-1] // 32, 32)
    for rule in RULES:
        blocks, scales = _host.encode(x, rule, workers=workers)
        assert blocks.dtype == scales.dtype == np.dtype(np.uint8)
        assert (blocks.shape, scales.shape) == ((*in_blocks.shape[:-1], 16), in_blocks.shape[:-1])
        np.testing.assert_array_equal(scales, expected_scales(in_blocks, rule))
        np.testing.assert_array_equal(blocks, expected_codes(in_blocks, scales))


def assert_same_values(found: NDArray[Any], expected: NDArray[Any]) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    is_number = ~np.isnan(expected)
    width = f"u{found.dtype.itemsize}"
    np.testing.assert_array_equal(found.view(width)[is_number], expected.view(width)[is_number])


def every_code_under_every_scale() -> tuple[Bytes, Bytes]:
    """[2, 32, 4, 16] and [2, 32, 4]: each of the 256 blocks has every byte's both codes, in another order."""
    order = np.stack([np.random.default_rng(seed).permutation(16) for seed in range(512)]).astype(np.uint8)
    codes = order.reshape(256, 32)
    scales = np.arange(256, dtype=np.uint8).reshape(2, 32, 4)
    return (codes[:, 0::2] | codes[:, 1::2] << np.uint8(4)).reshape(2, 32, 4, 16), scales


def random_pair(*groups_shape: int, seed: int = 0) -> tuple[Bytes, Bytes]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (*groups_shape, 16), np.uint8), rng.integers(0, 256, groups_shape, np.uint8)


def random_bits(dtype: Any, *shape: int, seed: int = 0) -> NDArray[Any]:
    width = np.dtype(dtype).itemsize
    return np.random.default_rng(seed).integers(0, 256, (*shape[:-1], shape[-1] * width), np.uint8).view(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_under_every_scale_decodes_bit_for_bit(dtype: Any) -> None:
    blocks, scales = every_code_under_every_scale()
    decoded = _host.decode(blocks, scales, dtype)
    assert_same_values(decoded, cast(exact(blocks, scales), dtype))
    assert np.isnan(decoded[1, 31, -32:]).all()
    if dtype != np.float16:
        bound = 254 if dtype == np.float64 else 252
        assert (decoded.astype(np.float64) == exact(blocks, scales))[scales.repeat(32, axis=-1) <= bound].all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups_shape", [(5,), (3, 7), (2, 1, 5, 3), (1, 3, 1, 2, 1, 5), (61, 1021)])
def test_random_pairs_of_any_shape_decode_bit_for_bit(dtype: Any, groups_shape: tuple[int, ...]) -> None:
    blocks, scales = random_pair(*groups_shape, seed=len(groups_shape))
    assert_same_values(_host.decode(blocks, scales, dtype), cast(exact(blocks, scales), dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_bits_encode_bit_for_bit(dtype: Any) -> None:
    # Most blocks of random bits have a NaN: blocks with one exponent and its neighbours beside them.
    x = random_bits(dtype, 257, 96)
    rng = np.random.default_rng(1)
    near = rng.standard_normal((300, 96)) * np.exp2(
        rng.integers(-30, 16, (300, 1)) if dtype == np.float16 else rng.integers(-140, 127, (300, 1))
    )
    for values in (x, cast(near, dtype)):
        assert_encodes(values)


@pytest.mark.parametrize("dtype", [np.float16, BF16])
@pytest.mark.parametrize("factor", [1, 40503])
def test_every_pattern_of_16_bits_encodes_bit_for_bit(dtype: Any, factor: int) -> None:
    patterns = (np.arange(65536, dtype=np.uint32) * factor).astype(np.uint16).view(dtype)
    assert_encodes(patterns.reshape(64, 1024))
    # Alone among zeros: no neighbour decides the scale.
    alone = np.zeros((65536, 32), dtype)
    alone[:, 7] = patterns
    assert_encodes(alone)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_go_to_the_even_code_and_large_values_saturate(dtype: Any) -> None:
    values = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.5, 7.5]
    x = np.zeros((2, 32), dtype)
    x[0, : len(values)] = values
    x[1] = -x[0]
    blocks, scales = _host.encode(x, "floor")
    assert scales.tolist() == [[127], [127]]
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(2, 32)
    assert codes[0, :9].tolist() == [0, 2, 2, 4, 4, 6, 6, 7, 7]
    assert codes[1].tolist() == [code + 8 for code in codes[0].tolist()]
    assert _host.encode(x, "ceil")[1].tolist() == [[128], [128]]
    assert _host.encode(x, "nearest")[1].tolist() == [[128], [128]]
    assert _host.encode(x[:, :8].repeat(4, axis=-1), "nearest")[1].tolist() == [[127], [127]]


def test_float64_is_rounded_once() -> None:
    """By way of float32 both would be ties, and go to the even code."""
    x = np.zeros(32)
    x[:4] = [0.25 + 2.0**-40, 0.75 - 2.0**-40, 5 + 2.0**-40, 6]
    blocks, _ = _host.encode(x, "floor")
    assert blocks[0, :2].tolist() == [0x11, 0x77]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(dtype: Any, rule: str) -> None:
    x = np.zeros((7, 32), dtype)
    x[1] = -0.0
    x[2, 5], x[2, 6] = np.nan, np.inf
    x[3, 1], x[3, 2], x[3, 3] = np.inf, -np.inf, -1
    finfo: Any = ml_dtypes.finfo
    x[4], x[5] = finfo(dtype).smallest_subnormal, -finfo(dtype).max
    x[6, 0] = np.copysign(np.nan, -1)
    blocks, scales = _host.encode(x, rule)
    assert scales[[0, 1, 2, 3, 6], 0].tolist() == [0, 0, 255, 254, 255]
    assert np.unique(blocks[[0, 2, 6]]).tolist() == [0]
    assert np.unique(blocks[1]).tolist() == [0x88]
    assert blocks[3].ravel()[:3].tolist() == [0x70, 0x8F, 0]
    assert_encodes(x)
    if dtype != np.float16:
        decoded = _host.decode(blocks, scales, BF16).astype(np.float64)
        assert decoded[3, :5].tolist() == [0, np.inf, -np.inf, 0, 0]
        assert np.isnan(decoded[[2, 6]]).all()
        assert np.isfinite(decoded[[0, 1, 4, 5]]).all()
        assert np.signbit(decoded[1]).all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [np.float64, np.float32, BF16])
def test_what_mxfp4_can_hold_comes_back_bit_for_bit(dtype: Any, rule: str) -> None:
    blocks, scales = random_pair(29, 31, seed=3)
    scales = np.minimum(scales, 252)
    blocks[..., 3] |= 7  # with the largest code each scale is found again
    values = _host.decode(blocks, scales, dtype)
    again = _host.encode(values, rule)
    np.testing.assert_array_equal(again[0], blocks)
    np.testing.assert_array_equal(again[1], scales)


@settings(max_examples=60, deadline=None)
@given(
    groups_shape=hnp.array_shapes(min_dims=1, max_dims=5, min_side=0, max_side=5),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 999),
)
def test_any_shape_goes_both_ways(groups_shape: tuple[int, ...], dtype: Any, seed: int) -> None:
    blocks, scales = random_pair(*groups_shape, seed=seed)
    values = _host.decode(blocks, scales, dtype)
    assert values.shape == (*groups_shape[:-1], 32 * groups_shape[-1])
    assert_same_values(values, cast(exact(blocks, scales), dtype))
    assert_encodes(random_bits(dtype, *values.shape, seed=seed))


@pytest.mark.parametrize("order", ["transposed", "fortran", "strided", "negative", "broadcast", "big-endian"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_arrays_in_any_memory_order(order: str, dtype: Any) -> None:
    x = np.random.default_rng(4).standard_normal((6, 5, 64)).astype(dtype)
    other = {
        "transposed": lambda: np.ascontiguousarray(x.transpose(2, 1, 0)).transpose(2, 1, 0),
        "fortran": lambda: np.asfortranarray(x),
        "strided": lambda: x.repeat(2, axis=-1)[..., ::2],
        "negative": lambda: np.ascontiguousarray(x[::-1, ::-1])[::-1, ::-1],
        "broadcast": lambda: np.broadcast_to(x[:1], x.shape),
        "big-endian": lambda: x.astype(np.dtype(dtype).newbyteorder(">")),
    }[order]()
    same = np.ascontiguousarray(other, dtype)
    blocks, scales = _host.encode(same, "floor")
    for found, expected in zip(_host.encode(other, "floor"), (blocks, scales), strict=True):
        np.testing.assert_array_equal(found, expected)
    if order in ("fortran", "negative"):
        halves = [np.asfortranarray(a) if order == "fortran" else a[::-1].copy()[::-1] for a in (blocks, scales)]
        assert not any(half.flags.c_contiguous for half in halves)
        assert_same_values(_host.decode(halves[0], halves[1], np.float32), _host.decode(blocks, scales, np.float32))


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_threads_give_the_same_bytes(workers: int) -> None:
    # 90,003 blocks: above what the calling thread does alone, and no multiple of what a thread does at once.
    blocks, scales = random_pair(3, 30001, seed=5)
    for dtype in (np.float32, BF16):
        assert_same_values(_host.decode(blocks, scales, dtype, workers=workers), cast(exact(blocks, scales), dtype))
    assert_encodes(random_bits(BF16, 3, 32 * 30001), workers=workers)


def test_results_are_read_only_aligned_and_outlive_their_memory() -> None:
    memory = _core.Memory()
    blocks, scales = random_pair(11, 7)
    arrays = [_host.decode(blocks, scales, np.float32, memory=memory)]
    arrays += _host.encode(arrays[0], "floor", memory=memory)
    copies = [array.copy() for array in arrays]
    del memory
    for array, copy in zip(arrays, copies, strict=True):
        assert not array.flags.writeable
        assert array.ctypes.data % 64 == 0
        np.testing.assert_array_equal(array, copy)


def test_memory_is_used_again_only_after_the_last_view_is_gone() -> None:
    memory = _core.Memory()
    blocks, scales = random_pair(13, 300)
    scales[:] = np.minimum(scales, 252)
    first = _host.decode(blocks, scales, np.float32, memory=memory)
    address, view = first.ctypes.data, first[3:4]
    del first
    kept = view.copy()
    second = _host.decode(blocks[::-1], scales[::-1], np.float32, memory=memory)
    assert second.ctypes.data != address
    np.testing.assert_array_equal(view, kept)
    del view
    third = _host.decode(blocks, scales, np.float32, memory=memory)
    assert third.ctypes.data == address
    np.testing.assert_array_equal(third[3:4], kept)


MISFITS: dict[str, tuple[Any, Any, Any, type[Exception], str]] = {
    "dtype": (np.zeros((2, 16), np.uint8), np.zeros(2, np.uint8), np.int8, ValueError, "dtype: found int8"),
    "float8": (
        np.zeros((2, 16), np.uint8),
        np.zeros(2, np.uint8),
        ml_dtypes.float8_e5m2,
        ValueError,
        "expected one of",
    ),
    "list": ([[0] * 16], np.zeros(1, np.uint8), BF16, TypeError, "blocks: found list, expected an array of uint8"),
    "signed": (np.zeros((2, 16), np.int8), np.zeros(2, np.uint8), BF16, TypeError, "blocks: found an array of int8"),
    "floats": (np.zeros((2, 16), np.uint8), np.zeros(2), BF16, TypeError, "scales: found an array of float64"),
    "width": (np.zeros((2, 8), np.uint8), np.zeros(2, np.uint8), BF16, ValueError, r"blocks: found shape \(2, 8\)"),
    "flat": (np.zeros(16, np.uint8), np.zeros((), np.uint8), BF16, ValueError, r"blocks: found shape \(16,\)"),
    "fewer": (
        np.zeros((3, 16), np.uint8),
        np.zeros(2, np.uint8),
        BF16,
        ValueError,
        r"found shape \(2,\), expected \(3,\)",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_arguments_that_do_not_fit_are_named(case: str) -> None:
    blocks, scales, dtype, exception, message = MISFITS[case]
    with pytest.raises(exception, match=message):
        _host.decode(blocks, scales, dtype)


def test_arrays_that_cannot_be_encoded_are_named() -> None:
    with pytest.raises(ValueError, match=r"x: found shape \(3, 33\), expected a last axis that is a multiple of 32"):
        _host.encode(np.zeros((3, 33), np.float32), "floor")
    with pytest.raises(ValueError, match=r"x: found shape \(\), expected a last axis"):
        _host.encode(np.zeros((), np.float32), "floor")
    with pytest.raises(ValueError, match="x: found an array of int32, expected one of float16"):
        _host.encode(np.zeros(32, np.int32), "floor")
    with pytest.raises(TypeError, match="x: found list, expected an array of floats"):
        _host.encode([0.0] * 32, "floor")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='scale_rule: found "up", expected floor, ceil or nearest'):
        _host.encode(np.zeros(32, np.float32), "up")
    with pytest.raises(ValueError, match="workers: found 0"):
        _host.encode(np.zeros(32, np.float32), "floor", workers=0)


def test_other_threads_run_meanwhile() -> None:
    """The GIL is free while a large array is decoded: another thread of Python counts on."""
    blocks, scales = random_pair(1 << 20)
    counts, is_done = [0], threading.Event()

    def count() -> None:
        while not is_done.is_set():
            counts[0] += 1

    thread = threading.Thread(target=count)
    thread.start()
    before = counts[0]
    for _ in range(3):
        _host.decode(blocks, scales, np.float32, workers=1)
    counted = counts[0] - before
    is_done.set()
    thread.join()
    assert counted > 100


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_ctrl_c_stops_a_large_job() -> None:
    program = """
        import numpy as np
        from tensorport.mxfp4 import _host
        x = np.zeros((64, 1 << 20), np.float32)
        print("ready", flush=True)
        while True:
            _host.encode(x, "floor", workers=1)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as job:
        assert job.stdout is not None
        assert job.stdout.readline() == "ready\n"
        time.sleep(0.2)
        job.send_signal(signal.SIGINT)
        try:
            _, stderr = job.communicate(timeout=60)
        finally:
            job.kill()
    assert "KeyboardInterrupt" in stderr
    assert "panicked" not in stderr
