"""load_params(): a checkpoint as a pytree of (sharded) jax.Arrays."""

import collections
import dataclasses
import os
import time
import warnings as python_warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, overload

try:
    import jax
except ImportError as fault:
    raise ImportError("load_params needs JAX: pip install 'tensorport[jax]'") from fault
import numpy as np
from jax.sharding import Mesh, Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from tensorport.buffers import Buffer, Reader, make_buffers
from tensorport.checkpoint import Checkpoint
from tensorport.convert import _choice, _globs, _positive
from tensorport.leaves import ArraySource, Leaf, Rename, find_leaves, renamed, split
from tensorport.progress import Progress, observe
from tensorport.reports import LoadReport, printable
from tensorport.sharding import ShardingLike, device_regions, place
from tensorport.source import headers_source
from tensorport.streaming import stream
from tensorport.trees import Target, nested_dict, refuse_prefixes

__all__ = ["check_split_params", "load_params", "load_params_shapes", "load_split_params"]

_Callback = Callable[..., None]

_BATCH_BYTES = 256_000_000
"""What is read at once on its way to an accelerator, unless one tensor is larger."""

_IN_FLIGHT_BYTES = 1_000_000_000
"""Host memory for what is being read and what is on its way to accelerators, unless one tensor is larger."""


@overload
def load_params(
    source: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = ...,
    mxfp4: Literal["keep", "dequantize", "raw"] = ...,
    float8: Literal["keep", "dequantize"] = ...,
    sharding: ShardingLike | None = ...,
    mesh: Mesh | None = ...,
    include: str | Sequence[str] | None = ...,
    exclude: str | Sequence[str] | None = ...,
    rename: Rename | None = ...,
    target: Any = ...,
    nested: bool = ...,
    on_overflow: Literal["error", "warn", "saturate"] = ...,
    workers: int | None = ...,
    progress: Progress = ...,
    io: Literal["auto", "map", "read"] = ...,
    return_report: Literal[False] = ...,
) -> Any: ...
@overload
def load_params(
    source: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = ...,
    mxfp4: Literal["keep", "dequantize", "raw"] = ...,
    float8: Literal["keep", "dequantize"] = ...,
    sharding: ShardingLike | None = ...,
    mesh: Mesh | None = ...,
    include: str | Sequence[str] | None = ...,
    exclude: str | Sequence[str] | None = ...,
    rename: Rename | None = ...,
    target: Any = ...,
    nested: bool = ...,
    on_overflow: Literal["error", "warn", "saturate"] = ...,
    workers: int | None = ...,
    progress: Progress = ...,
    io: Literal["auto", "map", "read"] = ...,
    return_report: Literal[True],
) -> tuple[Any, LoadReport]: ...
def load_params(
    source: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    mxfp4: Literal["keep", "dequantize", "raw"] = "keep",
    float8: Literal["keep", "dequantize"] = "keep",
    sharding: ShardingLike | None = None,
    mesh: Mesh | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    rename: Rename | None = None,
    target: Any = None,
    nested: bool = True,
    on_overflow: Literal["error", "warn", "saturate"] = "error",
    workers: int | None = None,
    progress: Progress = False,
    io: Literal["auto", "map", "read"] = "auto",
    return_report: bool = False,
) -> Any:
    """Loads a checkpoint as a pytree of jax.Arrays.

    On CPU, tensors whose data begins at a multiple of 64 bytes in its file (all of a tree that `convert` wrote) are not
    read at all: the arrays share the mapped file, and pages come when they are touched. While such an array lives, its
    file must not be edited or truncated: an edit shows in the array, and touching data behind a new end of file ends
    the process (SIGBUS). Replacing the file by a rename is safe. All else is read in parallel: into memory that JAX on
    CPU shares, or on its way to an accelerator in bounded batches, while the batch before is transferred.

    Args:
        source: what :func:`tensorport.open` opens.
        dtype: float16, bfloat16 or float32: float64, float32, float16 and bfloat16 tensors are cast to it, rounding to
            nearest even. Narrower floats, integers, bools and MXFP4Arrays stay. None keeps every dtype. 64-bit tensors
            that JAX does not hold (`jax_enable_x64` is off) come in 32 bits, with a warning that names them.
        mxfp4: what becomes of a pair of blocks and scales: `keep` makes it one :class:`tensorport.mxfp4.MXFP4Array`,
            `dequantize` one array [..., 32 * groups] in `dtype` (None means bfloat16), `raw` leaves two uint8 arrays.
            All but `raw` know the pair by the name of the decoded tensor.
        float8: what becomes of a weight X of dtype float8_e4m3fn with scales `X_scale_inv` for its blocks: `keep`
            leaves two arrays, `dequantize` makes one array X in `dtype` (None means bfloat16): each value times the
            scale of its block, rounded once. Blocks are of `weight_block_size` in config.json's
            `quantization_config`, else of 128 x 128.
        sharding: a Sharding, a device, a callable `(name, ShapeDtypeStruct) -> Sharding`, or a list of
            `(regex, PartitionSpec)` for `mesh`: the first that `re.search` finds in a leaf's name. Each process reads
            the bytes that its devices hold. None is JAX's default device, or what `target` says.
        mesh: the mesh of the PartitionSpecs.
        include: glob or globs on full dotted names; only tensors that match are taken.
        exclude: glob or globs on full dotted names to leave out.
        rename: a callable, a dict of names, or a list of `(regex, replacement)` that `re.sub` applies in turn. Sharding
            rules and `target` see the new names.
        target: a tree to fill: an `nnx.State`, an Equinox module, dicts of ShapeDtypeStructs or arrays. Names (paths
            joined by dots), shapes and dtypes are compared before anything is read; its structure is what is returned.
        nested: split names at dots into nested dicts; False gives one flat dict.
        on_overflow: what becomes of finite values beyond a dtype: `error` raises, `warn` makes floats infinite,
            `saturate` the largest finite value. Integers saturate in both.
        workers: threads; all cores by default.
        progress: False, True for a bar, or a callable that gets a :class:`ProgressEvent`.
        io: `auto` maps what JAX can share and what lies on a local filesystem, and reads the rest; `map` maps whatever
            lies in one piece, also where JAX then copies it; `read` reads everything.
        return_report: return `(params, report)`; the :class:`LoadReport` tells what was mapped, what was read and why.

    Returns:
        Nested dicts of jax.Arrays and MXFP4Arrays in the order of the checkpoint, or the structure of `target`. All
        transfers are done.

    Raises:
        CheckpointError: the bytes of the source are wrong.
        ConversionError: values overflow.
        MappingError: names, shapes or dtypes do not fit: `rename`, `sharding`, `target`, nesting, dtypes JAX lacks.
        OSError: the system refused.
        TypeError, ValueError: an argument is out of its range.
    """
    started = time.perf_counter()
    workers = _checked_options(on_overflow, workers, io)
    plan = _plan(
        source, dtype, mxfp4, sharding, mesh, include, exclude, rename, target, nested, float8=float8, progress=progress
    )
    params, report = _run(plan, started, on_overflow, workers, io, progress)
    return (params, report) if return_report else params


def load_split_params(
    source: str | os.PathLike[str],
    target: Any,
    *,
    parts: Mapping[str, Mapping[str, int]],
    dtype: DTypeLike,
    sharding: ShardingLike | None = None,
    mesh: Mesh | None = None,
    rename: Rename | None = None,
    workers: int | None = None,
    progress: Progress = False,
) -> tuple[Any, LoadReport]:
    """As :func:`load_params`, for models that name parts of tensors: what is stored as one may be several arrays.

    Args:
        source: what :func:`tensorport.open` opens.
        target: see :func:`load_params`.
        parts: for a tensor the names of its parts along the first axis and their rows, in their order; before `rename`.
        dtype: see :func:`load_params`.
        sharding: see :func:`load_params`.
        mesh: see :func:`load_params`.
        rename: see :func:`load_params`.
        workers: see :func:`load_params`.
        progress: see :func:`load_params`.
    """
    started = time.perf_counter()
    workers = _checked_options("error", workers, "auto")
    plan = _plan(source, dtype, "keep", sharding, mesh, None, None, rename, target, True, parts, progress=progress)
    return _run(plan, started, "error", workers, "auto", progress)


def check_split_params(
    source: str | os.PathLike[str],
    target: Any,
    *,
    parts: Mapping[str, Mapping[str, int]],
    dtype: DTypeLike,
    rename: Rename | None = None,
) -> None:
    """Raises what :func:`load_split_params` raises before it reads; looks at headers and no tensor data."""
    _plan(source, dtype, "keep", None, None, None, None, rename, target, True, parts)


def _run(  # noqa: PLR0917 - what load_params hands on
    plan: "_Plan", started: float, on_overflow: str, workers: int | None, io: str, progress: Progress
) -> tuple[Any, LoadReport]:
    """Loads what is planned; warnings are those of the caller's caller."""
    for warning in plan.warnings:
        python_warnings.warn(warning, stacklevel=3)
    reader = Reader(plan.checkpoint, on_overflow, workers)
    with observe(progress) as callback:
        values, report = _Loading(plan, reader, io).run(callback)
    for name, count in reader.overflow.items():
        python_warnings.warn(
            f"{printable(name)}: {count} values overflowed (on_overflow={on_overflow!r})", stacklevel=3
        )
    return plan.assemble(values), dataclasses.replace(report, seconds=time.perf_counter() - started)


def load_params_shapes(
    source: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    mxfp4: Literal["keep", "dequantize", "raw"] = "keep",
    float8: Literal["keep", "dequantize"] = "keep",
    sharding: ShardingLike | None = None,
    mesh: Mesh | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    rename: Rename | None = None,
    target: Any = None,
    nested: bool = True,
    on_overflow: Literal["error", "warn", "saturate"] = "error",
    workers: int | None = None,
    progress: Progress = False,
    io: Literal["auto", "map", "read"] = "auto",
) -> Any:
    """The tree that :func:`load_params` would return, as jax.ShapeDtypeStructs; reads headers and no tensor data.

    Takes the arguments of :func:`load_params` but `return_report`, and raises what it raises before it reads.
    ShapeDtypeStructs carry their shardings. Of an id, headers and side files are downloaded, and no tensors.
    """
    _checked_options(on_overflow, workers, io)
    with headers_source(source, progress) as headers:
        plan = _plan(
            headers.path, dtype, mxfp4, sharding, mesh, include, exclude, rename, target, nested, float8=float8
        )
    for warning in plan.warnings:
        python_warnings.warn(warning, stacklevel=2)
    structs = [
        leaf.build([jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding) for array in leaf.arrays])
        for leaf, sharding in zip(plan.leaves, plan.shardings, strict=True)
    ]
    return plan.assemble(structs)


def _checked_options(on_overflow: str, workers: int | None, io: str) -> int | None:
    """The number of workers; refuses what the options of reading cannot be."""
    _choice("on_overflow", on_overflow, ("error", "warn", "saturate"))
    _choice("io", io, ("auto", "map", "read"))
    return _positive("workers", workers)


@dataclasses.dataclass(frozen=True, slots=True)
class _Plan:
    """What is to be loaded: checked, and nothing read."""

    checkpoint: Checkpoint
    leaves: list[Leaf]
    shardings: list[Sharding | None]
    target: Target | None
    nested: bool
    warnings: list[str]

    def assemble(self, values: Sequence[Any]) -> Any:
        """The tree around one value for each leaf."""
        names = [leaf.name for leaf in self.leaves]
        if self.target is not None:
            return self.target.fill(names, values)
        return nested_dict(names, values) if self.nested else dict(zip(names, values, strict=True))


def _plan(  # noqa: PLR0917 - what load_params and load_params_shapes hand on, in their order
    source: str | os.PathLike[str],
    dtype: DTypeLike | None,
    mxfp4: str,
    sharding: ShardingLike | None,
    mesh: Mesh | None,
    include: str | Sequence[str] | None,
    exclude: str | Sequence[str] | None,
    rename: Rename | None,
    target: Any,
    nested: bool,
    parts: Mapping[str, Mapping[str, int]] = MappingProxyType({}),
    *,
    float8: str = "keep",
    progress: Progress = False,
) -> _Plan:
    wanted_dtype = None if dtype is None else np.dtype(dtype)
    if wanted_dtype is not None and wanted_dtype.name not in ("float16", "bfloat16", "float32"):
        raise ValueError(
            f"dtype: found {wanted_dtype.name}, expected float16, bfloat16 or float32, or None to keep all"
        )
    _choice("mxfp4", mxfp4, ("keep", "dequantize", "raw"))
    _choice("float8", float8, ("keep", "dequantize"))
    checkpoint = Checkpoint(source, progress=progress)
    leaves, warnings = find_leaves(
        checkpoint,
        dtype=wanted_dtype,
        mxfp4=mxfp4,
        float8=float8,
        include=_globs("include", include),
        exclude=_globs("exclude", exclude),
    )
    leaves = renamed(split(leaves, parts), rename)
    filled = None if target is None else Target(target)
    if filled is not None:
        filled.check(leaves)
        if sharding is None and mesh is None:
            sharding = filled.shardings()
    elif nested:
        refuse_prefixes([leaf.name for leaf in leaves])
    return _Plan(checkpoint, leaves, place(leaves, sharding, mesh), filled, nested, warnings)


@dataclasses.dataclass(frozen=True, slots=True)
class _Array:
    """One array to be made, and its buffers."""

    source: ArraySource
    sharding: Sharding | None
    buffers: list[Buffer]

    @property
    def nbytes(self) -> int:
        """Bytes of host memory."""
        return sum(buffer.nbytes for buffer in self.buffers)


class _Loading:
    """One run of a plan: buffers filled batch by batch, and handed to JAX."""

    def __init__(self, plan: _Plan, reader: Reader, io: str) -> None:
        self._plan = plan
        self._reader = reader
        self._arrays = [
            _Array(
                source, sharding, make_buffers(source, None if sharding is None else device_regions(source, sharding))
            )
            for leaf, sharding in zip(plan.leaves, plan.shardings, strict=True)
            for source in leaf.arrays
        ]
        self._default = _default_device()
        self._buffers = [buffer for array in self._arrays for buffer in array.buffers]
        reader.choose(self._buffers, io, self._is_host)
        self._nbytes = sum(array.nbytes for array in self._arrays)
        # What was filled so far.
        self._arrays_filled = 0
        self._bytes_filled = 0
        # By identity: buffers whose memory JAX uses as it is.
        self._shared: set[int] = set()

    def _is_host(self, buffer: Buffer) -> bool:
        """Whether the devices of a buffer work on host memory."""
        platforms = {device.platform for device in buffer.devices or [self._default]}
        return platforms == {"cpu"}

    def run(self, callback: _Callback | None) -> tuple[list[Any], LoadReport]:
        """Loads all; returns one value for each leaf, and what happened."""
        # On CPU all at once: what is read stays where it is read.
        is_host = all(map(self._is_host, self._buffers))
        if is_host:
            self._fill(self._arrays, callback)
            arrays = self._deliver(self._arrays)
        else:
            arrays = self._stream(callback)
        jax.block_until_ready(arrays)
        if callback is not None:
            name = self._arrays[-1].source.names[0] if self._arrays else ""
            callback("load", self._nbytes, self._nbytes, len(self._arrays), len(self._arrays), name)
        rest = iter(arrays)
        values = [leaf.build([next(rest) for _ in leaf.arrays]) for leaf in self._plan.leaves]
        return values, self._report()

    def _fill(self, batch: list[_Array], callback: _Callback | None) -> None:
        """Fills one batch after the other, in their order."""
        self._reader.fill([buffer for array in batch for buffer in array.buffers], self._within(batch, callback))
        self._arrays_filled += len(batch)
        self._bytes_filled += sum(array.nbytes for array in batch)

    def _within(self, batch: list[_Array], callback: _Callback | None) -> _Callback | None:
        """A callback that counts within a batch, as one that counts within all."""
        if callback is None:
            return None
        first, before = self._arrays_filled, self._bytes_filled

        def count(phase: str, bytes_done: int, _: int, done: int, total: int, tensor: str) -> None:
            # What is read together is counted there: one of several parts of an array, and none that is mapped.
            arrays = first + len(batch) * done // max(total, 1)
            callback(phase, before + bytes_done, self._nbytes, arrays, len(self._arrays), tensor)

        return count

    def _stream(self, callback: _Callback | None) -> list[jax.Array]:
        """Loads batch by batch, for what does not stay in host memory."""
        sent = stream(
            list(self._batches()),
            read=self._fill,
            send=self._deliver,
            wait=jax.block_until_ready,
            nbytes=lambda batch: sum(array.nbytes for array in batch),
            limit=_IN_FLIGHT_BYTES,
            callback=callback,
        )
        return [array for batch in sent for array in batch]

    def _batches(self) -> Iterator[list[_Array]]:
        """Neighbouring arrays, together no larger than a batch unless there is only one."""
        batch: list[_Array] = []
        held = 0
        for array in self._arrays:
            nbytes = array.nbytes
            if batch and held + nbytes > _BATCH_BYTES:
                yield batch
                batch, held = [], 0
            batch.append(array)
            held += nbytes
        if batch:
            yield batch

    def _deliver(self, batch: list[_Array]) -> list[jax.Array]:
        """Hands filled buffers to JAX, all in one call for each kind of placement, and lets go of them."""
        pieces = [
            (buffer, _target(array.sharding, device))
            for array in batch
            for buffer in array.buffers
            for device in (buffer.devices or [None])
        ]
        free = [buffer.data for buffer, target in pieces if target is None]
        placed = [(buffer.data, target) for buffer, target in pieces if target is not None]
        put_free = iter(jax.device_put(free) if free else [])
        put_placed = iter(
            jax.device_put([data for data, _ in placed], [target for _, target in placed]) if placed else []
        )
        shards = [(buffer, next(put_free if target is None else put_placed)) for buffer, target in pieces]
        for buffer, shard in shards:
            self._count(buffer, shard)
        # Only now: several devices may have got one buffer.
        for buffer, _ in shards:
            buffer.data = None
        rest = iter(shard for _, shard in shards)
        return [
            self._array(array, [next(rest) for buffer in array.buffers for _ in buffer.devices or [None]])
            for array in batch
        ]

    def _array(self, array: _Array, shards: list[jax.Array]) -> jax.Array:
        if array.sharding is None:
            return shards[0]
        # Without a shard for this process, too: the dtype says what the others hold.
        return jax.make_array_from_single_device_arrays(
            array.source.shape, array.sharding, shards, dtype=array.source.dtype
        )

    def _count(self, buffer: Buffer, shard: jax.Array) -> None:
        if not self._is_host(buffer) or not buffer.nbytes or id(buffer) in self._shared:
            return
        assert buffer.data is not None
        if shard.unsafe_buffer_pointer() == buffer.data.ctypes.data:
            self._shared.add(id(buffer))

    def _report(self) -> LoadReport:
        mapped = [buffer for buffer in self._buffers if buffer.reason is None]
        reasons = collections.Counter(buffer.reason for buffer in self._buffers if buffer.reason is not None)
        return LoadReport(
            tensors=len(self._plan.leaves),
            nbytes=self._nbytes,
            mapped_bytes=sum(buffer.nbytes for buffer in mapped),
            shared_bytes=sum(buffer.nbytes for buffer in self._buffers if id(buffer) in self._shared),
            bytes_read=self._reader.bytes_read,
            reasons=dict(reasons),
            overflow=dict(self._reader.overflow),
            underflow=dict(self._reader.underflow),
            warnings=tuple(self._plan.warnings),
            seconds=0.0,
        )


def _target(sharding: Sharding | None, device: jax.Device | None) -> Any:
    """What device_put takes for a shard: None for the default device."""
    if sharding is None or device is None:
        return None
    kind = sharding.memory_kind
    is_default = kind is None or kind == device.default_memory().kind
    return device if is_default else SingleDeviceSharding(device, memory_kind=kind)


def _default_device() -> jax.Device:
    """The device of arrays that nobody placed."""
    (device,) = jax.device_put(np.uint8(0)).devices()
    return device
