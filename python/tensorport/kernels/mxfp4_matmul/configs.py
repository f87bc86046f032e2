"""How large the tiles are."""

import dataclasses
import itertools
from typing import Final

from jax.typing import DTypeLike

from tensorport.kernels import tuned
from tensorport.kernels.registry import Device

__all__ = ["FEW_ROWS", "Config", "TritonConfig"]

FEW_ROWS: Final = 4
"""So many rows of x are multiplied without tensor cores, whose tiles have sixteen."""


@dataclasses.dataclass(frozen=True, slots=True)
class Config:
    """Settings of the implementation `xla`.

    Attributes:
        block_n: rows of w decoded at once.
    """

    block_n: int

    @classmethod
    def choose(cls, device: Device) -> "Config":
        """The settings for a device.

        On CPU a tile stays in the second-level cache: 192 rows of 2880 values are 2 MB in float32, on two cores; 32 to
        288 rows were equally fast on one. Elsewhere every tile is a launch, and larger ones are fewer; not measured.
        """
        return cls(block_n=192 if device.platform == "cpu" else 2048)


@dataclasses.dataclass(frozen=True, slots=True)
class TritonConfig:
    """Settings of the implementation `pallas_triton`; powers of two, as Triton wants them.

    Attributes:
        block_m: rows of x to a program.
        block_n: rows of w to a program.
        block_k: bytes of a row of w to a step, so twice as many elements.
        num_warps: of 32 threads, to a program.
        num_stages: loads that are under way at once.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    @classmethod
    def choose(cls, m: int, n: int, k: int, dtype: DTypeLike) -> "TritonConfig":
        """The settings for x [m, k] of a dtype and w [n, k]: what was measured on this device, or those of the rule."""
        found = tuned.find("mxfp4.matmul", dtype, up_to={"m": m}, n=n, k=k)
        return cls.rule(m) if found is None else cls(**found)

    @classmethod
    def rule(cls, m: int) -> "TritonConfig":
        """The settings for `m` rows of x where nothing was measured."""
        if m <= FEW_ROWS:
            return cls(block_m=FEW_ROWS, block_n=8, block_k=512, num_warps=4, num_stages=2)
        if m <= 64:
            return cls(block_m=16, block_n=64, block_k=64, num_warps=4, num_stages=3)
        return cls(block_m=64, block_n=64, block_k=64, num_warps=4, num_stages=3)

    @classmethod
    def space(cls, m: int) -> "list[TritonConfig]":
        """What can be tried for `m` rows of x: without tensor cores for few, with them for others."""
        if m <= FEW_ROWS:
            sizes = itertools.product([FEW_ROWS], [4, 8, 16, 32], [256, 512, 1024], [2, 4, 8], [2])
        else:
            blocks_m = [size for size in (16, 32, 64, 128) if size < 2 * max(m, 16)]
            sizes = itertools.product(blocks_m, [32, 64, 128], [32, 64, 128], [4, 8], [2, 3, 4])
        return [cls(*fields) for fields in sizes]
