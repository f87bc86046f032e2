"""What a release says of itself is said in one place."""

import importlib.metadata
import importlib.util
import re
import struct
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tensorport

ROOT = Path(__file__).parents[2]


def read_toml(name: str) -> dict[str, Any]:
    return tomllib.loads((ROOT / name).read_text("utf-8"))


@pytest.fixture(scope="module")
def smoke_test() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("smoke_test", ROOT / "tools" / "smoke_test.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(str(ROOT / "tools"))
        spec.loader.exec_module(module)
        yield module


def test_the_version_is_that_of_cargo() -> None:
    cargo, project = read_toml("Cargo.toml"), read_toml("pyproject.toml")
    version = cargo["package"]["version"]
    assert "version" not in project["project"]
    assert "version" in project["project"]["dynamic"]
    assert tensorport.__version__ == importlib.metadata.version("tensorport") == version
    (locked,) = (package for package in read_toml("Cargo.lock")["package"] if package["name"] == "tensorport")
    assert locked["version"] == version


def test_the_changelog_begins_with_the_version() -> None:
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert headings[0] == tensorport.__version__


def test_the_oldest_python_is_the_same_everywhere(smoke_test: ModuleType) -> None:
    oldest = smoke_test.supported_pythons.SUPPORTED[0]
    assert read_toml("pyproject.toml")["project"]["requires-python"] == f">=3.{oldest}"
    assert f"abi3-py3{oldest}" in read_toml("Cargo.toml")["dependencies"]["pyo3"]["features"]
    assert read_toml("pyproject.toml")["tool"]["ruff"]["target-version"] == f"py3{oldest}"


def elf_with(*names: str) -> bytes:
    """An ELF file of section headers and their names, and nothing else."""
    sections = ["", *names, ".shstrtab"]
    table = b"".join(name.encode() + b"\0" for name in sections)
    starts = [sum(len(name) + 1 for name in sections[:index]) for index in range(len(sections))]
    headers = b"".join(struct.pack("<IIQQQQ24x", start, 1, 0, 0, 64, len(table)) for start in starts)
    return struct.pack("<40xQ10xHHH", 64 + len(table), 64, len(sections), len(sections) - 1) + table + headers


@pytest.mark.parametrize(
    ("name", "sections", "fault"),
    [
        ("cp311-abi3-manylinux_2_28_x86_64", [".text"], None),
        ("cp311-abi3-manylinux_2_17_aarch64", [".text"], None),
        ("cp311-abi3-manylinux_2_34_x86_64", [".text"], "expected .*manylinux_2_28 or older"),
        ("cp313-cp313-manylinux_2_28_x86_64", [".text"], "expected .*abi3"),
        ("cp311-abi3-manylinux_2_28_x86_64", [".text", ".symtab"], "not stripped"),
    ],
)
def test_a_wheel_that_is_no_release_is_refused(
    smoke_test: ModuleType, tmp_path: Path, name: str, sections: list[str], fault: str | None
) -> None:
    wheel = tmp_path / f"tensorport-1.2.3-{name}.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in ("py.typed", "_core.pyi", "models/gpt_oss/model.py"):
            archive.writestr(f"tensorport/{file}", "")
        archive.writestr("tensorport/_core.abi3.so", elf_with(*sections))
    if fault is None:
        smoke_test.check_wheel(wheel, "1.2.3")
        return
    with pytest.raises(SystemExit, match=fault):
        smoke_test.check_wheel(wheel, "1.2.3")
