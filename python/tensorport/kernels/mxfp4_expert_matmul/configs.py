"""How many tokens of one expert, and rows of its matrices, are multiplied at once."""

import dataclasses
from typing import Final

from jax.typing import DTypeLike

from tensorport.kernels import tuned
from tensorport.kernels.grouping import Size, rows_of_chunk
from tensorport.kernels.mxfp4_matmul.configs import Config as MatmulConfig
from tensorport.kernels.mxfp4_matmul.configs import TritonConfig
from tensorport.kernels.registry import Device

__all__ = ["FEW_TOKENS", "Config", "choose_triton", "triton_rule", "triton_space"]

FEW_TOKENS: Final = 16
"""So many rows of x are each multiplied alone by `pallas_triton`: chunks of one expert would have one or two."""


@dataclasses.dataclass(frozen=True, slots=True)
class Config:
    """Settings of the implementation `xla`.

    Attributes:
        block_m: rows of x (tokens, or tokens once for each of their experts) of one expert multiplied at once.
        block_n: rows of its matrices decoded at once.
    """

    block_m: int
    block_n: int

    @classmethod
    def choose(cls, device: Device, rows: Size, num_experts: int) -> "Config":
        """The settings for so many rows of x on a device."""
        return cls(rows_of_chunk(rows, num_experts), MatmulConfig.choose(device).block_n)


def choose_triton(  # noqa: PLR0917 - an op and its sizes
    op: str, rows: int, experts: int, n: int, k: int, dtype: DTypeLike
) -> TritonConfig:
    """The settings of `pallas_triton` for so many rows of x: what was measured on this device, or those of the rule.

    `n` and `k` are those of a matrix of x; of `mxfp4.moe` that is its first.
    """
    found = tuned.find(op, dtype, up_to={"rows": rows}, experts=experts, n=n, k=k)
    return triton_rule(rows, experts) if found is None else TritonConfig(**found)


def triton_rule(rows: int, num_experts: int) -> TritonConfig:
    """The settings where nothing was measured.

    Of many rows a chunk of one expert is what a program has as rows of x: at least the sixteen of a tensor core.
    """
    if rows <= FEW_TOKENS:
        return TritonConfig.rule(1)
    block_m = min(max(rows_of_chunk(rows, num_experts), 16), 64)
    return dataclasses.replace(TritonConfig.rule(block_m), block_m=block_m)


def triton_space(rows: int) -> list[TritonConfig]:
    """What can be tried for so many rows of x."""
    return TritonConfig.space(1 if rows <= FEW_TOKENS else rows)
