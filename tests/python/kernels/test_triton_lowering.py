"""Every kernel through Triton is lowered for CUDA at every shape of gpt-oss, without a GPU."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from tensorport.kernels.attention import cases as attention_cases
from tensorport.kernels.attention import pallas_triton as attention
from tensorport.kernels.attention.types import Settings
from tensorport.kernels.cases import Case
from tensorport.kernels.mxfp4_expert_matmul import cases as expert_cases
from tensorport.kernels.mxfp4_expert_matmul import pallas_triton as expert_matmul
from tensorport.kernels.mxfp4_matmul import cases as matmul_cases
from tensorport.kernels.mxfp4_matmul import pallas_triton as matmul
from tensorport.kernels.mxfp4_moe import cases as moe_cases
from tensorport.kernels.mxfp4_moe import pallas_triton as moe
from tensorport.kernels.mxfp4_moe.types import Activation
from tensorport.kernels.registry import OPS, Device

# JAX 0.11 announces that its backend for Triton will go.
pytestmark = pytest.mark.filterwarnings("ignore:.*[Tt]riton.*:DeprecationWarning")

H200 = Device("gpu", "NVIDIA H200", (9, 0))
# For each op its cases, what computes it, and how many kernels that is.
KERNELS: dict[str, tuple[tuple[Case, ...], Any, int]] = {
    "mxfp4.matmul": (matmul_cases.CASES, matmul.matmul, 1),
    "mxfp4.expert_matmul": (expert_cases.CASES, expert_matmul.expert_matmul, 1),
    "mxfp4.moe": (moe_cases.CASES, partial(moe.moe, activation=Activation(7.0, 1.702)), 2),
    "attention": (attention_cases.CASES, partial(attention.attention, settings=Settings(0.125, None)), 1),
}
WINDOW = partial(attention.attention, settings=Settings(0.125, 128))


def every() -> Iterator[Any]:
    for op, (cases, compute, count) in KERNELS.items():
        for case in cases:
            yield pytest.param(op, case, compute, count, id=f"{op}: {case.name}")
    for case in attention_cases.CASES:
        yield pytest.param("attention", case, WINDOW, 1, id=f"attention: {case.name}, window")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(("op", "case", "compute", "count"), list(every()))
def test_it_lowers_for_cuda(  # noqa: PLR0917 - what a case is made of
    op: str, case: Case, compute: Any, count: int, dtype: str, on_h200: Callable[[], Any]
) -> None:
    shapes = jax.eval_shape(lambda key: case.arguments(key, jnp.dtype(dtype)), jax.random.key(0))
    inputs = jax.eval_shape(OPS[op].arguments, *shapes)
    assert OPS[op].explain("pallas_triton", H200, *inputs).implementation == "pallas_triton"
    with on_h200():
        text = jax.jit(compute).trace(*inputs).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == count


@pytest.mark.parametrize("op", KERNELS)
def test_cases_count_the_bytes_of_their_weights(op: str) -> None:
    """Of experts those that are chosen: all, where there are enough rows."""
    for case in KERNELS[op][0]:
        shapes = jax.eval_shape(lambda key, case=case: case.arguments(key, jnp.bfloat16), jax.random.key(0))
        codes = [leaf for leaf in jax.tree.leaves(shapes) if leaf.dtype == jnp.uint8]
        total = sum(array.size * array.dtype.itemsize for array in codes or shapes[1:3])
        experts = {"mxfp4.expert_matmul": 1, "mxfp4.moe": 3}.get(op)
        if experts is None:
            assert case.weight_bytes == total
        else:
            count, rows = shapes[experts].shape[0], shapes[1].size if op == "mxfp4.moe" else shapes[0].shape[0]
            assert case.weight_bytes == total // count * min(count, rows)
