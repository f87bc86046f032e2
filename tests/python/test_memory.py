"""max_memory bounds the anonymous memory of the process, whatever the size of the tensors."""

import json
import select
import subprocess
import sys
from pathlib import Path

import pytest

MB = 10**6

PROGRAM = """
import sys, tensorport
print("ready", flush=True)
sys.stdin.readline()
tensorport.convert(sys.argv[1], sys.argv[2], precision="bfloat16", mxfp4="dequantize", max_memory=64_000_000,
                   workers=int(sys.argv[3]), progress=False)
print("done", flush=True)
sys.stdin.readline()
"""


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
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(file.tell() + end)


def anonymous_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory from /proc")
@pytest.mark.parametrize(("workers", "rows"), [(4, 100), (48, 40)])
def test_anonymous_memory_stays_below_max_memory(tmp_path: Path, workers: int, rows: int) -> None:
    source = tmp_path / "m.safetensors"
    sparse_checkpoint(source, rows)
    assert source.stat().st_size > rows * 20 * MB
    command = [sys.executable, "-c", PROGRAM, str(source), str(tmp_path / "tree"), str(workers)]
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
    # The workers have buffers, so that the bound is no empty promise; and all of them stay below it.
    assert MB < max(samples) < 64 * MB
