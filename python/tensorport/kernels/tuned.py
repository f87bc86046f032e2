"""Settings that were measured to be the fastest: a table, which `benchmarks/gpu_tune.py` writes and kernels look into.

```text
tuned.json: {kind of a device: {"date", "versions", "settings": {bucket: {"config", "us", "untuned_us"}}}}
bucket:     an op, a dtype and sizes, some of them up to a power of two: "mxfp4.matmul bfloat16 m<=4 n=5760 k=2880"
```

What is not in the table has the settings of a rule in the op's `configs.py`. Calling a kernel never tunes anything.
"""

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from importlib import resources
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from tensorport.kernels.registry import Device

__all__ = ["Asked", "find", "forced"]


class Asked(NamedTuple):
    """What a kernel asked the table for."""

    bucket: str
    sizes: dict[str, int]


class _Forced(NamedTuple):
    op: str
    config: Mapping[str, int] | None
    asked: list[Asked]


_FORCED: ContextVar[_Forced | None] = ContextVar("forced", default=None)


def find(op: str, dtype: DTypeLike, *, up_to: Mapping[str, int], **exact: int) -> Mapping[str, int] | None:
    """The fields of a config for this device; None where nothing was measured.

    Args:
        op: its name in the registry.
        dtype: of the activations.
        up_to: sizes that count up to the next power of two, such as rows.
        exact: sizes that a model has once and for all.
    """
    sizes = [f"{name}<={1 << max(size - 1, 0).bit_length()}" for name, size in up_to.items()]
    sizes += [f"{name}={size}" for name, size in exact.items()]
    bucket = " ".join([op, jnp.dtype(dtype).name, *sizes])
    forced = _FORCED.get()
    if forced is not None and forced.op == op:
        forced.asked.append(Asked(bucket, {**up_to, **exact}))
        return forced.config
    row = table().get(Device.of().kind, {}).get("settings", {}).get(bucket)
    return None if row is None else row["config"]


@functools.cache
def table() -> dict[str, Any]:
    """All that was measured."""
    content: dict[str, Any] = json.loads(
        resources.files("tensorport.kernels").joinpath("tuned.json").read_text("utf-8")
    )
    return content


@contextlib.contextmanager
def forced(op: str, config: Mapping[str, int] | None) -> Iterator[list[Asked]]:
    """What `op` finds while it is traced: this config, or that of its rule for None. Gives what it asked for."""
    asked: list[Asked] = []
    token = _FORCED.set(_Forced(op, config, asked))
    try:
        yield asked
    finally:
        _FORCED.reset(token)
