"""Ops with several implementations: which one runs, and why."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final, Literal, TypeAlias

import jax

__all__ = ["Device", "Explanation", "Implementation", "ImplementationName", "Op", "explain"]

ImplementationName: TypeAlias = Literal[
    "auto", "xla", "native", "native_int8", "pallas_triton", "pallas_mosaic", "scaled_dot"
]
"""`auto` takes the first that can run; the others run or raise NotImplementedError.

`xla`: plain JAX, everywhere. `native`: Rust on CPU. `native_int8`: the same with activations rounded to int8, for
products with MXFP4; every other op takes it for `native`. `pallas_triton`: Pallas on NVIDIA GPUs, for products with
MXFP4 and attention; every other op takes it for `xla`. `pallas_mosaic`: another Pallas on NVIDIA GPUs.
`scaled_dot`: the block-scaled products of NVIDIA's Blackwell, through XLA.
"""

_NOT_HERE: Final = "not in this version of tensorport"

_EXTENDS: Final = {"native_int8": "native", "pallas_triton": "xla"}
"""Implementations that only some ops have, and what the others take them for: a model names one for all of its ops."""

OPS: Final[dict[str, "Op"]] = {}
"""Every op by its public name, such as `mxfp4.matmul`."""


@dataclasses.dataclass(frozen=True, slots=True)
class Device:
    """What a computation is compiled for, as far as the choice of an implementation depends on it.

    Attributes:
        platform: `cpu`, `gpu` or `tpu`, as JAX names it.
        kind: JAX's `device_kind`.
        compute_capability: of NVIDIA GPUs, such as (10, 0); None elsewhere.
    """

    platform: str
    kind: str
    compute_capability: tuple[int, int] | None

    @classmethod
    def of(cls, *arrays: Any) -> "Device":
        """Where the first of the arrays that is anywhere lies; else JAX's default device.

        Under `jit` nobody knows yet where arguments will be: then it is the default device.
        """
        for leaf in jax.tree.leaves(arrays):
            if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer):
                return cls._from(next(iter(leaf.devices())))
        config: Any = jax.config  # typed without its options
        default = config.jax_default_device
        if isinstance(default, str):
            return cls._from(jax.local_devices(backend=default)[0])
        return cls._from(default if default is not None else jax.local_devices()[0])

    @classmethod
    def _from(cls, device: jax.Device) -> "Device":
        version = getattr(device, "compute_capability", None)
        major, _, minor = str(version).partition(".")
        is_nvidia = version is not None and major.isdigit() and minor.isdigit()
        return cls(device.platform, device.device_kind, (int(major), int(minor)) if is_nvidia else None)

    def __str__(self) -> str:
        return self.platform if self.kind == self.platform else f"{self.platform} ({self.kind})"


@dataclasses.dataclass(frozen=True, slots=True)
class Implementation:
    """One way to compute an op.

    Attributes:
        name: how users name it.
        run: computes the op; takes its arguments, already checked, and its settings.
        refuses: takes the device and those arguments, of which only shapes and dtypes count; returns why this
            implementation cannot run, or None if it can.
        elsewhere: of an implementation for CPU alone what computes the same in programs that are compiled for other
            platforms. Only the automatic choice has it: a program is traced before anybody knows what it is for. The
            implementation called by its name is refused there, when the program is lowered.
        is_for_cpu: whether it is refused there without having anything that computes the same.
        opt_in: why `auto` never chooses it; None if it may.
    """

    name: str
    run: Callable[..., jax.Array]
    refuses: Callable[..., str | None] = lambda *_: None
    elsewhere: Callable[..., jax.Array] | None = None
    is_for_cpu: bool = False
    opt_in: str | None = None

    def by_platform(self) -> dict[str, "Implementation"]:
        """What runs if this one is named, and if it was chosen automatically, under names of their own."""
        if self.elsewhere is None and not self.is_for_cpu:
            return {self.name: self}
        named = {self.name: Implementation(self.name, partial(_by_platform, self.run, None))}
        if self.elsewhere is None:
            return named
        anywhere = f"{self.name} or elsewhere"
        return {**named, anywhere: Implementation(anywhere, partial(_by_platform, self.run, self.elsewhere))}


def _by_platform(on_cpu: Callable[..., jax.Array], elsewhere: Callable[..., jax.Array] | None, *args: Any) -> jax.Array:
    """Calls the one that is for the platform which the program is compiled for."""
    # Settings are no arrays, and stay as they are.
    leaves, structure = jax.tree.flatten(args)
    places = [index for index, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]

    def of_arrays(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        def call(*arrays: jax.Array) -> jax.Array:
            filled = list(leaves)
            for index, array in zip(places, arrays, strict=True):
                filled[index] = array
            return function(*jax.tree.unflatten(structure, filled))

        return call

    branches = {"cpu": of_arrays(on_cpu)} | ({} if elsewhere is None else {"default": of_arrays(elsewhere)})
    out: jax.Array = jax.lax.platform_dependent(*(leaves[index] for index in places), **branches)
    return out


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Which implementation of an op runs on some arguments, and why no other.

    Attributes:
        op: the op's public name.
        device: what it is compiled for.
        implementation: the one that runs; None if none can.
        reasons: for every implementation what speaks against it; None for those that can run.
    """

    op: str
    device: Device
    implementation: str | None
    reasons: Mapping[str, str | None]

    def __str__(self) -> str:
        def line(name: str, reason: str | None) -> str:
            if name == self.implementation:
                return f"  {name}: runs"
            return f"  {name}: {'could run' if reason is None else reason}"

        return "\n".join([f"{self.op} on {self.device}:", *(line(*item) for item in self.reasons.items())])

    __repr__ = __str__


class Op:
    """An op and its implementations.

    Args:
        name: how users name it.
        arguments: takes the op's arrays in its users' order, checks them, and returns what implementations take.
        implementations: in the order in which `auto` tries them.
    """

    def __init__(self, name: str, arguments: Callable[..., tuple[Any, ...]], *implementations: Implementation) -> None:
        self.name = name
        self.arguments = arguments
        self._named = {implementation.name: implementation for implementation in implementations}
        self.implementations: dict[str, Implementation] = {}
        for implementation in implementations:
            self.implementations |= implementation.by_platform()
        OPS[name] = self

    def choose(self, implementation: str, *args: Any) -> Implementation:
        """The implementation that runs on these arguments, which are checked.

        Raises:
            NotImplementedError: the named one cannot run, or with `auto` none can; says why.
            ValueError: no such implementation.
        """
        implementation = self._meant_by(implementation)
        explanation = self.explain(implementation, Device.of(*args), *args)
        if explanation.implementation is not None:
            chosen = explanation.implementation
            anywhere = f"{chosen} or elsewhere"
            return self.implementations[
                anywhere if implementation == "auto" and anywhere in self.implementations else chosen
            ]
        reasons = (
            explanation.reasons if implementation == "auto" else {implementation: explanation.reasons[implementation]}
        )
        told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise NotImplementedError(f"{self.name} on {explanation.device}: {told}")

    def explain(self, implementation: str, device: Device, *args: Any) -> Explanation:
        """As :func:`explain`, for a device and what implementations take, or what has its shapes and dtypes."""
        names = ImplementationName.__args__  # type: ignore[attr-defined]
        if implementation not in names:
            raise ValueError(f"implementation: found {implementation!r}, expected one of {', '.join(map(repr, names))}")
        reasons: dict[str, str | None] = {name: known.refuses(device, *args) for name, known in self._named.items()}
        for name in names:
            if name not in reasons and name != "auto":
                meant = self._meant_by(name)
                reasons[name] = _NOT_HERE if meant == name else f"is {meant} here"
        if implementation == "auto":
            reasons |= {
                name: known.opt_in for name, known in self._named.items() if known.opt_in and reasons[name] is None
            }
        wanted = reasons if implementation == "auto" else (self._meant_by(implementation),)
        chosen = next((name for name in wanted if reasons[name] is None), None)
        return Explanation(self.name, device, chosen, reasons)

    def _meant_by(self, name: str) -> str:
        extended = _EXTENDS.get(name)
        return name if extended is None or name in self._named or extended not in self._named else extended


def explain(op: str | Callable[..., Any], *args: Any, implementation: ImplementationName = "auto") -> Explanation:
    """Says which implementation of an op runs on some arguments, and why no other.

    >>> tensorport.kernels.explain(mxfp4.matmul, x, w)

    Args:
        op: a function that takes `implementation`, of :mod:`tensorport.mxfp4` or :mod:`tensorport.kernels`, or its
            name.
        args: its arrays, in its order; ShapeDtypeStructs do as well.
        implementation: what the op would be asked for.

    Raises:
        TypeError, ValueError: no such op, no such implementation, or arrays that the op would refuse.
    """
    import tensorport.kernels  # noqa: F401, PLC0415 - which registers all ops

    name = op if isinstance(op, str) else getattr(op, "__name__", str(op))
    found = OPS.get(name) or OPS.get(f"mxfp4.{name}")
    if found is None:
        raise ValueError(f"op: found {name!r}, expected one of {', '.join(map(repr, OPS))}")
    return found.explain(implementation, Device.of(*args), *jax.eval_shape(found.arguments, *args))
