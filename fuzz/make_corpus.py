"""Writes the seeds of the fuzzers into corpus/: what the project itself writes, and the malformed corpus of the tests.

usage: python fuzz/make_corpus.py      (needs tensorport installed)
"""

import pickle
import shutil
import tempfile
from pathlib import Path

import flax.serialization
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import tensorport
from safetensors.numpy import save_file

HERE = Path(__file__).parent
MALFORMED = HERE.parent / "tests" / "data" / "malformed"


def write(target: str, name: str, content: bytes) -> None:
    """Stores one seed."""
    folder = HERE / "corpus" / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)


def write_arrays() -> None:
    """Files of arrays by the libraries that readers of msgpack and pickle have to understand."""
    arrays = {"a": {"b": np.arange(6, dtype=np.float32).reshape(2, 3)}, "c": np.ones(5, ml_dtypes.bfloat16)}
    write("msgpack_file", "flax", flax.serialization.msgpack_serialize(arrays))
    largest, flax.serialization.MAX_CHUNK_SIZE = flax.serialization.MAX_CHUNK_SIZE, 8
    write("msgpack_file", "chunks", flax.serialization.msgpack_serialize(arrays))
    flax.serialization.MAX_CHUNK_SIZE = largest
    for protocol in (3, 4, 5):
        write("pickle_file", f"numpy_{protocol}", pickle.dumps(arrays, protocol=protocol))
    write("pickle_file", "jax", pickle.dumps({"a": jnp.arange(3)}))


def main() -> None:
    """Makes all corpora anew."""
    shutil.rmtree(HERE / "corpus", ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        source, tree = Path(folder) / "m.safetensors", Path(folder) / "tree"
        tensors = {"a.b": np.arange(6, dtype=np.float32).reshape(2, 3), "c": np.zeros((0, 5), np.int8)}
        save_file(tensors, source, metadata={"format": "np"})
        journal = b""

        def watch(event: tensorport.ProgressEvent) -> None:
            nonlocal journal
            if event.phase == "verify":
                journal = (tree / "journal.jsonl").read_bytes()

        tensorport.convert(source, tree, progress=watch)
        for format, file in (("msgpack", "shard_000.msgpack"), ("jax-pickle", "shard_000.pkl")):
            tensorport.convert(source, Path(folder) / format, format=format, progress=False)
            target = "msgpack_file" if format == "msgpack" else "pickle_file"
            write(target, "ours", (Path(folder) / format / file).read_bytes())
        write("safetensors_file", "valid", source.read_bytes())
        length = int.from_bytes(source.read_bytes()[:8], "little")
        write("header", "valid", source.read_bytes()[8 : 8 + length])
        write("manifest", "valid", (tree / "manifest.json").read_bytes())
        write("journal", "valid", journal)
        save_file({"a.weight": np.arange(64, dtype=np.float32).reshape(2, 32) / 7}, source)
        tree = Path(folder) / "quantized"
        tensorport.convert(source, tree, mxfp4="quantize", quantize="*", progress=watch)
        write("manifest", "quantized", (tree / "manifest.json").read_bytes())
        write("journal", "quantized", journal)
    write_arrays()
    write(
        "index",
        "valid",
        b'{"metadata": {"total_size": 24}, "weight_map": {"a.b": "m.safetensors", "c": "n.safetensors"}}',
    )
    for number, seed in enumerate(
        [b"\x11\x00\x00\x05\x00\x03", b"\x01\x01\x00\x06\x00\x02", b"\x0e\x00", b"\x02\x03\x00\x04"]
    ):
        write("npy_header", f"seed{number}", seed)
    for file in sorted(MALFORMED.glob("*.safetensors")):
        if file.is_file():
            content = file.read_bytes()
            write("safetensors_file", file.stem, content)
            write("header", file.stem, content[8:])
    for file in sorted(MALFORMED.glob("*/*.index.json")):
        if file.is_file():
            write("index", file.parent.name, file.read_bytes())


if __name__ == "__main__":
    main()
