"""Installs the wheels and the sdist of dist/ as a user would, and uses what was installed.

Every supported Python of the machine gets a virtual environment of its own with the wheel for this processor, first
with nothing but what the package needs, then with the extras `jax` and `text`; and another one with the sdist, which
cargo builds. Nothing of the checkout is imported: all runs in temporary folders.
"""

import argparse
import json
import os
import platform
import re
import struct
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path

import supported_pythons

ROOT = Path(__file__).parents[1]
OLDEST_GLIBC = 2, 28
"""What wheels may ask for at most: glibc of Debian 10, of RHEL 8 and of all that came later."""

# Runs with what the package needs and no more. Argument: the version that is expected.
WITHOUT_JAX = """
import importlib.metadata, importlib.util, sys
import numpy as np
import tensorport

assert "site-packages" in tensorport.__file__, tensorport.__file__
assert tensorport.__version__ == importlib.metadata.version("tensorport") == sys.argv[1], tensorport.__version__
assert importlib.util.find_spec("jax") is None
source = tensorport.synthesize("model", "tiny", progress=False)
report = tensorport.convert(source, "converted", precision="float32", progress=False)
assert tensorport.verify("converted", source, progress=False).ok
before, after = tensorport.open(source), tensorport.open("converted")
assert list(before) == list(after)
name = "model.norm.weight"
assert after[name].dtype == np.float32
assert np.array_equal(before[name].astype(np.float32), after[name])
"""

WITH_JAX = """
import jax, numpy as np
import tensorport
from tensorport import mxfp4

params = tensorport.load_params("model")
assert np.array_equal(params["model"]["norm"]["weight"], tensorport.open("model")["model.norm.weight"])
w = params["model"]["layers"]["0"]["mlp"]["experts"]["gate_up_proj"][0]
x = jax.random.normal(jax.random.key(0), (3, w.shape[-1]))
expected = np.asarray(x, np.float64) @ np.asarray(w.dequantize("float32"), np.float64).T
assert np.allclose(mxfp4.matmul(x, w), expected, rtol=1e-4, atol=1e-4)
assert tensorport.kernels.explain(mxfp4.matmul, x, w).implementation == "native"
result = tensorport.load_model("model").generate("The first", max_new_tokens=5, ignore_eos=True, stats=True)
assert len(result.ids) == 5, result
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Runs a program without what the environment says of Python, and returns what it printed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    job = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    if job.returncode:
        sys.exit(f"{' '.join(map(str, command))[:200]}: exit status {job.returncode}\n{job.stdout}{job.stderr}")
    return job.stdout


def section_names(elf: bytes) -> set[str]:
    """Names of the sections of a 64-bit little-endian ELF file; its header and section headers are those of elf(5)."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names_index = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + index * size) for index in range(count)]
    *_, offset, nbytes = headers[names_index]
    names = elf[offset : offset + nbytes]
    return {names[start : names.index(b"\0", start)].decode() for start, *_ in headers}


def check_wheel(wheel: Path, version: str) -> None:
    """The tags in the name, what stands in the wheel, and that its extension has no table of symbols."""
    tags = re.fullmatch(rf"tensorport-{re.escape(version)}-cp311-abi3-manylinux_(\d+)_(\d+)_\w+\.whl", wheel.name)
    if tags is None or (int(tags[1]), int(tags[2])) > OLDEST_GLIBC:
        sys.exit(f"{wheel.name}: expected tensorport-{version}-cp311-abi3-manylinux_2_28 or older")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        extension = archive.read("tensorport/_core.abi3.so")
    for wanted in ("tensorport/py.typed", "tensorport/_core.pyi", "tensorport/models/gpt_oss/model.py"):
        if wanted not in names:
            sys.exit(f"{wheel.name}: expected {wanted} in it")
    if {".symtab", ".debug_info"} & section_names(extension):
        sys.exit(f"{wheel.name}: the extension is not stripped")
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, {len(names)} files, stripped")


def check_installed(python: str, package: Path, version: str, *, with_jax: bool) -> None:
    """Installs a wheel or the sdist into a new virtual environment, and uses it."""
    with tempfile.TemporaryDirectory(prefix="tensorport-smoke-") as name:
        folder = Path(name)
        run(python, "-m", "venv", "venv", cwd=folder)
        bin_ = folder / "venv" / "bin"
        run(bin_ / "pip", "install", "--quiet", package, cwd=folder)
        run(bin_ / "python", "-I", "-W", "error", "-c", WITHOUT_JAX, version, cwd=folder)
        printed = run(bin_ / "tensorport", "--version", cwd=folder).strip()
        if printed != f"tensorport {version} (Python package)":
            sys.exit(f"tensorport --version: found {printed!r}")
        run(
            bin_ / "tensorport",
            "convert",
            "--input",
            "model",
            "--output",
            "by-cli",
            "--format",
            "safetensors",
            cwd=folder,
        )
        run(bin_ / "tensorport", "verify", "--model", "by-cli", "--source", "model", cwd=folder)
        inspected = json.loads(run(bin_ / "tensorport", "inspect", "by-cli", "--json", cwd=folder))
        if not inspected:
            sys.exit("tensorport inspect --json: found nothing")
        if with_jax:
            run(bin_ / "pip", "install", "--quiet", f"{package}[jax,text]", cwd=folder)
            run(bin_ / "python", "-I", "-W", "error", "-c", WITH_JAX, cwd=folder)
        told = run(bin_ / "python", "-c", "import sys; print(sys.version.split()[0])", cwd=folder).strip()
    print(f"{package.name} on Python {told}: works{', with JAX too' if with_jax else ''}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="folder of the wheels and the sdist")
    parser.add_argument("--skip-jax", action="store_true", help="do not install JAX: half a gigabyte for each Python")
    arguments = parser.parse_args()
    version = tomllib.loads((ROOT / "Cargo.toml").read_text("utf-8"))["package"]["version"]
    wheels = sorted(arguments.dist.resolve().glob("tensorport-*.whl"))
    sdist = arguments.dist.resolve() / f"tensorport-{version}.tar.gz"
    here = [wheel for wheel in wheels if wheel.stem.endswith(platform.machine())]
    if len(here) != 1 or not sdist.is_file():
        sys.exit(
            f"{arguments.dist}: expected one wheel for {platform.machine()} and {sdist.name}; `make wheel` makes them"
        )
    for wheel in wheels:
        check_wheel(wheel, version)
    pythons = [python for minor in supported_pythons.SUPPORTED if (python := supported_pythons.find(minor))]
    for python in pythons:
        check_installed(python, here[0], version, with_jax=not arguments.skip_jax)
        check_installed(python, sdist, version, with_jax=False)


if __name__ == "__main__":
    main()
