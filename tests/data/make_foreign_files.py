"""Makes foreign/: what other libraries write of one tree of arrays, so that files of these versions stay readable.

usage: python make_foreign_files.py

Needs flax, orbax-checkpoint, safetensors, ml_dtypes and jax; README.md says which versions made what is there.
"""

import pickle
import shutil
from pathlib import Path

import flax.serialization
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import safetensors.numpy

FOLDER = Path(__file__).parent / "foreign"

TREE = {
    "dense": {
        "kernel": np.linspace(-3, 3, 15, dtype=np.float32).reshape(3, 5),
        "bias": np.linspace(-1, 1, 5).astype(np.float16),
    },
    "embedding": np.linspace(-2, 2, 14).reshape(7, 2).astype(ml_dtypes.bfloat16),
    "table": np.linspace(-8, 8, 6).astype(ml_dtypes.float8_e4m3fn),
    "counts": np.arange(4, dtype=np.int64) - 2,
    "mask": np.array([[True], [False]]),
}


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    (FOLDER / "flax.msgpack").write_bytes(flax.serialization.msgpack_serialize(TREE))
    for protocol in (3, 4, 5):
        (FOLDER / f"protocol{protocol}.pkl").write_bytes(pickle.dumps(TREE, protocol=protocol))
    of_jax = {"dense": {name: jnp.asarray(array) for name, array in TREE["dense"].items()}}
    (FOLDER / "jax.pkl").write_bytes(pickle.dumps(of_jax))
    flat = {"dense.kernel": TREE["dense"]["kernel"], "dense.bias": TREE["dense"]["bias"]}
    flat |= {name: array for name, array in TREE.items() if name not in {"dense", "table"}}
    safetensors.numpy.save_file(flat, FOLDER / "model.safetensors", {"format": "np"})
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(FOLDER / "orbax", TREE)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as plain:
        plain.save(FOLDER / "orbax_plain", TREE)
    # It names the folder of whoever runs this.
    for note in FOLDER.rglob("commit_success.txt"):
        note.unlink()
    np.savez(
        FOLDER / "expected.npz",
        **{name: array.reshape(-1).view(np.uint8) for name, array in flat.items()},
        table=TREE["table"].view(np.uint8),
    )


if __name__ == "__main__":
    main()
