"""One job of formats.py: writes or reads one format, and prints how long that took.

usage: python formats_job.py write|read cp|tensorport|library FORMAT SOURCE OUTPUT
"""

# ruff: noqa: PLC0415 - a job imports what it measures, and nothing else

import json
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_with_library(name: str, output: Path) -> Callable[[dict[str, Any]], None]:
    """What writes arrays as the library does, with its imports done."""
    if name == "numpy-direct":
        import numpy as np

        def write(arrays: dict[str, Any]) -> None:
            for key, array in arrays.items():
                np.save(output / f"{key}.npy", array)
    elif name == "msgpack":
        from flax.serialization import msgpack_serialize

        def write(arrays: dict[str, Any]) -> None:
            (output / "params.msgpack").write_bytes(msgpack_serialize(arrays, in_place=True))
    elif name == "jax-pickle":

        def write(arrays: dict[str, Any]) -> None:
            with (output / "params.pkl").open("wb") as file:
                pickle.dump(arrays, file, protocol=5)
    elif name == "safetensors":
        import jax
        from safetensors.flax import save_file

        jax.device_put(0)

        def write(arrays: dict[str, Any]) -> None:
            save_file({key: jax.device_put(array) for key, array in arrays.items()}, output / "model.safetensors")
    else:
        import orbax.checkpoint as ocp

        checkpointer = ocp.StandardCheckpointer()

        def write(arrays: dict[str, Any]) -> None:
            checkpointer.save(output / "orbax", arrays)
            checkpointer.wait_until_finished()

    return write


def read_with_library(name: str, output: Path) -> Any:
    """Arrays as the library reads them."""
    import ml_dtypes
    import numpy as np

    if name == "numpy-direct":
        arrays = {file.stem: np.load(file, mmap_mode="r") for file in output.glob("*.npy")}
        return {key: array.view(ml_dtypes.bfloat16) if array.dtype == "V2" else array for key, array in arrays.items()}
    if name == "msgpack":
        from flax.serialization import msgpack_restore

        return msgpack_restore((output / "params.msgpack").read_bytes())
    if name == "jax-pickle":
        with (output / "params.pkl").open("rb") as file:
            return pickle.load(file)
    if name == "safetensors":
        from safetensors.flax import load_file

        return load_file(output / "model.safetensors")
    import orbax.checkpoint as ocp

    return ocp.StandardCheckpointer().restore(output / "orbax")


def main() -> None:
    action, writer, name, source, output = sys.argv[1:]
    folder = Path(output)
    if writer == "cp":
        started = time.perf_counter()
        if action == "write":
            subprocess.run(["cp", "-r", source, output], check=True)
        else:
            subprocess.run(["cp", "-r", output, f"{output}-copy"], check=True)
        seconds = time.perf_counter() - started
        subprocess.run(["rm", "-rf", f"{output}-copy"], check=True)
    elif action == "write":
        import tensorport

        if writer == "tensorport":
            started = time.perf_counter()
            tensorport.convert(source, output, format=name, verify=False, progress=False)  # type: ignore[arg-type]
        else:
            folder.mkdir()
            arrays = dict(tensorport.open(source))
            write = write_with_library(name, folder)
            started = time.perf_counter()
            write(arrays)
        seconds = time.perf_counter() - started
    else:
        import jax
        import tensorport

        jax.block_until_ready(jax.jit(lambda x: x + 1)(1))
        if name == "orbax":
            import orbax.checkpoint  # noqa: F401 - not what is timed
        total = jax.jit(lambda arrays: sum(array.astype("float32").sum() for array in jax.tree.leaves(arrays)))
        started = time.perf_counter()
        if writer == "tensorport":
            arrays = tensorport.load_params(output, mxfp4="raw", nested=False)
        else:
            arrays = jax.device_put(read_with_library(name, folder))
        # Each by itself: compiling is not what is timed, but all have as much of it.
        jax.block_until_ready([total([array]) for array in arrays.values()])
        seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main()
