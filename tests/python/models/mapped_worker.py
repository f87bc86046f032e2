"""A process of its own that decodes with mapped weights; test_gpt_oss_memory.py starts it.

It stands between XLA and the native handlers: what it notes is what they are called with. Argument: a folder that
`convert` wrote. Prints JSON: `weights_bytes`, `mapped_bytes`; `in_file` and `handed_over`, by parameter; `grown_bytes`,
by which anonymous memory grew at most in the calls of all steps, and behind the last; `chosen`, the tokens.
"""

import ctypes
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from tensorport import _core
from tensorport.models import gpt_oss

STEPS = 5
PROMPT = [[3, 1, 4, 1, 5, 9, 2, 6]]

# Offsets in XLA_FFI_CallFrame, XLA_FFI_Buffer and XLA_FFI_Extension_Base, and a type of those: src/ffi/abi.rs.
EXTENSION, ARG_COUNT, ARG_BUFFERS = 8, 56, 72
DATA = 24
EXTENSION_TYPE, METADATA = 8, 1

HANDLER = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)


def word(address: int) -> int:
    return ctypes.c_uint64.from_address(address).value


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


class Watch:
    """Addresses of the arguments of all calls, and the most anonymous memory in one."""

    def __init__(self) -> None:
        self.addresses: set[int] = set()
        self.peak_bytes = 0
        self._kept: list[Any] = []

    def begin(self) -> None:
        self.addresses.clear()
        self.peak_bytes = 0

    def around(self, handler: Any) -> Any:
        """A handler that has its call noted, and then calls the given one."""
        pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
        pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        original = HANDLER(pointer_of(handler, None))

        def call(frame: int) -> Any:
            extension = word(frame + EXTENSION)
            if not (extension and ctypes.c_int.from_address(extension + EXTENSION_TYPE).value == METADATA):
                buffers = word(frame + ARG_BUFFERS)
                self.addresses.update(word(word(buffers + 8 * i) + DATA) for i in range(word(frame + ARG_COUNT)))
                self.peak_bytes = max(self.peak_bytes, anonymous_bytes())
            return original(frame)

        watched = HANDLER(call)
        self._kept.append(watched)
        return jax.ffi.pycapsule(ctypes.cast(watched, ctypes.c_void_p).value)


def mapped_ranges(folder: Path) -> list[tuple[int, int]]:
    """Addresses at which this process maps the files of a folder."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    places = [line.split()[0] for line in lines if f" {folder.resolve()}/" in line]
    return [(int(start, 16), int(stop, 16)) for start, stop in (place.split("-") for place in places)]


def main(folder: Path) -> None:
    watch = Watch()
    targets = {name: watch.around(handler) for name, handler in _core.ffi_targets().items()}
    _core.ffi_targets = lambda: targets
    config = gpt_oss.load_config(folder)
    params, report = gpt_oss.load_model_params(folder, config, dtype="bfloat16")
    forward = jax.jit(partial(gpt_oss.forward, config=config), donate_argnames="cache")
    cache: Any = gpt_oss.empty_cache(config, 1, 80, dtype="bfloat16")
    chosen: list[int] = []

    def step(tokens: Any) -> Any:
        nonlocal cache
        logits, cache = forward(params, tokens=tokens, cache=cache)
        token = jnp.argmax(logits[:, -1:], axis=-1)
        chosen.append(int(token[0, 0]))
        return token

    # What compiling takes is not what a step takes.
    token = step(step(jnp.asarray(PROMPT)))
    watch.begin()
    before = anonymous_bytes()
    for _ in range(STEPS):
        token = step(token)
    after = anonymous_bytes()

    ranges = mapped_ranges(folder)
    in_file, handed_over = {}, {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name, first = jax.tree_util.keystr(path, simple=True, separator="."), leaf.unsafe_buffer_pointer()
        in_file[name] = any(start <= first and first + leaf.nbytes <= stop for start, stop in ranges)
        handed_over[name] = first in watch.addresses
    told = {"weights_bytes": report.nbytes, "mapped_bytes": report.mapped_bytes, "chosen": chosen}
    told |= {"in_file": in_file, "handed_over": handed_over}
    print(json.dumps(told | {"grown_bytes": [watch.peak_bytes - before, after - before]}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
