"""How many tokens of one expert, and rows of its matrix, are multiplied at once."""

import dataclasses

__all__ = ["Config"]


@dataclasses.dataclass(frozen=True, slots=True)
class Config:
    """Settings of the implementation `xla`.

    Attributes:
        block_m: tokens of one expert multiplied at once.
        block_n: rows of its matrix decoded at once.
    """

    block_m: int
    block_n: int

    @classmethod
    def choose(cls, tokens: int, num_experts: int, n: int, k: int) -> "Config":  # noqa: ARG003
        """The settings for x [tokens, k] and w [num_experts, n, k]."""
        return cls(block_m=min(256, max(1, tokens)), block_n=256)
