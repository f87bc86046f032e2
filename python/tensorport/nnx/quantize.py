"""quantize_model(): chosen layers of a dense NNX model become MXFP4 layers, in place."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Final

import jax
from flax import nnx

from tensorport.errors import MappingError
from tensorport.kernels.registry import ImplementationName
from tensorport.mxfp4 import QuantizationError, QuantizationReport, error_between
from tensorport.mxfp4.codec import ScaleRule
from tensorport.mxfp4.params import Where, _predicate
from tensorport.nnx.attention import MXFP4Attention
from tensorport.nnx.embed import MXFP4Embed, embed_fault
from tensorport.nnx.linear import MXFP4Linear, linear_fault
from tensorport.nnx.mlp import MXFP4MLP
from tensorport.nnx.moe import MXFP4MoE
from tensorport.reports import printable

__all__ = ["quantize_model"]

_OWN: Final = (MXFP4Attention, MXFP4Embed, MXFP4Linear, MXFP4MLP, MXFP4MoE)


def quantize_model(
    model: nnx.Module,
    where: Where,
    *,
    scale_rule: ScaleRule = "floor",
    implementation: ImplementationName = "auto",
) -> QuantizationReport:
    r"""Replaces chosen layers of a dense model by MXFP4 layers, in place, and reports what each of them lost.

    >>> report = quantize_model(model, r"mlp\.(up|down)$")

    Every `nnx.Linear` becomes an :class:`MXFP4Linear` and every `nnx.Embed` an :class:`MXFP4Embed` where its path is
    chosen, wherever it stands: in attributes, `nnx.List`, `nnx.Dict`, `nnx.Sequential`, lists, dicts, tuples and other
    pytrees of those. A layer with several places is replaced once, in all of them, if one of its paths is chosen;
    weights that several layers share are one variable of codes afterwards. Stacks of layers made by `nnx.vmap` stay
    stacks. Biases are the same variables as before, and metadata and shardings go over to the codes.

    Other layers stay as they are: convolutions, `nnx.LinearGeneral` (of which `nnx.MultiHeadAttention` is made), and
    what is within MXFP4 layers, such as the router of an :class:`MXFP4MoE`. Optimizers are made afterwards: weights
    that have become codes are no `nnx.Param`.

    Args:
        model: a module with dense layers in it.
        where: which layers, by dotted path, such as `layers.0.mlp.up`: a regular expression, of which `re.search` finds
            a match, or a callable `(path, layer) -> bool`.
        scale_rule: see :func:`tensorport.mxfp4.quantize`.
        implementation: of the new layers, see :func:`tensorport.kernels.explain`.

    Returns:
        Size and error of every replaced layer, by its first path.

    Raises:
        MappingError: no layer is chosen, or some that are chosen cannot be quantized without a change of their meaning
            (sizes that are no multiple of 32, subclasses, a `dot_general` of their own, ...), or are traced, or spread
            over processes; names all of these. The model is then as it was.
        TypeError: `model` is no module, or `where` neither a pattern nor a callable.
        ValueError: `model` is itself a dense layer, for which there is `from_linear` or `from_embed`; or `where` is no
            regular expression.

    Cost: one layer is dense and quantized at a time, beside what that layer takes again while its error is computed.
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model: found {type(model).__name__}, expected an nnx.Module")
    if isinstance(model, nnx.Linear | nnx.Embed):
        raise ValueError(
            f"model: found an nnx.{type(model).__name__} itself, expected a model with layers in it, which are "
            "replaced where they stand (MXFP4Linear.from_linear and MXFP4Embed.from_embed make single layers)"
        )
    entries = _find(model)
    is_chosen = _predicate(where)
    chosen = [entry for entry in entries if any(is_chosen(path, entry.layer) for path in entry.paths)]
    _refuse(entries, chosen, where)
    # Layers that share their weights together; each group is let go when it is done, and its dense weights with it.
    groups: dict[tuple[int, type], list[_Entry]] = {}
    for entry in chosen:
        weight = entry.layer.kernel if isinstance(entry.layer, nnx.Linear) else entry.layer.embedding
        groups.setdefault((id(weight), type(entry.layer)), []).append(entry)
    pending = list(reversed(groups.values()))
    del entries, chosen, groups, entry, weight
    tensors: dict[str, QuantizationError] = {}
    while pending:
        tensors |= _replace(pending.pop(), scale_rule, implementation)
    return QuantizationReport(tensors)


def _replace(
    group: list["_Entry"], scale_rule: ScaleRule, implementation: ImplementationName
) -> dict[str, QuantizationError]:
    """Replaces layers that share their weights; returns the error of each by its first path."""
    layers = [entry.layer for entry in group]
    new: list[Any] = [
        MXFP4Linear.from_linear(layer, scale_rule=scale_rule, implementation=implementation)
        if isinstance(layer, nnx.Linear)
        else MXFP4Embed.from_embed(layer, scale_rule=scale_rule, implementation=implementation)
        for layer in layers
    ]
    name = "kernel" if isinstance(layers[0], nnx.Linear) else "embedding"
    dense, codes = getattr(layers[0], name)[...], getattr(new[0], name)
    error = error_between(dense.swapaxes(-1, -2) if name == "kernel" else dense, codes[...])
    for entry, layer in zip(group, new, strict=True):
        setattr(layer, name, codes)
        for put in entry.put:
            put(layer)
    return {entry.paths[0]: error for entry in group}


@dataclasses.dataclass
class _Entry:
    """A dense layer of a model.

    Attributes:
        layer: the layer.
        paths: from the model to it, one for each of its places.
        put: for each place a function that puts another layer there.
        wrapper: a module around one of its places that computes with its dense weights, by its class; None where there
            is none.
    """

    layer: nnx.Linear | nnx.Embed
    paths: list[str]
    put: list[Callable[[nnx.Module], None]]
    wrapper: str | None = None


_WRAPPERS: Final = (nnx.SpectralNorm, nnx.WeightNorm)
"""Modules that change the weights of a layer before they call it, and find them by their type, nnx.Param."""


def _find(model: nnx.Module) -> list[_Entry]:
    """The dense layers of a model in the order of its attributes; containers that it has twice are entered once."""
    entries: dict[int, _Entry] = {}
    entered: set[int] = set()

    def visit(node: Any, path: tuple[str, ...], put: Callable[[Any], None], wrapper: str | None) -> None:
        if isinstance(node, nnx.Linear | nnx.Embed):
            entry = entries.setdefault(id(node), _Entry(node, [], []))
            entry.paths.append(".".join(path))
            entry.put.append(put)
            entry.wrapper = entry.wrapper or wrapper
            return
        if isinstance(node, (nnx.Variable, *_OWN)) or id(node) in entered:
            return
        if isinstance(node, nnx.Pytree | list | dict):
            entered.add(id(node))
        if isinstance(node, _WRAPPERS):
            wrapper = type(node).__name__
        for key, child, put_child in _children(node, put):
            visit(child, (*path, key), put_child, wrapper)

    visit(model, (), lambda _: None, None)
    return list(entries.values())


def _children(node: Any, put: Callable[[Any], None]) -> Iterator[tuple[str, Any, Callable[[Any], None]]]:
    """Key and value of all that a node holds, and how another value is put there; `put` is that of the node itself."""
    if isinstance(node, nnx.Pytree):
        for name, child in list(vars(node).items()):
            if not name.startswith("_pytree__"):
                yield name, child, partial(setattr, node, name)
    elif isinstance(node, list | dict):
        for key, child in list(enumerate(node) if isinstance(node, list) else node.items()):
            yield str(key), child, partial(node.__setitem__, key)
    else:
        # A tuple or another pytree, which is made anew around what is put there; of a leaf, nothing.
        children, structure = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda other: other is not node)
        values = [child for _, child in children]

        def put_at(index: int, value: Any) -> None:
            values[index] = value
            put(jax.tree.unflatten(structure, values))

        for index, (key, child) in enumerate(children):
            if key:
                yield jax.tree_util.keystr(key, simple=True), child, partial(put_at, index)


def _refuse(entries: list[_Entry], chosen: list[_Entry], where: Where) -> None:
    """Raises MappingError where nothing is chosen, or what cannot be replaced."""
    if not chosen:
        paths = _listed(path for entry in entries for path in entry.paths)
        raise MappingError(
            f"where: found {len(entries)} dense layers, none of them chosen by {where!r}, expected one or more{paths}"
        )
    faults = [(entry.paths[0], _fault(entry)) for entry in chosen]
    told = [f"{path}: {fault}" for path, fault in faults if fault is not None]
    if told:
        raise MappingError(f"{len(told)} of {len(chosen)} chosen layers cannot be quantized:{_listed(told)}")


def _fault(entry: _Entry) -> str | None:
    if entry.wrapper is not None:
        return f"found it within an nnx.{entry.wrapper}, which computes with its dense weights"
    layer = entry.layer
    fault = linear_fault(layer) if isinstance(layer, nnx.Linear) else embed_fault(layer)
    if fault is not None:
        return fault
    dense = (layer.kernel if isinstance(layer, nnx.Linear) else layer.embedding)[...]
    # The error is computed of values.
    if isinstance(dense, jax.core.Tracer):
        return "found traced weights, expected values: models are quantized outside of jit"
    if isinstance(dense, jax.Array) and not dense.is_fully_addressable:
        return "found weights of which this process holds a part, expected all of them"
    return None


def _listed(lines: Iterable[str]) -> str:
    return "".join(f"\n  {printable(line)}" for line in lines)
