"""What the tests of output formats share: the formats, a checkpoint with everything in it, and trees as bytes."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from conftest import SAFETENSORS_DTYPES

Format = Literal["numpy-direct", "msgpack", "jax-pickle", "safetensors", "orbax"]

FORMATS: tuple[Format, ...] = ("numpy-direct", "msgpack", "jax-pickle", "safetensors", "orbax")

# Orbax has folders for names and no empty arrays.
TAKE_ANY_TENSOR = FORMATS[:-1]

# Tag of safetensors, shape, bytes.
RawTensor = tuple[str, tuple[int, ...], bytes]

# 300 bytes: several files of several tensors, and tensors that are beyond it.
SMALL_SHARDS = 300e-9


def raw(tag: str, shape: tuple[int, ...], seed: int) -> RawTensor:
    """Random bytes, those of bools 0 and 1. No float of two bytes or more is NaN, infinite or beyond float16."""
    nbytes = math.prod(shape) * SAFETENSORS_DTYPES[tag][1] // 8
    content = np.random.default_rng(seed).integers(0, 2 if tag == "BOOL" else 256, nbytes, np.uint8)
    if tag in {"BF16", "F16", "F32", "F64"}:
        values = np.random.default_rng(seed).normal(size=math.prod(shape))
        content = values.astype(SAFETENSORS_DTYPES[tag][0]).view(np.uint8)
    return tag, shape, content.tobytes()


def everything() -> dict[str, RawTensor]:
    """Every dtype and many ranks, scalars and an MXFP4 pair; sizes that are multiples of 64 and others, in no order."""
    tensors = {f"dtypes.{tag}": raw(tag, (3, 8), seed) for seed, tag in enumerate(SAFETENSORS_DTYPES)}
    tensors |= {
        "scalars.f32": raw("F32", (), 30),
        "scalars.bf16": raw("BF16", (), 31),
        "scalars.i64": raw("I64", (), 32),
        "scalars.bool": raw("BOOL", (), 33),
        "one": raw("U8", (1,), 34),
        "model.layers.0.w": raw("BF16", (7, 32), 35),
        "model.layers.1.w": raw("F32", (17, 5), 36),
        "model.layers.1.deep": raw("I16", (4, 3, 2, 5, 1), 37),
        "model.mlp_blocks": raw("U8", (5, 2, 16), 38),
        "model.mlp_scales": ("U8", (5, 2), bytes(range(118, 128))),
        "model.long": raw("F16", (501,), 39),
        "model.norm": raw("F64", (11,), 40),
        "model.matrix": raw("F32", (6, 64), 41),
    }
    return tensors


def empty() -> dict[str, RawTensor]:
    """Tensors without elements."""
    return {"empty.a": ("F32", (0, 9), b""), "empty.b": ("BF16", (3, 0, 2), b""), "empty.c": ("F4", (0,), b"")}


def as_arrays(tensors: Mapping[str, RawTensor]) -> dict[str, np.ndarray[Any, Any]]:
    """The tensors as every format of arrays stores them: float4 and float6 as flat bytes."""

    def array(tag: str, shape: tuple[int, ...], content: bytes) -> np.ndarray[Any, Any]:
        dtype, bits = SAFETENSORS_DTYPES[tag]
        if bits < 8:
            return np.frombuffer(content, np.uint8)
        return np.frombuffer(content, dtype).reshape(shape)

    return {name: array(*tensor) for name, tensor in tensors.items()}


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a tree, by its path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def manifest(tree: Path) -> dict[str, Any]:
    """The manifest of a tree."""
    content: dict[str, Any] = json.loads((tree / "manifest.json").read_bytes())
    return content
