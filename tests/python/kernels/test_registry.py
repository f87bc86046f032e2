"""Which implementation of an op runs: nothing is chosen in silence."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorport import kernels, mxfp4
from tensorport.kernels.registry import OPS, Device, Implementation, Op
from tensorport.mxfp4 import MXFP4Array

H200 = Device("gpu", "NVIDIA H200", (9, 0))
B200 = Device("gpu", "NVIDIA B200", (10, 0))
CPU = Device("cpu", "cpu", None)


def weights(*shape: int) -> MXFP4Array:
    *leading, k = shape
    blocks, scales = ((*leading, k // 32, 16), (*leading, k // 32))
    return MXFP4Array(jax.ShapeDtypeStruct(blocks, np.uint8), jax.ShapeDtypeStruct(scales, np.uint8))


def shape(*sizes: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "matmul": (shape(3, 64), weights(5, 64)),
    "expert_matmul": (shape(3, 64), weights(7, 5, 64), shape(3, dtype=jnp.int32)),
    "moe": (
        shape(3, 64),
        shape(3, 2, dtype=jnp.int32),
        shape(3, 2),
        weights(7, 192, 64),
        shape(7, 192),
        weights(7, 64, 96),
        shape(7, 64),
    ),
}


@pytest.fixture
def op() -> Any:
    op = Op(
        "test.op",
        lambda x: (x,),
        Implementation("scaled_dot", lambda x: x + 1, lambda device, _: None if device.platform == "gpu" else "no GPU"),
        Implementation("native", lambda x: x + 2, lambda _, x: "x is odd" if x.size % 2 else None),
    )
    yield op
    del OPS["test.op"]


def test_auto_takes_the_first_that_can_run(op: Op) -> None:
    assert op.choose("auto", jnp.zeros(4)).name == "native"


def test_a_named_one_runs_or_raises_with_its_reason(op: Op) -> None:
    assert op.choose("native", jnp.zeros(4)).name == "native"
    with pytest.raises(NotImplementedError, match=r"test\.op on cpu: scaled_dot: no GPU$"):
        op.choose("scaled_dot", jnp.zeros(4))
    with pytest.raises(NotImplementedError, match=r"test\.op on cpu: xla: not in this version"):
        op.choose("xla", jnp.zeros(4))


def test_if_none_can_run_all_reasons_are_told(op: Op) -> None:
    with pytest.raises(NotImplementedError, match=r"scaled_dot: no GPU; native: x is odd; xla: not in this version"):
        op.choose("auto", jnp.zeros(3))


def test_other_names_are_refused(op: Op) -> None:
    with pytest.raises(ValueError, match="implementation: found 'cuda', expected one of 'auto', 'xla', 'native'"):
        op.choose("cuda", jnp.zeros(4))


@pytest.mark.usefixtures("op")
def test_explain_tells_what_runs_and_why_not_the_others() -> None:
    explained = kernels.explain("test.op", jnp.zeros(4))
    assert explained.implementation == "native"
    assert explained.reasons["scaled_dot"] == "no GPU"
    text = str(explained)
    assert text.splitlines()[0] == "test.op on cpu:"
    assert "  scaled_dot: no GPU" in text
    assert "  native: runs" in text
    assert kernels.explain("test.op", jnp.zeros(3)).implementation is None
    assert kernels.explain("test.op", jnp.zeros(4), implementation="scaled_dot").implementation is None


@pytest.mark.parametrize("name", ["matmul", "expert_matmul", "moe"])
def test_ops_are_found_by_function_and_by_name(name: str) -> None:
    function, args = getattr(mxfp4, name), ARGUMENTS[name]
    for op in (function, name, f"mxfp4.{name}"):
        explained = kernels.explain(op, *args)
        assert explained.op == f"mxfp4.{name}"
        assert explained.implementation == "native"
        assert explained.reasons["pallas_mosaic"] == "not in this version of tensorport"


def test_arrays_that_the_op_would_refuse_are_refused() -> None:
    x, _ = ARGUMENTS["matmul"]
    with pytest.raises(ValueError, match="K, the last axis: found 64 in x, 96 in w"):
        kernels.explain(mxfp4.matmul, x, weights(5, 96))
    with pytest.raises(TypeError, match="w: found"):
        kernels.explain(mxfp4.matmul, x, x)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'w'"):
        kernels.explain(mxfp4.matmul, x)


def test_an_unknown_op_is_refused() -> None:
    with pytest.raises(ValueError, match=r"op: found 'mxfp4\.sum', expected one of '"):
        kernels.explain("mxfp4.sum")
    with pytest.raises(ValueError, match="op: found"):
        kernels.explain(np.sum)


def test_the_device_is_that_of_the_arrays_or_the_default() -> None:
    assert Device.of(jnp.zeros(3)) == CPU == Device.of(np.zeros(3)) == Device.of()
    assert jax.jit(lambda x: x if Device.of(x) == CPU else None)(jnp.zeros(3)) is not None
    with jax.default_device("cpu"):
        assert Device.of() == CPU
    with jax.default_device(jax.devices()[1]):
        assert Device.of(np.zeros(3)) == CPU
    assert str(B200) == "gpu (NVIDIA B200)"
    assert str(CPU) == "cpu"


class _Gpu:
    platform, device_kind, compute_capability = "gpu", "NVIDIA B200", "10.0"


class _Rocm:
    platform, device_kind, compute_capability = "gpu", "AMD Instinct MI300X", "gfx942"


def test_compute_capabilities_are_read_where_there_are_any() -> None:
    assert Device._from(_Gpu()) == B200
    assert Device._from(_Rocm()) == Device("gpu", "AMD Instinct MI300X", None)
