"""Every op is lowered for GPUs and TPUs without one, at the shapes of gpt-oss: by XLA, and as `auto` has it there."""

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from tensorport import mxfp4
from tensorport.kernels.attention import cases as attention_cases
from tensorport.kernels.attention.api import attention
from tensorport.kernels.cases import HIDDEN, Case
from tensorport.kernels.dense_moe.api import dense_moe
from tensorport.kernels.linear.api import linear
from tensorport.kernels.mxfp4_expert_matmul import cases as expert_cases
from tensorport.kernels.mxfp4_matmul import cases as matmul_cases
from tensorport.kernels.mxfp4_moe import cases as moe_cases
from tensorport.kernels.write_slots.api import write_slots

array: Any = jax.ShapeDtypeStruct


def lowered(function: Callable[..., Any], platform: str, *args: Any) -> str:
    return str(jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).as_text())


def calls(text: str) -> set[str]:
    """What a program calls besides operations of XLA."""
    return set(re.findall(r"custom_call @([\w.$]+)", text))


MEASURED: dict[str, tuple[tuple[Case, ...], Any]] = {
    "mxfp4.matmul": (matmul_cases.CASES, mxfp4.matmul),
    "mxfp4.expert_matmul": (expert_cases.CASES, mxfp4.expert_matmul),
    "mxfp4.moe": (moe_cases.CASES, mxfp4.moe),
    "attention": (attention_cases.CASES, attention),
    "attention, window": (attention_cases.CASES, partial(attention, sliding_window=128)),
}


def every() -> Iterator[Any]:
    """All shapes by `xla` for TPUs; some as `auto` has them, and for GPUs, which differ in little."""
    for op, (cases, function) in MEASURED.items():
        for index, case in enumerate(cases):
            for platform in ("tpu", "cuda"):
                for implementation in ("xla", "auto"):
                    if (platform, implementation) == ("tpu", "xla") or index % 5 == 1:
                        name = f"{op}: {case.name}, {platform}, {implementation}"
                        yield pytest.param(function, case, platform, implementation, id=name)


@pytest.mark.parametrize(("function", "case", "platform", "implementation"), list(every()))
def test_it_lowers_and_calls_nothing_of_ours(function: Any, case: Case, platform: str, implementation: str) -> None:
    shapes = jax.eval_shape(lambda key: case.arguments(key, jnp.bfloat16), jax.random.key(0))
    assert not calls(lowered(partial(function, implementation=implementation), platform, *shapes))


def test_calls_of_ours_are_seen() -> None:
    shapes = jax.eval_shape(lambda key: moe_cases.CASES[0].arguments(key, jnp.bfloat16), jax.random.key(0))
    assert any("tensorport" in name for name in calls(lowered(mxfp4.moe, "cpu", *shapes)))


X, IDS = array((7, HIDDEN), "bfloat16"), array((7, 4), "int32")
STACK = array((32, 2 * HIDDEN, HIDDEN), "bfloat16"), array((32, HIDDEN, HIDDEN), "bfloat16")
BIASES = array((32, 2 * HIDDEN), "bfloat16"), array((32, HIDDEN), "bfloat16")
DENSE: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "linear": (linear, (X, array((201_088, HIDDEN), "bfloat16"))),
    "dense_moe": (dense_moe, (X, IDS, array((7, 4), "float32"), STACK[0], BIASES[0], STACK[1], BIASES[1])),
    "write_slots": (
        write_slots,
        (array((3, 128, 8, 64), "bfloat16"), array((3, 5, 8, 64), "bfloat16"), array((3, 5), "int32")),
    ),
}


@pytest.mark.parametrize("implementation", ["xla", "auto"])
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("op", DENSE)
def test_dense_ops_lower_for_gpu_and_tpu(op: str, platform: str, implementation: str) -> None:
    function, args = DENSE[op]
    assert not calls(lowered(partial(function, implementation=implementation), platform, *args))
