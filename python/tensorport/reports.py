"""What jobs report: frozen dataclasses that print well and turn into JSON."""

import dataclasses
import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = [
    "ConversionReport",
    "LoadReport",
    "VerificationFailure",
    "VerificationReport",
    "grouped",
    "human_bytes",
    "printable",
]


def human_bytes(nbytes: int) -> str:
    """Bytes in decimal units, as `shard_size` and `max_memory` count them."""
    for size, unit in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if nbytes >= size:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes} B"


def grouped(number: int) -> str:
    """Digits in groups of three."""
    return f"{number:,}"


def printable(text: str) -> str:
    """The text without control characters that names in a file may carry to a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\u{ord(c):04x}" for c in text)


class _Report:
    """Text, HTML and JSON from a list of labelled lines."""

    def _lines(self) -> list[tuple[str, str]]:
        raise NotImplementedError

    def __repr__(self) -> str:
        return printable("\n".join([type(self).__name__, *(f"  {label}: {text}" for label, text in self._lines())]))

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in self._lines())
        return f"<table><caption>{type(self).__name__}</caption>{rows}</table>"

    def to_json(self) -> str:
        """The report as JSON."""

        def plain(value: object) -> object:
            return str(value) if isinstance(value, Path) else dict(value) if isinstance(value, Mapping) else value

        assert dataclasses.is_dataclass(self)
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields = {
            name: [dataclasses.asdict(item) if dataclasses.is_dataclass(item) else item for item in value]
            if isinstance(value, tuple)
            else plain(value)
            for name, value in fields.items()
        }
        return json.dumps(fields, indent=2)


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class ConversionReport(_Report):
    """What a conversion did.

    Attributes:
        output: the output folder.
        options: the options that decide the bytes: format, precision, mxfp4, shard_size, include, exclude, on_overflow,
            with `mxfp4="quantize"` quantize and scale_rule, and float8 where it is "dequantize".
        total_tensors: tensors in the output.
        total_parameters: parameters in the output; MXFP4 values count once, scales do not.
        total_bytes: bytes of tensor data in the output.
        total_files: files with tensor data.
        resumed_tensors: tensors that an earlier, interrupted run had finished.
        overflow: finite values beyond the precision, by tensor; only tensors that have some.
        underflow: values that became zero and were not, by tensor; only tensors that have some.
        quantization: what quantizing lost and gained, by the name of the matrix: `mse` (mean squared error), `sqnr_db`
            (ratio of the sums of squares of values and errors, in dB; None without error), `max_error`, `nonfinite`
            (NaNs and infinities; their blocks of 32 count in nothing else) and `compression` (bytes in the source for
            a byte of blocks and scales).
        copied_files: files beside the tensors that were copied as they were.
        edited_files: files beside the tensors that were corrected to fit, such as config.json.
        warnings: what the user should know.
        verified: whether the output was re-read against its checksums.
        seconds: wall time, verification included.
    """

    output: Path
    options: Mapping[str, Any]
    total_tensors: int
    total_parameters: int
    total_bytes: int
    total_files: int
    resumed_tensors: int
    overflow: Mapping[str, int]
    underflow: Mapping[str, int]
    quantization: Mapping[str, Mapping[str, float | None]]
    copied_files: tuple[str, ...]
    edited_files: tuple[str, ...]
    warnings: tuple[str, ...]
    verified: bool
    seconds: float

    @classmethod
    def _from_json(cls, text: str, output: Path) -> "ConversionReport":
        # The path comes from the caller: JSON cannot hold one that is not UTF-8.
        fields = json.loads(text) | {"output": output}
        for name in ("copied_files", "edited_files", "warnings"):
            fields[name] = tuple(fields[name])
        return cls(**fields)

    def _lines(self) -> list[tuple[str, str]]:
        lines = [
            ("output", str(self.output)),
            ("options", ", ".join(f"{key}={value!r}" for key, value in self.options.items() if value is not None)),
            ("tensors", f"{self.total_tensors} in {self.total_files} files, {human_bytes(self.total_bytes)}"),
            ("parameters", grouped(self.total_parameters)),
            ("verified", "yes" if self.verified else "no"),
            ("seconds", f"{self.seconds:.2f}"),
        ]
        if self.resumed_tensors:
            lines.append(("resumed", f"{self.resumed_tensors} tensors were whole before"))
        for label, counts in (("overflow", self.overflow), ("underflow", self.underflow)):
            lines += [(label, f"{name}: {count} values") for name, count in counts.items()]
        lines += [("quantized", f"{name}: {_quantized(error)}") for name, error in self.quantization.items()]
        for label, names in (("copied", self.copied_files), ("edited", self.edited_files)):
            if names:
                lines.append((label, ", ".join(names)))
        return lines + [("warning", warning) for warning in self.warnings]


def _quantized(error: Mapping[str, float | None]) -> str:
    parts = [f"{error['compression']:.2f} times smaller"]
    if error["sqnr_db"] is None:
        parts.append("no values to compare" if error["mse"] is None else "no error")
    else:
        parts.append(f"SQNR {error['sqnr_db']:.2f} dB, largest error {error['max_error']:.3e}")
    if error["nonfinite"]:
        parts.append(f"{error['nonfinite']} NaNs and infinities")
    return ", ".join(parts)


@dataclasses.dataclass(frozen=True, slots=True)
class VerificationFailure:
    """One thing that is wrong with a converted tree.

    Attributes:
        file: the file, relative to the tree.
        tensor: the tensor, where one is concerned.
        what: what is wrong with it.
    """

    file: str
    tensor: str | None
    what: str

    def __str__(self) -> str:
        tensor = f": tensor {self.tensor!r}" if self.tensor is not None else ""
        return printable(f"{self.file}{tensor}: {self.what}")


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class VerificationReport(_Report):
    """What a verification found.

    Attributes:
        output: the tree.
        ok: True when there are no failures.
        failures: everything that is wrong.
        tensors: tensors that were read.
        nbytes: bytes of tensor data that were read.
        compared_with_source: whether the values were compared with a source.
        seconds: wall time.
    """

    output: Path
    ok: bool
    failures: tuple[VerificationFailure, ...]
    tensors: int
    nbytes: int
    compared_with_source: bool
    seconds: float

    @classmethod
    def _from_json(cls, text: str, output: Path) -> "VerificationReport":
        fields = json.loads(text) | {"output": output}
        fields["failures"] = tuple(VerificationFailure(**failure) for failure in fields["failures"])
        return cls(**fields)

    def _lines(self) -> list[tuple[str, str]]:
        lines = [
            ("output", str(self.output)),
            ("ok", "yes" if self.ok else "NO"),
            ("read", f"{self.tensors} tensors, {human_bytes(self.nbytes)}, {self.seconds:.2f} s"),
            ("compared with", "checksums and source" if self.compared_with_source else "checksums"),
        ]
        return lines + [("failure", str(failure)) for failure in self.failures]


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class LoadReport(_Report):
    """What a load did, in this process.

    Attributes:
        tensors: leaves of the tree; an MXFP4Array is one.
        nbytes: bytes of the arrays on this process's devices; what several devices hold counts once.
        mapped_bytes: of these, what lies in mapped files; the rest was read.
        shared_bytes: of these, what JAX uses where it lies in host memory; the rest was copied or transferred.
        bytes_read: bytes read from files: no mapped ones, but also what was read along between the regions wanted.
        reasons: why buffers were read and not mapped: number of buffers by reason.
        overflow: values that did not fit their dtype, by tensor of the checkpoint; only tensors that have some.
        underflow: values that became zero and were not, by tensor of the checkpoint; only tensors that have some.
        warnings: what the user should know.
        seconds: wall time, transfers included.
    """

    tensors: int
    nbytes: int
    mapped_bytes: int
    shared_bytes: int
    bytes_read: int
    reasons: Mapping[str, int]
    overflow: Mapping[str, int]
    underflow: Mapping[str, int]
    warnings: tuple[str, ...]
    seconds: float

    def _lines(self) -> list[tuple[str, str]]:
        lines = [
            ("tensors", f"{self.tensors}, {human_bytes(self.nbytes)}"),
            ("mapped", human_bytes(self.mapped_bytes)),
            ("read from files", human_bytes(self.bytes_read)),
            ("shared with JAX", human_bytes(self.shared_bytes)),
            ("seconds", f"{self.seconds:.3f}"),
        ]
        lines += [("not mapped", f"{count}: {reason}") for reason, count in self.reasons.items()]
        for label, counts in (("overflow", self.overflow), ("underflow", self.underflow)):
            lines += [(label, f"{name}: {count} values") for name, count in counts.items()]
        return lines + [("warning", warning) for warning in self.warnings]
