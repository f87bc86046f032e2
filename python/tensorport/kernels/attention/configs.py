"""How many queries and keys are worked on at once."""

import dataclasses
import itertools

from jax.typing import DTypeLike

from tensorport.kernels import tuned

__all__ = ["Config", "TritonConfig"]

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


_PROGRAMS = 256  # about two for each multiprocessor of an H100


@dataclasses.dataclass(frozen=True, slots=True)
class TritonConfig:
    """Settings of the implementation `pallas_triton`; sizes of blocks are powers of two, as Triton wants them.

    Attributes:
        block_rows: queries of one group of heads to a program, each head counted; at least the 16 of a tensor core.
        block_keys: keys to a step.
        splits: programs that share the keys of one block of queries.
        num_warps: of 32 threads, to a program.
        num_stages: loads that are under way at once.
    """

    block_rows: int
    block_keys: int
    splits: int
    num_warps: int
    num_stages: int

    @classmethod
    def choose(cls, groups: int, rows: int, keys: int, head_dim: int, dtype: DTypeLike) -> "TritonConfig":
        """The settings for groups of heads, queries of each, and keys: what was measured, or those of the rule."""
        up_to = {"groups": groups, "rows": rows, "keys": keys}
        found = tuned.find("attention", dtype, up_to=up_to, head_dim=head_dim)
        return cls.rule(groups, rows, keys) if found is None else cls(**found)

    @classmethod
    def rule(cls, groups: int, rows: int, keys: int) -> "TritonConfig":
        """The settings where nothing was measured.

        The keys are divided where queries alone would leave multiprocessors without work.
        """
        block_rows, block_keys = (16 if rows <= 16 else 64), 64
        programs = groups * -(-rows // block_rows)
        splits = max(1, min(_PROGRAMS // programs, -(-keys // block_keys)))
        return cls(block_rows, block_keys, splits, num_warps=4, num_stages=2)

    @classmethod
    def space(cls, rows: int, keys: int) -> "list[TritonConfig]":
        """What can be tried for so many queries of a group of heads, and keys."""
        blocks_rows = [size for size in (16, 32, 64, 128) if size < 2 * max(rows, 16)]
        splits = [number for number in (1, 2, 4, 8, 16, 32) if number == 1 or (rows <= 64 and number * 32 <= keys)]
        sizes = itertools.product(blocks_rows, [32, 64, 128], splits, [4, 8], [2, 3])
        return [cls(*fields) for fields in sizes]
