"""Compiles every kernel through Triton for an H200, at every shape in its cases.py, on a machine that has no GPU.

usage: python tools/compile_kernels.py [bfloat16|float16|float32]...

Finds what lowering alone does not: Triton and ptxas see the kernels here. Needs the environment that gpu_compiler.py
names, and tensorport's dependencies in it; tensorport itself is taken from this checkout, and needs no wheel.
Exit code 1: a kernel does not compile.
"""

# ruff: noqa: E402 - gpu_compiler stands beside this file, and sets the environment before anything imports jax

import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "python")]
from gpu_compiler import array, compile_for_gpu  # isort: skip

import jax
import jax.numpy as jnp
from tensorport.kernels.attention import cases as attention_cases
from tensorport.kernels.attention import pallas_triton as attention
from tensorport.kernels.attention.types import Settings
from tensorport.kernels.mxfp4_expert_matmul import cases as expert_cases
from tensorport.kernels.mxfp4_expert_matmul import pallas_triton as expert_matmul
from tensorport.kernels.mxfp4_matmul import cases as matmul_cases
from tensorport.kernels.mxfp4_matmul import pallas_triton as matmul
from tensorport.kernels.mxfp4_moe import cases as moe_cases
from tensorport.kernels.mxfp4_moe import pallas_triton as moe
from tensorport.kernels.mxfp4_moe.types import Activation
from tensorport.kernels.registry import OPS

KERNELS: dict[str, tuple[Any, Any]] = {
    "mxfp4.matmul": (matmul_cases.CASES, matmul.matmul),
    "mxfp4.expert_matmul": (expert_cases.CASES, expert_matmul.expert_matmul),
    "mxfp4.moe": (moe_cases.CASES, partial(moe.moe, activation=Activation(7.0, 1.702))),
    "attention": (attention_cases.CASES, partial(attention.attention, settings=Settings(0.125, 128))),
}


def main() -> int:
    failed = 0
    for dtype in sys.argv[1:] or ["bfloat16", "float16", "float32"]:
        for op, (cases, compute) in KERNELS.items():
            for case in cases:
                shapes = jax.eval_shape(partial(case.arguments, dtype=jnp.dtype(dtype)), jax.random.key(0))
                inputs = jax.eval_shape(OPS[op].arguments, *shapes)
                try:
                    compile_for_gpu(compute, *jax.tree.map(lambda leaf: array(leaf.shape, leaf.dtype), inputs))
                    told = "compiles"
                except Exception as error:  # all kinds: the other kernels are tried
                    told = f"{type(error).__name__}: {error}"
                    failed += 1
                print(f"{op}, {dtype}, {case.name}: {told}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
