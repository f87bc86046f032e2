"""How many tokens of one expert, and rows of its matrices, are multiplied at once."""

import dataclasses

from tensorport.kernels.grouping import Size, rows_of_chunk
from tensorport.kernels.mxfp4_matmul.configs import Config as MatmulConfig
from tensorport.kernels.registry import Device

__all__ = ["Config"]


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
