"""How many rows of a matrix are decoded at once."""

import dataclasses

from tensorport.kernels.registry import Device

__all__ = ["Config"]


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
