"""How many tokens of one expert, and rows of its matrices, are multiplied at once."""

import dataclasses
from typing import Final

from tensorport.kernels.grouping import Size, rows_of_chunk
from tensorport.kernels.mxfp4_matmul.configs import Config as MatmulConfig
from tensorport.kernels.mxfp4_matmul.configs import TritonConfig
from tensorport.kernels.registry import Device

__all__ = ["FEW_TOKENS", "Config", "choose_triton"]

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


def choose_triton(rows: int, num_experts: int) -> TritonConfig:
    """The settings of the implementation `pallas_triton` for so many rows of x. Not measured on a GPU.

    Of many rows a chunk of one expert is what a program has as rows of x: at least the sixteen of a tensor core.
    """
    if rows <= FEW_TOKENS:
        return TritonConfig.choose(1)
    block_m = min(max(rows_of_chunk(rows, num_experts), 16), 64)
    return dataclasses.replace(TritonConfig.choose(block_m), block_m=block_m)
