"""manifest.json of a converted tree against what other libraries compute."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tensorport
import xxhash
from numpy.typing import NDArray
from safetensors.numpy import load_file

OPTIONS: dict[str, Any] = {"precision": "float32", "shard_size": 0.00015, "include": ["*"], "exclude": ["*router*"]}


@pytest.fixture(scope="module")
def converted(golden_hf: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tensorport.ConversionReport]:
    tree = tmp_path_factory.mktemp("manifest") / "tree"
    return tree, tensorport.convert(golden_hf, tree, progress=False, **OPTIONS)


@pytest.fixture(scope="module")
def manifest(converted: tuple[Path, tensorport.ConversionReport]) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((converted[0] / "manifest.json").read_text("utf-8"))
    return content


@pytest.fixture(scope="module")
def source(golden_hf: Path) -> dict[str, NDArray[Any]]:
    """What the safetensors library reads of the tensors that are selected."""
    arrays = {
        name: array for file in sorted(golden_hf.glob("*.safetensors")) for name, array in load_file(file).items()
    }
    return {name: array for name, array in arrays.items() if "router" not in name}


def test_it_names_its_format_options_and_metadata(
    converted: tuple[Path, tensorport.ConversionReport], manifest: dict[str, Any]
) -> None:
    assert (manifest["format"], manifest["format_version"]) == ("numpy-direct", 1)
    assert manifest["tensorport_version"] == tensorport.__version__
    assert manifest["options"] == {"format": "numpy-direct", "mxfp4": "keep", "on_overflow": "error", **OPTIONS}
    assert converted[1].options == manifest["options"]
    assert manifest["metadata"] == {"format": "pt"}


def test_it_has_no_field_that_could_vary_between_runs(manifest: dict[str, Any]) -> None:
    documented = (
        "format format_version tensorport_version source options total_tensors total_parameters stored_elements"
    )
    documented += " total_bytes metadata shards side_files tensors manifest_xxh3_128"
    assert list(manifest) == documented.split()
    fields = [
        "files",
        "offsets",
        "part_nbytes",
        "shape",
        "dtype",
        "source_dtype",
        "nbytes",
        "xxh3_128",
        "part_xxh3_128",
        "overflow",
        "underflow",
    ]
    assert all(list(info) == fields for info in manifest["tensors"].values())


def test_its_own_hash_covers_the_text_before_it(
    converted: tuple[Path, tensorport.ConversionReport], manifest: dict[str, Any]
) -> None:
    text = (converted[0] / "manifest.json").read_bytes()
    covered, key, rest = text.rpartition(b'  "manifest_xxh3_128": ')
    assert key
    assert rest == f'"{xxhash.xxh3_128_hexdigest(covered)}"\n}}\n'.encode()
    assert manifest["manifest_xxh3_128"] == xxhash.xxh3_128_hexdigest(covered)


def test_the_sources_fingerprint_is_that_of_its_headers(manifest: dict[str, Any], golden_hf: Path) -> None:
    fingerprints = []
    for file in sorted(golden_hf.glob("*.safetensors")):
        content = file.read_bytes()
        header = content[: 8 + int.from_bytes(content[:8], "little")]
        hashed = xxhash.xxh3_128_hexdigest(header)
        fingerprints.append({"name": file.name, "nbytes": len(content), "header_xxh3_128": hashed})
    assert manifest["source"] == {"files": fingerprints}


def test_every_tensor_has_the_hash_size_and_place_of_its_data(
    converted: tuple[Path, tensorport.ConversionReport], manifest: dict[str, Any], source: dict[str, NDArray[Any]]
) -> None:
    tree = converted[0]
    assert set(manifest["tensors"]) == set(source)
    split = 0
    for name, array in source.items():
        info = manifest["tensors"][name]
        data = array.astype(np.float32 if array.dtype == ml_dtypes.bfloat16 else array.dtype).tobytes()
        assert info["xxh3_128"] == xxhash.xxh3_128_hexdigest(data)
        assert (info["nbytes"], sum(info["part_nbytes"])) == (len(data), len(data))
        assert info["shape"] == list(array.shape)
        assert info["source_dtype"] == array.dtype.name
        assert info["dtype"] == ("uint8" if array.dtype == np.uint8 else "float32")
        assert (info["overflow"], info["underflow"]) == (0, 0)
        parts = zip(info["files"], info["offsets"], info["part_nbytes"], strict=True)
        assert b"".join((tree / file).read_bytes()[offset:][:nbytes] for file, offset, nbytes in parts) == data
        split += len(info["files"]) > 1
    assert 0 < split < len(source)


def test_shards_list_what_is_in_their_folders(
    converted: tuple[Path, tensorport.ConversionReport], manifest: dict[str, Any]
) -> None:
    folders = {folder.name: {file.name for file in folder.iterdir()} for folder in converted[0].glob("shard_*")}
    listed = [file for info in manifest["tensors"].values() for file in info["files"]]
    assert sorted(listed) == sorted(f"{shard}/{file}" for shard, files in folders.items() for file in files)
    assert list(manifest["shards"]) == sorted(folders)
    assert len(folders) > 1
    for shard, files in folders.items():
        assert manifest["shards"][shard]["files"] == len(files)
        nbytes = sum(
            part_nbytes
            for info in manifest["tensors"].values()
            for file, part_nbytes in zip(info["files"], info["part_nbytes"], strict=True)
            if file.startswith(f"{shard}/")
        )
        assert manifest["shards"][shard]["nbytes"] == nbytes <= 150_000


def test_totals_count_mxfp4_values_once_and_scales_apart(
    converted: tuple[Path, tensorport.ConversionReport], manifest: dict[str, Any], source: dict[str, NDArray[Any]]
) -> None:
    report = converted[1]
    codes = sum(2 * array.size for name, array in source.items() if name.endswith("_blocks"))
    scales = sum(array.size for name, array in source.items() if name.endswith("_scales"))
    plain = sum(array.size for name, array in source.items() if not name.endswith(("_blocks", "_scales")))
    total_bytes = 4 * plain + codes // 2 + scales
    assert manifest["total_tensors"] == report.total_tensors == len(source)
    assert manifest["total_parameters"] == report.total_parameters == plain + codes
    assert manifest["stored_elements"] == plain + codes + scales
    assert manifest["total_bytes"] == report.total_bytes == total_bytes
    assert sum(shard["nbytes"] for shard in manifest["shards"].values()) == total_bytes
    assert report.total_files == sum(shard["files"] for shard in manifest["shards"].values())


def test_side_files_have_their_size_hash_and_origin(
    converted: tuple[Path, tensorport.ConversionReport], manifest: dict[str, Any]
) -> None:
    origins = {name: info["origin"] for name, info in manifest["side_files"].items()}
    assert origins == {"config.json": "edited", "load_params.py": "generated"}
    assert (converted[1].copied_files, converted[1].edited_files) == ((), ("config.json",))
    for name, info in manifest["side_files"].items():
        content = (converted[0] / name).read_bytes()
        assert (info["nbytes"], info["xxh3_128"]) == (len(content), xxhash.xxh3_128_hexdigest(content))
