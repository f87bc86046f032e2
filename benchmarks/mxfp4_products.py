"""Products with MXFP4 weights against the same products with dense weights, all by XLA, at the sizes of gpt-oss-20b.

usage: python benchmarks/mxfp4_products.py [--tokens 1 16 256] [--rounds 5] [--only NAME]... [--width 2880]

matmul: x [M, 2880] by one matrix [5760, 2880]. moe: M tokens with 4 of 32 experts each; `dense` is computed by
jax.lax.ragged_dot over tokens sorted by expert, as JAX's own mixtures of experts do it, and for one token by gathering
the four matrices; `dense, chunks` by the algorithm of mxfp4.moe. Activations are bfloat16 beside bfloat16 weights and
float32 beside float32; MXFP4 is run with both.

All variants of a row are run in turn, in another order in each round, after warm-ups (three, or five seconds of them);
medians. `weights GB/s`: bytes of the weights that are touched (of MXFP4: codes and scales) per second. `temporary MB`:
what the compiled function takes beside its arguments and results, by its memory_analysis().
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorport
from tensorport import mxfp4
from tensorport.kernels.grouping import chunk_by_expert, rows_of_chunk

sys.path.insert(0, str(Path(__file__).parent))
import measure

EXPERTS, CHOICES = 32, 4
WARMUPS, WARMUP_S, LEAST_S = 3, 5, 0.2
DTYPES = {"bf16": jnp.bfloat16, "f32": jnp.float32}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 256])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", action="append", help="part of an op's name")
    parser.add_argument("--width", type=int, default=2880, help="of the stream and between the layers of an expert")
    options = parser.parse_args()
    device = jax.devices()[0]
    print(f"{measure.machine()}; {device.platform} ({device.device_kind});")
    print(f"Python {sys.version.split()[0]}, tensorport {tensorport.__version__}, jax {metadata.version('jax')};")
    print(f"width {options.width}, {EXPERTS} experts; medians of {options.rounds} rounds\n")
    print("| op | M | variant | ms | / dense bf16 | / dense f32 | weights MB touched | weights GB/s | temporary MB |")
    print("|---" * 9 + "|")
    rows = []
    for op, make in {"matmul": matmul_variants, "moe": moe_variants}.items():
        if options.only and not any(part in op for part in options.only):
            continue
        variants = make(options.width)
        for tokens in options.tokens:
            calls = {name: variant(tokens) for name, variant in variants.items()}
            times = measure_all(calls, options.rounds)
            medians = {name: statistics.median(values) for name, values in times.items()}
            for name, median_s in medians.items():
                touched = touched_bytes(op, name, tokens, options.width)
                ratios = [f"{median_s / medians[dense]:.2f}" for dense in ("dense bf16", "dense f32")]
                temporary = temporary_bytes(calls[name]) / 1e6
                print(
                    f"| {op} | {tokens} | {name} | {median_s * 1e3:.2f} | {ratios[0]} | {ratios[1]} "
                    f"| {touched / 1e6:.0f} | {touched / median_s / 1e9:.2f} | {temporary:.1f} |",
                    flush=True,
                )
                rows.append({"op": op, "tokens": tokens, "variant": name, "seconds": times[name]})
    print()
    for row in rows:
        print(json.dumps(row))


Call = tuple[Any, tuple[Any, ...]]
"""A jitted function and its arguments."""

Variant = Callable[[int], Call]
"""Makes the call for a number of tokens."""


def matmul_variants(width: int) -> dict[str, Variant]:
    w = random_weights(2 * width, width)

    def variant(function: Callable[..., Any], weights: Any, dtype: Any) -> Variant:
        jitted = jax.jit(function)

        def make(tokens: int) -> Call:
            return jitted, (random_array((tokens, width), dtype), weights)

        return make

    variants = {f"MXFP4, x {name}": variant(mxfp4.matmul, w, dtype) for name, dtype in DTYPES.items()}
    for name, dtype in DTYPES.items():
        variants[f"dense {name}"] = variant(lambda x, w: x @ w.T, w.dequantize(dtype), dtype)
    return variants


def moe_variants(width: int) -> dict[str, Variant]:
    gate_up, down = random_weights(EXPERTS, 2 * width, width), random_weights(EXPERTS, width, width, seed=1)

    def variant(function: Callable[..., Any], gate_up: Any, down: Any, dtype: Any) -> Variant:
        biases = random_array((EXPERTS, 2 * width), dtype), random_array((EXPERTS, width), dtype)
        jitted = jax.jit(function)

        def make(tokens: int) -> Call:
            rng = np.random.default_rng(tokens)
            chosen = jnp.asarray(np.stack([rng.permutation(EXPERTS)[:CHOICES] for _ in range(tokens)]), jnp.int32)
            weights = jax.nn.softmax(random_array((tokens, CHOICES), dtype))
            x = random_array((tokens, width), dtype)
            return jitted, (x, chosen, weights, gate_up, biases[0], down, biases[1])

        return make

    variants = {f"MXFP4, x {name}": variant(mxfp4.moe, gate_up, down, dtype) for name, dtype in DTYPES.items()}
    for name, dtype in DTYPES.items():
        # [E, K, N], as ragged_dot takes them.
        dense = [jax.block_until_ready(w.dequantize(dtype).swapaxes(1, 2)) for w in (gate_up, down)]
        variants[f"dense {name}"] = variant(dense_moe, *dense, dtype)
        variants[f"dense {name}, chunks"] = variant(chunked_dense_moe, *dense, dtype)
    return variants


def dense_moe(  # noqa: PLR0917 - the order of mxfp4.moe
    x: Any, chosen: Any, weights: Any, gate_up: Any, gate_up_bias: Any, down: Any, down_bias: Any
) -> Any:
    tokens, choices = chosen.shape
    experts = chosen.reshape(-1)
    if tokens == 1:
        h = jnp.einsum("h,ehi->ei", x[0], gate_up[experts]) + gate_up_bias[experts]
        y = jnp.einsum("ei,eih->eh", swiglu(h), down[experts]) + down_bias[experts]
        return weights @ y
    order = jnp.argsort(experts)
    sizes = jnp.bincount(experts, length=EXPERTS)
    h = jax.lax.ragged_dot(x[order // choices], gate_up, sizes) + gate_up_bias[experts[order]]
    y = jax.lax.ragged_dot(swiglu(h), down, sizes) + down_bias[experts[order]]
    return jnp.zeros_like(x).at[order // choices].add(y * weights.reshape(-1)[order][:, None])


def chunked_dense_moe(  # noqa: PLR0917 - the order of mxfp4.moe
    x: Any, chosen: Any, weights: Any, gate_up: Any, gate_up_bias: Any, down: Any, down_bias: Any
) -> Any:
    """The algorithm of mxfp4.moe on dense weights."""
    choices, pair_weights = chosen.shape[1], weights.reshape(-1)
    block_m = rows_of_chunk(chosen.size, EXPERTS)
    chunks = chunk_by_expert(chosen.reshape(-1), EXPERTS, block_m)

    def step(number: Any, out: Any) -> Any:
        pair, is_there = chunks.rows(number, block_m)
        expert, token = chunks.expert[number], pair // choices
        h = jnp.dot(x[token], gate_up[expert], preferred_element_type=jnp.float32) + gate_up_bias[expert]
        y = jnp.dot(swiglu(h).astype(x.dtype), down[expert], preferred_element_type=jnp.float32) + down_bias[expert]
        return out.at[token].add(jnp.where(is_there[:, None], y * pair_weights[pair][:, None], 0))

    return jax.lax.fori_loop(0, chunks.total, step, jnp.zeros(x.shape, jnp.float32)).astype(x.dtype)


def swiglu(h: Any) -> Any:
    gate, up = jnp.minimum(h[..., ::2], 7.0), jnp.clip(h[..., 1::2], -7.0, 7.0)
    return gate * jax.nn.sigmoid(1.702 * gate) * (up + 1)


def touched_bytes(op: str, variant: str, tokens: int, width: int) -> float:
    per_value = {"MXFP4": 17 / 32, "dense bf16": 2, "dense f32": 4}[variant.split(",", maxsplit=1)[0]]
    if op == "matmul":
        return 2 * width * width * per_value
    rng = np.random.default_rng(tokens)
    chosen = {int(expert) for _ in range(tokens) for expert in rng.permutation(EXPERTS)[:CHOICES]}
    return len(chosen) * 3 * width * width * per_value


def measure_all(variants: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Seconds of one call of each variant in each round."""
    calls = {}
    for name, (function, args) in variants.items():
        jax.block_until_ready(function(*args))
        first = time.perf_counter()
        for _ in range(WARMUPS):
            started = time.perf_counter()
            jax.block_until_ready(function(*args))
            calls[name] = max(1, int(LEAST_S / (time.perf_counter() - started)))
            if time.perf_counter() - first > WARMUP_S:
                break
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name in random.sample(list(variants), len(variants)):
            function, args = variants[name]
            started = time.perf_counter()
            for _ in range(calls[name]):
                jax.block_until_ready(function(*args))
            times[name].append((time.perf_counter() - started) / calls[name])
    return times


def temporary_bytes(call: Call) -> int:
    function, args = call
    return int(function.lower(*args).compile().memory_analysis().temp_size_in_bytes)


def random_weights(*shape: int, seed: int = 0) -> mxfp4.MXFP4Array:
    rng = np.random.default_rng(seed)
    *leading, k = shape
    blocks = rng.integers(0, 256, (*leading, k // 32, 16), dtype=np.uint8)
    scales = rng.integers(115, 122, (*leading, k // 32), dtype=np.uint8)
    return mxfp4.MXFP4Array(jnp.asarray(blocks), jnp.asarray(scales))


def random_array(shape: tuple[int, ...], dtype: Any) -> Any:
    return jnp.asarray(np.random.default_rng(2).standard_normal(shape), dtype)


if __name__ == "__main__":
    main()
