"""Tokens grouped by expert, in chunks of one expert each: dense work for ragged groups."""

from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

__all__ = ["Chunks", "Size", "chunk_by_expert", "rows_of_chunk"]

Size: TypeAlias = Any
"""An int, or a symbolic size of `jax.export`."""

_MOST_ROWS = 256  # enough that decoding is small beside multiplying, and a chunk between two layers is a few MB


class Chunks(NamedTuple):
    """Where the rows of each expert stand after sorting, in chunks of at most `block_m` rows.

    Attributes:
        order: the sorted rows: positions in `expert_ids`, first those of expert 0. Rows with an id that no expert has
            stand last and in no chunk.
        expert: for each chunk its expert; what stands behind `total` chunks means nothing.
        start: for each chunk its first row in `order`.
        stop: for each chunk the row behind its last.
        total: number of chunks.
        is_valid: for each of the unsorted rows, whether there is such an expert.
    """

    order: Int32[Array, " rows"]
    expert: Int32[Array, " chunks"]
    start: Int32[Array, " chunks"]
    stop: Int32[Array, " chunks"]
    total: Int32[Array, ""]
    is_valid: Bool[Array, " rows"]

    def rows(self, number: Int32[Array, ""], block_m: int) -> tuple[Int32[Array, " block_m"], Bool[Array, " block_m"]]:
        """The unsorted positions of a chunk's rows, and which of them are there: a chunk may have fewer rows."""
        place = self.start[number] + jnp.arange(block_m, dtype=jnp.int32)
        return self.order[jnp.minimum(place, self.order.shape[0] - 1)], place < self.stop[number]


def rows_of_chunk(rows: Size, num_experts: int) -> int:
    """A size of chunks for so many rows: twice an even share of an expert, as a power of two.

    A chunk decodes its expert's matrices once, and a row that is not there costs as much as one that is. Measured on a
    CPU (2 cores with AVX-512, 2026-11) with 32 experts of gpt-oss-20b: for 4 rows chunks of 1 took 30 ms and of 4 took
    62 ms; for 64 rows chunks of 4 took 354 ms, of 1 took 628 ms and of 16 took 540 ms.
    """
    if not isinstance(rows, int):
        return _MOST_ROWS
    return min(_MOST_ROWS, 1 << (-(-2 * rows // num_experts) - 1).bit_length())


def chunk_by_expert(expert_ids: Int32[Array, " rows"], num_experts: int, block_m: int) -> Chunks:
    """Groups rows by expert and divides each group into chunks. Takes at least one expert."""
    (rows,) = expert_ids.shape
    is_valid = (expert_ids >= 0) & (expert_ids < num_experts)
    ids = jnp.where(is_valid, expert_ids, num_experts)
    order = jnp.argsort(ids, stable=True).astype(jnp.int32)
    sizes = jnp.zeros(num_experts + 1, jnp.int32).at[ids].add(1)
    first_row = jnp.cumsum(sizes, dtype=jnp.int32) - sizes
    chunks_of = -(-sizes[:-1] // block_m)
    chunks_until = jnp.cumsum(chunks_of, dtype=jnp.int32)
    # No more than one chunk is short for each expert.
    most = rows // block_m + num_experts
    if isinstance(rows, int):
        most = min(rows, most)
    number = jnp.arange(most, dtype=jnp.int32)
    # Compared with all: a search is a loop, at which the host waits for a GPU once for each turn.
    expert = jnp.searchsorted(chunks_until, number, side="right", method="compare_all").astype(jnp.int32)
    expert = jnp.minimum(expert, num_experts - 1)
    within = number - (chunks_until - chunks_of)[expert]
    start = first_row[expert] + within * block_m
    stop = jnp.minimum(start + block_m, first_row[expert + 1])
    return Chunks(order, expert, start, stop, chunks_until[-1], is_valid)
