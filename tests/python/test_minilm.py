"""A real model, all-MiniLM-L6-v2: every tensor at every precision against what the safetensors library reads."""

import json
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tensorport
from numpy.typing import NDArray
from safetensors.numpy import load_file

TARGETS = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


@pytest.fixture(scope="module")
def theirs(minilm: Path) -> dict[str, NDArray[Any]]:
    arrays: dict[str, NDArray[Any]] = load_file(minilm / "model.safetensors")
    return arrays


def test_every_tensor_opens_as_the_safetensors_library_reads_it(minilm: Path, theirs: dict[str, NDArray[Any]]) -> None:
    ours = tensorport.open(minilm)
    assert set(ours) == set(theirs)
    assert len(ours) > 100
    for name, array in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (array.dtype, array.shape)
        assert ours[name].tobytes() == array.tobytes()
    assert ours.total_parameters == ours.stored_elements == sum(array.size for array in theirs.values())


@pytest.mark.parametrize("precision", ["source", "float16", "bfloat16", "float32"])
def test_every_tensor_converts_verifies_and_loads_at_every_precision(
    tmp_path: Path,
    minilm: Path,
    theirs: dict[str, NDArray[Any]],
    precision: Literal["source", "float16", "bfloat16", "float32"],
) -> None:
    tree = tmp_path / "tree"
    report = tensorport.convert(minilm, tree, precision=precision, shard_size=0.02, progress=False)
    assert report.verified
    assert report.overflow == {}
    verification = tensorport.verify(tree, minilm, progress=False)
    assert verification.ok
    assert verification.compared_with_source
    assert (verification.tensors, verification.nbytes) == (report.total_tensors, report.total_bytes)
    ours = tensorport.open(tree)
    assert set(ours) == set(theirs)
    underflow, splits = {}, 0
    for name, array in theirs.items():
        is_cast = array.dtype == np.float32 and precision != "source"
        expected = array.astype(TARGETS[precision]) if is_cast else array
        assert (ours[name].dtype, ours[name].shape) == (expected.dtype, expected.shape)
        assert ours[name].tobytes() == expected.tobytes()
        files = ours.specs[name].files
        splits += len(files) > 1
        if array.dtype == np.float32:
            loaded = jnp.concatenate([jnp.load(tree / file) for file in files])
            assert loaded.dtype == expected.dtype
            assert np.asarray(loaded).tobytes() == expected.tobytes()
        if vanished := int(((expected == 0) & (array != 0)).sum()):
            underflow[name] = vanished
    assert report.underflow == underflow
    assert splits > 0
    config = json.loads((tree / "config.json").read_text())
    assert config.get("dtype") == (precision if precision in ("float16", "bfloat16") else None)
    assert (tree / "tokenizer.json").read_bytes() == (minilm / "tokenizer.json").read_bytes()
