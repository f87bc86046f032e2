"""How many (token, expert) pairs, and rows of a matrix, are multiplied at once."""

import dataclasses

__all__ = ["Config"]


@dataclasses.dataclass(frozen=True, slots=True)
class Config:
    """Settings of the implementation `xla`.

    Attributes:
        block_m: pairs of one expert multiplied at once.
        block_n: rows of its matrices decoded at once.
    """

    block_m: int
    block_n: int

    @classmethod
    def choose(cls, pairs: int, num_experts: int, width: int, hidden: int) -> "Config":  # noqa: ARG003
        """The settings for so many pairs and gate_up [num_experts, width, hidden]."""
        return cls(block_m=min(256, max(1, pairs)), block_n=256)
