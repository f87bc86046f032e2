"""What convert() and verify() report: frozen, readable as text and HTML, and JSON for machines."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorport

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture
def source(tmp_path: Path, write_safetensors: Callable[..., Path]) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    values = np.array([1.0, 1e9, 1e-30, -3e38, 0.0], np.float32)
    write_safetensors(folder / "m.safetensors", {HOSTILE: values, "b": np.zeros((2, 3), np.float32)})
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def report(tmp_path: Path, source: Path) -> tensorport.ConversionReport:
    with pytest.warns(UserWarning, match="2 finite values"):
        return tensorport.convert(source, tmp_path / "tree", precision="float16", on_overflow="warn", progress=False)


def test_a_conversion_report_counts_what_was_done(tmp_path: Path, report: tensorport.ConversionReport) -> None:
    assert report.output == tmp_path / "tree"
    assert (report.total_tensors, report.total_parameters, report.total_bytes, report.total_files) == (2, 11, 22, 2)
    assert (report.overflow, report.underflow) == ({HOSTILE: 2}, {HOSTILE: 1})
    assert (report.copied_files, report.edited_files) == (("tokenizer.json",), ("config.json",))
    assert (report.resumed_tensors, report.verified) == (0, True)
    assert 0 < report.seconds < 60


def test_a_report_is_frozen(report: tensorport.ConversionReport) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.total_tensors = 3  # type: ignore[misc]


def test_a_report_reads_as_text(report: tensorport.ConversionReport) -> None:
    text = repr(report)
    for part in ("ConversionReport", str(report.output), "2 in 2 files", "22 B", "float16", "2 values", "config.json"):
        assert part in text


def test_a_report_in_html_shows_hostile_names_as_text(report: tensorport.ConversionReport) -> None:
    html = report._repr_html_()
    assert html.startswith("<table>")
    assert HOSTILE not in html
    assert "&lt;script&gt;" in html


def test_a_report_as_json_has_every_field(report: tensorport.ConversionReport) -> None:
    fields: dict[str, Any] = json.loads(report.to_json())
    assert list(fields) == [field.name for field in dataclasses.fields(report)]
    assert fields["output"] == str(report.output)
    assert fields["overflow"] == {HOSTILE: 2}
    assert fields["copied_files"] == ["tokenizer.json"]
    assert fields["options"]["precision"] == "float16"


def test_without_verification_a_report_says_so(tmp_path: Path, source: Path) -> None:
    report = tensorport.convert(source, tmp_path / "quick", verify=False, progress=False)
    assert not report.verified
    assert "verified: no" in repr(report)


def test_a_verification_report_names_file_tensor_and_fault(tmp_path: Path, source: Path) -> None:
    tree = tmp_path / "tree"
    tensorport.convert(source, tree, progress=False)
    file = tree / tensorport.open(tree).specs["b"].files[0]
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    report = tensorport.verify(tree, progress=False)
    assert not report.ok
    assert not report.compared_with_source
    (failure,) = report.failures
    assert (failure.file, failure.tensor) == ("shard_000/b.npy", "b")
    assert failure.what in str(failure)
    for text in (repr(report), report._repr_html_(), report.to_json()):
        assert "shard_000/b.npy" in text
    assert json.loads(report.to_json())["failures"] == [dataclasses.asdict(failure)]
