"""Rows grouped by expert: every valid row in one chunk, of its expert, and no chunk too many."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorport.kernels.grouping import chunk_by_expert

IDS = st.lists(st.integers(-2, 8), min_size=37, max_size=37)  # of one length, so that JAX compiles once


def check(ids: list[int], num_experts: int, block_m: int) -> None:
    expert_ids = np.asarray(ids, np.int32)
    chunks = chunk_by_expert(jnp.asarray(expert_ids), num_experts, block_m)
    is_valid = (expert_ids >= 0) & (expert_ids < num_experts)
    np.testing.assert_array_equal(np.asarray(chunks.is_valid), is_valid)
    seen: list[int] = []
    experts: list[int] = []
    for number in range(int(chunks.total)):
        rows, is_there = map(np.asarray, chunks.rows(jnp.int32(number), block_m))
        expert = int(chunks.expert[number])
        assert rows.shape == (block_m,)
        assert 1 <= is_there.sum() <= block_m
        assert (expert_ids[rows[is_there]] == expert).all()
        seen += rows[is_there].tolist()
        experts.append(expert)
    assert sorted(seen) == np.flatnonzero(is_valid).tolist()
    # In the order of the experts, and within an expert in that of the rows.
    assert experts == sorted(experts)
    assert seen == np.flatnonzero(is_valid)[np.argsort(expert_ids[is_valid], kind="stable")].tolist()
    counts = np.bincount(expert_ids[is_valid], minlength=num_experts)
    assert int(chunks.total) == sum(-(-count // block_m) for count in counts)


@given(IDS, st.sampled_from([1, 3, 7]), st.sampled_from([1, 4, 11, 50]))
@settings(max_examples=60, deadline=None)
def test_every_valid_row_is_in_one_chunk_of_its_expert(ids: list[int], num_experts: int, block_m: int) -> None:
    check(ids, num_experts, block_m)


@pytest.mark.parametrize("block_m", [1, 3, 64])
def test_all_rows_of_one_expert_and_none_at_all(block_m: int) -> None:
    check([2] * 17, 5, block_m)
    check([-1] * 17, 5, block_m)
    check(list(range(5)), 5, block_m)


def test_no_loop_is_in_it() -> None:
    """XLA leaves loops out of CUDA graphs, and the host waits for a GPU at each turn."""
    ids = jax.ShapeDtypeStruct((37,), jnp.int32)
    text = jax.jit(lambda ids: chunk_by_expert(ids, 6, 4)).lower(ids).as_text()
    assert "while" not in text
