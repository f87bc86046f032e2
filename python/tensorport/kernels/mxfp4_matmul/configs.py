"""How many rows of a matrix are decoded at once."""

import dataclasses

__all__ = ["Config"]


@dataclasses.dataclass(frozen=True, slots=True)
class Config:
    """Settings of the implementation `xla`.

    Attributes:
        block_n: rows of w decoded at once.
    """

    block_n: int

    @classmethod
    def choose(cls, m: int, n: int, k: int) -> "Config":  # noqa: ARG003 - what the choice may depend on
        """The settings for x [m, k] and w [n, k]."""
        return cls(block_n=256)
