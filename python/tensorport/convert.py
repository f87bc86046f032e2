"""convert() and verify(): a checkpoint to JAX-ready files, and the proof that they are right. No JAX."""

import json
import os
import warnings as python_warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from tensorport import _core
from tensorport.errors import CheckpointError, VerificationError
from tensorport.progress import Progress, observe
from tensorport.reports import ConversionReport, VerificationReport
from tensorport.source import arriving_source, local_path

__all__ = ["convert", "verify"]

_FORMATS = {
    "numpy-direct": "numpy-direct",
    "numpy": "numpy-direct",
    "msgpack": "msgpack",
    "jax-pickle": "jax-pickle",
    "jax": "jax-pickle",
    "safetensors": "safetensors",
    "orbax": "orbax",
}
_PRECISIONS = ("source", "float16", "bfloat16", "float32")
_MXFP4_MODES = ("keep", "dequantize", "quantize")
_FLOAT8_MODES = ("keep", "dequantize")
_SCALE_RULES = ("floor", "ceil", "nearest")
_ON_OVERFLOW = ("error", "warn", "saturate")


def convert(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    format: Literal[  # noqa: A002 - the word that the command line has too
        "numpy-direct", "numpy", "msgpack", "jax-pickle", "jax", "safetensors", "orbax"
    ] = "numpy-direct",
    precision: Literal["source", "float16", "bfloat16", "float32"] = "source",
    mxfp4: Literal["keep", "dequantize", "quantize"] = "keep",
    float8: Literal["keep", "dequantize"] = "keep",
    quantize: str | Sequence[str] | None = None,
    scale_rule: Literal["floor", "ceil", "nearest"] | None = None,
    shard_size: float = 1.8,
    workers: int | None = None,
    max_memory: int = 256_000_000,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    on_overflow: Literal["error", "warn", "saturate"] = "error",
    resume: bool = False,
    overwrite: bool = False,
    verify: bool = True,
    progress: Progress = True,
) -> ConversionReport:
    """Converts a checkpoint to JAX-ready files, in bounded memory and on all cores.

    The output is a function of the source and of the options that decide bytes: neither the number of workers nor an
    interruption changes it. Every file appears whole or not at all.

    Args:
        source: what :func:`tensorport.open` opens. What an id names is converted while it is downloaded.
        output: the folder to write; a new or an empty one.
        format: `numpy-direct` (or `numpy`): one npy file per tensor, which `jnp.load` reads; `msgpack`: maps of arrays,
            which `flax.serialization.msgpack_restore` reads; `jax-pickle` (or `jax`): dicts of NumPy arrays, which
            `pickle.load` reads where ml_dtypes is installed; `safetensors`: files and an index, with data aligned so
            that it can be aliased; `orbax`: a checkpoint of the nested tree, which orbax-checkpoint restores.
        precision: `source` keeps every bit; the others cast float64, float32, float16 and bfloat16 tensors, rounding
            to nearest even. Narrower floats, integers and bools stay, and so does what is quantized.
        mxfp4: `keep` leaves blocks and scales as two uint8 tensors; `dequantize` makes one tensor
            [..., rows, 32 * groups] of each pair, in `precision` (`source` means bfloat16); `quantize` makes a pair,
            `X_blocks` [..., rows, K / 32, 16] and `X_scales` [..., rows, K / 32], of each matrix X [..., rows, K] that
            `quantize` chooses, from the values of the source, and keeps pairs.
        float8: `keep` leaves weights X of dtype float8_e4m3fn and their scales, `X_scale_inv`, as two tensors;
            `dequantize` makes one tensor X [..., N, K] of both, in `precision` (`source` means bfloat16): each value
            times the scale of its block, rounded once. Blocks are of `weight_block_size` in config.json's
            `quantization_config`, else of 128 x 128.
        quantize: glob or globs on full tensor names, with `mxfp4="quantize"` alone. Of the tensors that match, float64,
            float32, float16 and bfloat16 ones of two or three dimensions are quantized. Those whose last axis is no
            multiple of 32 are kept, with a warning; tensors of other dtypes and dimensions are kept.
        scale_rule: which power of two becomes the scale of 32 values, with `mxfp4="quantize"` alone: `floor` (the
            default) is that of OCP MX v1.0, under which values above 6 times the scale saturate; `ceil` is the
            smallest under which none does; `nearest` that under which the largest value comes out best.
        shard_size: largest shard in GB (10^9 bytes) of tensor data. A larger tensor is split along axis 0 where the
            format has a file to a tensor, `numpy-direct` and `orbax`, and elsewhere gets a file of its own.
        workers: threads; all cores by default.
        max_memory: bytes of anonymous memory for the process. Headers of the source come on top.
        include: glob or globs on full tensor names; only tensors that match are taken. With `dequantize` the name of
            a pair is that of the decoded tensor; with `quantize` names are those of the source.
        exclude: glob or globs on full tensor names to leave out.
        on_overflow: what becomes of finite values beyond the precision: `error` raises, `warn` stores infinities,
            `saturate` the largest finite value. Infinities and NaNs of the source are no overflow.
        resume: go on with an interrupted conversion; what it had finished is re-checked.
        overwrite: replace an earlier tree, finished or not. Files that no conversion wrote are never touched.
        verify: re-read everything that was written against its checksums.
        progress: False, True for a bar, or a callable that gets a :class:`ProgressEvent`.

    Returns:
        A report. Its `quantization` has the error of each matrix that was quantized, which the manifest has too.

    Raises:
        CheckpointError: the bytes of the source are wrong, two tensors would have one name, or the model that is to be
            quantized says in config.json that it has another quantization.
        ConversionError: the folder holds something else, or values overflow.
        MappingError: no tensor is selected, or none to be quantized; or the format cannot hold a tensor: orbax has no
            empty arrays, and no names but those that can be folders and nested keys.
        VerificationError: what was written does not read back; `report` says what.
        OSError: the system refused.
        ValueError: an argument is out of its range.
        KeyboardInterrupt: after Ctrl-C; `resume=True` goes on.
    """
    if not isinstance(shard_size, int | float):
        raise TypeError(f"shard_size: found {shard_size!r}, expected a number of GB")
    if not 0 < shard_size < 9e9:
        raise ValueError(f"shard_size: found {shard_size}, expected a positive number of GB below 9e9")
    options = {
        "format": _FORMATS[_choice("format", format, tuple(_FORMATS))],
        "precision": _choice("precision", precision, _PRECISIONS),
        "mxfp4": _choice("mxfp4", mxfp4, _MXFP4_MODES),
        "float8": _choice("float8", float8, _FLOAT8_MODES),
        "quantize": _globs("quantize", quantize),
        "scale_rule": None if scale_rule is None else _choice("scale_rule", scale_rule, _SCALE_RULES),
        "shard_size": float(shard_size),
        "include": _globs("include", include),
        "exclude": _globs("exclude", exclude),
        "on_overflow": _choice("on_overflow", on_overflow, _ON_OVERFLOW),
    }
    workers, max_memory = _positive("workers", workers), _positive("max_memory", max_memory) or 0
    output = _path("output", output)
    with arriving_source(source, progress) as arriving, observe(progress) as callback:
        try:
            report = _core.convert(
                arriving.path,
                output,
                json.dumps(options),
                resume=resume,
                overwrite=overwrite,
                verify=verify,
                workers=workers,
                max_memory=max_memory,
                callback=arriving.watched(callback),
                arrivals=arriving.arrivals,
            )
        except VerificationError as fault:
            fault.report = VerificationReport._from_json(fault.report, output)
            raise
        except CheckpointError:
            arriving.raise_fault()
            raise
        arriving.finish()
    result = ConversionReport._from_json(report, output)
    for warning in result.warnings:
        python_warnings.warn(warning, stacklevel=2)
    return result


def verify(
    output: str | os.PathLike[str],
    source: str | os.PathLike[str] | None = None,
    *,
    workers: int | None = None,
    progress: Progress = True,
) -> VerificationReport:
    """Re-reads a converted tree against its checksums, and with `source` compares every value after the same casts.

    Args:
        output: a folder that :func:`convert` wrote.
        source: the checkpoint that it was made from.
        workers: threads; all cores by default.
        progress: False, True for a bar, or a callable that gets a :class:`ProgressEvent`.

    Returns:
        A report whose `ok` is True when nothing is wrong, and whose `failures` name file, tensor and fault.

    Raises:
        CheckpointError: the bytes of `source` are wrong. What is wrong with `output` is in the report.
        OSError: the system refused; FileNotFoundError where `output` does not exist.
    """
    workers = _positive("workers", workers)
    output = _path("output", output)
    source = None if source is None else local_path(source, progress)
    with observe(progress) as callback:
        text = _core.verify(output, source, workers=workers, callback=callback)
    return VerificationReport._from_json(text, output)


def _choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{name}: found {value!r}, expected one of {', '.join(map(repr, choices))}")
    return value


def _path(name: str, path: str | os.PathLike[str]) -> Path:
    # Path("") is the current folder, which an unset variable should not mean.
    if not os.fspath(path):
        raise ValueError(f"{name}: found an empty path, expected a file or a folder")
    return Path(path)


def _positive(name: str, value: int | None) -> int | None:
    if value is not None and not isinstance(value, int):
        raise TypeError(f"{name}: found {value!r}, expected an integer")
    if value is not None and not 1 <= value < 2**63:
        raise ValueError(f"{name}: found {value}, expected a positive 64-bit number")
    return value


def _globs(name: str, patterns: str | Sequence[str] | None) -> list[str] | None:
    if patterns is None:
        return None
    globs = [patterns] if isinstance(patterns, str) else list(patterns)
    if not all(isinstance(glob, str) for glob in globs):
        raise TypeError(f"{name}: found {globs!r}, expected a glob or a sequence of globs")
    return globs
