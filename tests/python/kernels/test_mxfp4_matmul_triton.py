"""mxfp4.matmul through Triton, interpreted on CPU against float64, and where it runs."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import mxfp4_oracle as oracle
import numpy as np
import pytest
from jax import export
from mxfp4_cases import (
    assert_close,
    assert_every_code_is_exact,
    every_code_under_every_scale,
    float64,
    random_array,
    random_weights,
)
from tensorport import mxfp4
from tensorport.kernels import triton
from tensorport.kernels.mxfp4_matmul import pallas_triton
from tensorport.kernels.registry import OPS, Device
from tensorport.mxfp4 import MXFP4Array

# JAX 0.11 announces that its backend for Triton will go.
pytestmark = pytest.mark.filterwarnings("ignore:.*[Tt]riton.*:DeprecationWarning")

DTYPES = ["bfloat16", "float16", "float32"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "n", "k"),
    [
        ((), 5, 96),
        ((1,), 70, 2880),
        ((3,), 70, 1120),
        ((2, 2), 9, 32),
        ((5,), 33, 160),
        ((20,), 70, 96),
        ((70,), 130, 160),
    ],
)
def test_values_are_those_of_float64(batch: tuple[int, ...], n: int, k: int, dtype: str) -> None:
    w, x = random_weights(n, k), random_array(*batch, k, dtype=dtype)
    found = pallas_triton.matmul(x, w, interpret=True)
    dense = oracle.decode(np.asarray(w.blocks), np.asarray(w.scales))
    assert (found.dtype, found.shape) == (x.dtype, (*batch, n))
    assert_close(found, float64(x) @ dense.T, np.abs(float64(x)) @ np.abs(dense.T), k)


@pytest.mark.parametrize("m", [1, 7])
def test_every_code_under_every_scale_is_exact(m: int) -> None:
    one_hot, w, expected = every_code_under_every_scale()
    rows = jnp.split(one_hot, 16) if m == 1 else [one_hot]
    found = np.concatenate([np.asarray(pallas_triton.matmul(part, w, interpret=True)) for part in rows])
    assert_every_code_is_exact(found, expected)


def test_float32_is_not_narrowed() -> None:
    w = mxfp4.quantize(jnp.eye(32, dtype=jnp.float32))
    for m in (1, 9):
        x = jnp.full((m, 32), 1 + 2**-20, jnp.float32)
        np.testing.assert_array_equal(np.asarray(pallas_triton.matmul(x, w, interpret=True)), np.asarray(x))


class TestChoice:
    W = MXFP4Array(jax.ShapeDtypeStruct((5, 3, 16), jnp.uint8), jax.ShapeDtypeStruct((5, 3), jnp.uint8))
    X: Any = jax.ShapeDtypeStruct((7, 96), jnp.bfloat16)

    @pytest.mark.parametrize(
        ("capability", "words"),
        [((7, 5), "7.5, expected at least 8.0"), ((8, 0), None), ((9, 0), None), (None, "NVIDIA GPUs alone")],
    )
    def test_gpus_of_ampere_and_later_run_it(self, capability: tuple[int, int] | None, words: str | None) -> None:
        reason = triton.refuses(Device("gpu", "some GPU", capability), self.X, self.W)
        assert reason is None if words is None else words in str(reason)

    def test_it_runs_where_it_is_named_alone(self) -> None:
        op = OPS["mxfp4.matmul"]
        device = Device("gpu", "NVIDIA H200", (9, 0))
        named = op.explain("pallas_triton", device, self.X, self.W)
        assert named.implementation == "pallas_triton"
        chosen = op.explain("auto", device, self.X, self.W)
        assert chosen.implementation == "xla"
        assert chosen.reasons["pallas_triton"] == triton.NOT_MEASURED

    def test_on_cpu_it_is_refused(self) -> None:
        with pytest.raises(NotImplementedError, match=re.escape("pallas_triton: runs on NVIDIA GPUs alone")):
            mxfp4.matmul(random_array(3, 96), random_weights(5, 96), implementation="pallas_triton")

    @pytest.mark.parametrize(
        ("x", "words"),
        [
            (jax.ShapeDtypeStruct((0, 96), jnp.float32), "empty"),
            (jax.ShapeDtypeStruct((7, 96), np.float64), "float64"),
            (jax.ShapeDtypeStruct((*export.symbolic_shape("t"), 96), jnp.float32), "symbolic"),
        ],
    )
    def test_what_it_cannot_multiply_is_refused(self, x: Any, words: str) -> None:
        assert words in str(triton.refuses(Device("gpu", "NVIDIA H200", (9, 0)), x, self.W))
