"""max_memory bounds the anonymous memory of the process, whatever the number of workers and the size of the tensors."""

import json
import select
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads the memory from /proc")

MB = 10**6

PROGRAM = """
import json, sys, tensorport
print("ready", flush=True)
sys.stdin.readline()
tensorport.convert(sys.argv[1], sys.argv[2], max_memory=64_000_000, progress=False, **json.loads(sys.argv[3]))
print("done", flush=True)
sys.stdin.readline()
"""


def write_checkpoint(path: Path, header: str, data_bytes: int) -> None:
    """Data that takes no room: zeros that no block of the disk holds."""
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode("ascii"))
        file.truncate(file.tell() + data_bytes)


def sparse_checkpoint(path: Path, rows: int) -> None:
    """20 MB a row that take no room: a cast, a decode and a copy."""
    header, end = {}, 0
    for name, dtype, shape, nbytes in (
        ("cast", "F64", [rows, 2_200_000], rows * 17_600_000),
        ("copied", "I64", [rows, 250_000], rows * 2_000_000),
        ("decoded_blocks", "U8", [rows, 25_000, 16], rows * 400_000),
        ("decoded_scales", "U8", [rows, 25_000], rows * 25_000),
    ):
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
    write_checkpoint(path, json.dumps(header), end)


def anonymous_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def anonymous_while_converting(source: Path, output: Path, **options: object) -> list[int]:
    """Anonymous bytes of a process that converts, beyond what it had before: many samples."""
    command = [sys.executable, "-c", PROGRAM, str(source), str(output), json.dumps(options)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        idle, samples = anonymous_bytes(process.pid), []
        process.stdin.write("go\n")
        process.stdin.flush()
        while not select.select([process.stdout], [], [], 0.002)[0]:
            samples.append(anonymous_bytes(process.pid) - idle)
        assert process.stdout.readline() == "done\n"
        process.stdin.write("end\n")
    assert process.returncode == 0
    assert len(samples) > 50
    return samples


@pytest.mark.parametrize(("workers", "rows"), [(1, 30), (2, 60), (8, 60), (64, 40)])
def test_anonymous_memory_stays_below_max_memory(tmp_path: Path, workers: int, rows: int) -> None:
    source = tmp_path / "m.safetensors"
    sparse_checkpoint(source, rows)
    assert source.stat().st_size > rows * 20 * MB
    options = {"precision": "bfloat16", "mxfp4": "dequantize", "workers": workers}
    samples = anonymous_while_converting(source, tmp_path / "tree", **options)
    # The workers have buffers, so that the bound is no empty promise; and all of them stay below it.
    assert 0.3 * MB < max(samples) < 64 * MB


@pytest.mark.parametrize("workers", [1, 64])
def test_anonymous_memory_stays_below_max_memory_while_quantizing(tmp_path: Path, workers: int) -> None:
    source = tmp_path / "m.safetensors"
    header = {
        "wide": {"dtype": "F64", "shape": [200, 320_000], "data_offsets": [0, 512_000_000]},
        "narrow": {"dtype": "BF16", "shape": [40, 500, 3200], "data_offsets": [512_000_000, 640_000_000]},
    }
    write_checkpoint(source, json.dumps(header), 640 * MB)
    samples = anonymous_while_converting(
        source, tmp_path / "tree", mxfp4="quantize", quantize="*", workers=workers, shard_size=0.01
    )
    assert 0.3 * MB < max(samples) < 64 * MB


FILES_OF_A_LARGE_TENSOR = {
    "numpy-direct": ("large.part*.npy", 3),
    "msgpack": ("shard_000.msgpack", 1),
    "jax-pickle": ("shard_000.pkl", 1),
    "safetensors": ("model-00001-of-00001.safetensors", 1),
    # Chunks of a row of 250 MB.
    "orbax": ("large/*.0", 5),
}


@pytest.mark.parametrize("name", FILES_OF_A_LARGE_TENSOR)
def test_a_tensor_of_five_gigabytes_takes_no_more_than_others(tmp_path: Path, name: str) -> None:
    source = tmp_path / "m.safetensors"
    header = {"large": {"dtype": "F64", "shape": [5, 125_000_000], "data_offsets": [0, 5_000 * MB]}}
    write_checkpoint(source, json.dumps(header), 5_000 * MB)
    options = {"format": name, "precision": "float16", "shard_size": 0.7, "verify": False}
    samples = anonymous_while_converting(source, tmp_path / "tree", **options)
    assert max(samples) < 64 * MB
    files, count = FILES_OF_A_LARGE_TENSOR[name]
    assert len(list((tmp_path / "tree").rglob(files))) == count
    shutil.rmtree(tmp_path / "tree")


def test_a_header_of_100_mb_takes_a_few_times_its_size(tmp_path: Path) -> None:
    source = tmp_path / "m.safetensors"
    entry = '"model.layers.%d.mlp.experts.%d.weight":{"dtype":"F32","shape":[1,1],"data_offsets":[%d,%d]}'
    tensors = 930_000
    header = "{" + ",".join([entry % (i % 97, i, 4 * i, 4 * i + 4) for i in range(tensors)]) + "}"
    assert 95 * MB < len(header) <= 100 * MB
    write_checkpoint(source, header, 4 * tensors)
    samples = anonymous_while_converting(source, tmp_path / "tree", include=["*.77.weight"])
    assert max(samples) < 64 * MB + 4 * len(header)
    assert len(list((tmp_path / "tree").rglob("*.npy"))) == 1
