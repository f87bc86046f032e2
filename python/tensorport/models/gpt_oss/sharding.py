"""Where parameters go on a mesh of devices: heads and vocabulary by tensor, experts by expert, rows by data.

A mesh has any of three axes. `data`: rows of the batch; every device of it has all that the others have. `tensor` and
`expert`: heads, the vocabulary and the width of the stream in the embeddings are divided over both together; experts
over `expert`, and the width within an expert over `tensor`.
"""

import dataclasses

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tensorport.errors import MappingError
from tensorport.models.gpt_oss.config import Config
from tensorport.mxfp4.types import MX_BLOCK_SIZE

__all__ = ["ExpertSpecs", "auto_mesh", "cache_sharding", "check_mesh", "expert_specs", "rows_spec", "sharding_rules"]

_AXES = ("data", "expert", "tensor")


def sharding_rules(mesh: Mesh) -> list[tuple[str, PartitionSpec]]:
    """Rules for `load(..., sharding=..., mesh=mesh)` and `load_params` of a checkpoint of Hugging Face.

    >>> mesh = jax.make_mesh((4, 2), ("expert", "tensor"))
    >>> model = gpt_oss.load(path, sharding=gpt_oss.sharding_rules(mesh), mesh=mesh)

    Args:
        mesh: with any of the axes `data`, `expert` and `tensor`. gpt-oss has 8 heads of keys, so that `expert` times
            `tensor` divides 8; and 90 blocks of 32 within an expert, so that `tensor` is 1, 2, 3, 5 or 6.

    Raises:
        ValueError: another axis.
    """
    _check_axes(mesh)
    both = _both(mesh)
    experts, width = _present(mesh, "expert"), _present(mesh, "tensor")
    return [
        (r"embed_tokens\.weight$", PartitionSpec(None, both)),
        (r"lm_head\.weight$", PartitionSpec(both, None)),
        (r"self_attn\.[qkv]_proj\.weight$", PartitionSpec(both, None)),
        (r"self_attn\.[qkv]_proj\.bias$", PartitionSpec(both)),
        (r"self_attn\.o_proj\.weight$", PartitionSpec(None, both)),
        (r"self_attn\.sinks$", PartitionSpec(both)),
        (r"experts\.gate_up_proj$", PartitionSpec(experts, width, None)),
        (r"experts\.gate_up_proj_bias$", PartitionSpec(experts, width)),
        (r"experts\.down_proj$", PartitionSpec(experts, None, width)),
        (r"experts\.down_proj_bias$", PartitionSpec(experts, None)),
        # Norms, routers, and the bias that is added once.
        (r"norm\.weight$|router\.(weight|bias)$|o_proj\.bias$", PartitionSpec()),
    ]


@dataclasses.dataclass(frozen=True)
class ExpertSpecs:
    """How the experts of a layer are spread.

    Attributes:
        experts: axis that divides them; None for none.
        width: axis that divides the width within each; None for none.
    """

    experts: str | None
    width: str | None

    @property
    def axes(self) -> tuple[str, ...]:
        """Axes over which parts of sums stand."""
        return tuple(axis for axis in (self.experts, self.width) if axis is not None)

    @property
    def parameters(self) -> tuple[PartitionSpec, ...]:
        """Of gate_up, its bias, down, its bias. Those of an MXFP4Array hold for its codes and its scales."""
        return (
            PartitionSpec(self.experts, self.width),
            PartitionSpec(self.experts, self.width),
            PartitionSpec(self.experts, None, self.width),
            PartitionSpec(self.experts),
        )


def expert_specs(mesh: Mesh) -> ExpertSpecs | None:
    """How experts are spread over a mesh; None if every device has all of them."""
    specs = ExpertSpecs(_present(mesh, "expert"), _present(mesh, "tensor"))
    return specs if specs.axes else None


def rows_spec(mesh: Mesh, batch: int) -> PartitionSpec:
    """How rows of a batch are spread: over `data` if it divides them."""
    data = _present(mesh, "data")
    return PartitionSpec(data) if data is not None and batch % mesh.shape[data] == 0 else PartitionSpec()


def cache_sharding(mesh: Mesh, batch: int) -> NamedSharding:
    """Of keys and values [B, slots, G, D]: heads as the projections that make them."""
    (*rows,) = rows_spec(mesh, batch)
    return NamedSharding(mesh, PartitionSpec(*(rows or [None]), None, _both(mesh), None))


def auto_mesh(mesh: Mesh) -> Mesh:
    """The same devices with automatic axes, which the model needs; those of `jax.make_mesh` are explicit by default."""
    return Mesh(mesh.devices, mesh.axis_names)


def check_mesh(config: Config, mesh: Mesh) -> None:
    """Refuses a mesh that does not divide the model.

    Raises:
        MappingError: sizes that the mesh's axes do not divide; says all.
        ValueError: another axis.
    """
    _check_axes(mesh)
    tensor, expert = (mesh.shape.get(axis, 1) for axis in ("tensor", "expert"))
    sizes = {
        "num_key_value_heads": (config.num_key_value_heads, tensor * expert, "expert times tensor"),
        "vocab_size": (config.vocab_size, tensor * expert, "expert times tensor"),
        "hidden_size": (config.hidden_size, tensor * expert, "expert times tensor"),
        "num_local_experts": (config.num_local_experts, expert, "expert"),
        "intermediate_size / 32": (config.intermediate_size // MX_BLOCK_SIZE, tensor, "tensor"),
    }
    faults = [
        f"{name}: found {size}, expected a multiple of {parts} ({axes})"
        for name, (size, parts, axes) in sizes.items()
        if size % parts
    ]
    if faults:
        raise MappingError(f"mesh {dict(mesh.shape)} does not divide the model:\n  " + "\n  ".join(faults))


def _check_axes(mesh: Mesh) -> None:
    unknown = [name for name in mesh.axis_names if name not in _AXES]
    if unknown:
        raise ValueError(f"mesh: found the axes {', '.join(map(repr, unknown))}, expected some of {', '.join(_AXES)}")


def _present(mesh: Mesh, name: str) -> str | None:
    """The axis, if it divides anything."""
    return name if mesh.shape.get(name, 1) > 1 else None


def _both(mesh: Mesh) -> tuple[str, ...] | None:
    """The axes that heads and the vocabulary are divided over."""
    return tuple(name for name in ("expert", "tensor") if _present(mesh, name)) or None
