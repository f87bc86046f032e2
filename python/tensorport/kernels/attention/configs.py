"""How many queries are worked on at once."""

import dataclasses

__all__ = ["Config"]

_MOST_SCORES = 1 << 24  # 67 MB in float32: bounds the memory of long prompts, and still fills many cores


@dataclasses.dataclass(frozen=True, slots=True)
class Config:
    """Settings of the implementation `xla`.

    Attributes:
        block_t: queries of a row whose scores are in memory at once.
    """

    block_t: int

    @classmethod
    def choose(cls, batch: int, queries: int, heads: int, keys: int) -> "Config":
        """The settings for arrays of such sizes."""
        fitting = _MOST_SCORES // max(batch * heads * keys, 1)
        return cls(max(1, min(queries, fitting)))
