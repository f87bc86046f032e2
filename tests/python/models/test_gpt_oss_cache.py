"""The cache of keys and values: against dictionaries from positions to tokens."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from tensorport.models.gpt_oss.cache import Cache, LayerCache, empty_cache
from tensorport.models.gpt_oss.config import Config, Rope

KEY_HEADS, HEAD_DIM = 3, 2

CONFIG = Config(
    vocab_size=519,
    hidden_size=96,
    intermediate_size=160,
    num_attention_heads=12,
    num_key_value_heads=KEY_HEADS,
    head_dim=HEAD_DIM,
    num_local_experts=6,
    num_experts_per_tok=4,
    layer_types=("sliding_attention", "full_attention", "sliding_attention", "full_attention", "full_attention"),
    sliding_window=8,
    rope=Rope(150_000.0),
    max_position_embeddings=1000,
)


def empty(rows: int, slots: int, dtype: Any = jnp.float32) -> LayerCache:
    return LayerCache.empty(rows, slots, KEY_HEADS, HEAD_DIM, dtype=dtype)


def tokens(numbers: Any) -> tuple[jax.Array, jax.Array]:
    """Keys and values of tokens with such numbers [b, t]: different in every place."""
    shape = (*np.shape(numbers), KEY_HEADS, HEAD_DIM)
    places = np.arange(KEY_HEADS * HEAD_DIM).reshape(KEY_HEADS, HEAD_DIM) / 8
    keys = np.broadcast_to(np.asarray(numbers, np.float32)[..., None, None] + places, shape)
    return jnp.asarray(keys), jnp.asarray(-1 - keys)


def held(layer: LayerCache, lengths: Any) -> list[dict[int, float]]:
    """For each row what a reader finds: the number of the token at each position."""
    positions = np.asarray(layer.positions(jnp.asarray(lengths, jnp.int32)))
    assert positions.shape == layer.keys.shape[:2]
    keys, values = (np.asarray(array, np.float32) for array in (layer.keys, layer.values))
    found = []
    for row, of in enumerate(positions):
        there = np.flatnonzero(of >= 0)
        assert set(of[of < 0]) <= {-1}
        assert len({*of[there]}) == len(there), "no position is in two slots"
        np.testing.assert_array_equal(there, of[there] % layer.keys.shape[1])
        expected = tokens(keys[row, there, 0, 0])
        np.testing.assert_array_equal(keys[row, there], expected[0])
        np.testing.assert_array_equal(values[row, there], expected[1])
        found.append({int(of[slot]): float(keys[row, slot, 0, 0]) for slot in there})
    return found


class Plain:
    """The same cache as dictionaries: everything is kept, and the last ones of each row are what there is."""

    def __init__(self, rows: int, slots: int) -> None:
        self.slots = slots
        self.rows: list[dict[int, float]] = [{} for _ in range(rows)]

    def write(self, numbers: Any, positions: Any) -> None:
        for row, held, at in zip(self.rows, numbers, positions, strict=True):
            row.update({int(place): float(number) for number, place in zip(held, at, strict=True) if place >= 0})

    def held(self, lengths: Any) -> list[dict[int, float]]:
        return [
            {position: number for position, number in row.items() if length - self.slots <= position < length}
            for row, length in zip(self.rows, lengths, strict=True)
        ]


@st.composite
def writes(draw: st.DrawFn) -> tuple[int, int, list[Any]]:
    """Rows, slots, and chunks: for each which of its places in each row are tokens, and which are padding."""
    rows = draw(st.integers(1, 3))
    widths = draw(st.lists(st.integers(1, 11), min_size=1, max_size=5))
    chunks = [
        np.array(draw(st.lists(st.booleans(), min_size=rows * width, max_size=rows * width))).reshape(rows, width)
        for width in widths
    ]
    return rows, draw(st.integers(1, 7)), chunks


@settings(max_examples=60, deadline=None)
@given(writes())
def test_a_ring_holds_the_last_tokens_of_each_row(case: tuple[int, int, list[Any]]) -> None:
    """Chunks are longer and shorter than the ring, rows are ragged, and padding is anywhere."""
    rows, slots, chunks = case
    cache, plain, lengths, number = empty(rows, slots), Plain(rows, slots), np.zeros(rows, np.int32), 1
    for is_token in chunks:
        positions = np.where(is_token, lengths[:, None] + np.cumsum(is_token, axis=1) - 1, -1)
        numbers = number + np.arange(positions.size).reshape(positions.shape)
        number += positions.size
        lengths = (lengths + is_token.sum(axis=1)).astype(np.int32)
        cache = cache.write(*tokens(numbers), jnp.asarray(positions, jnp.int32), jnp.asarray(lengths))
        plain.write(numbers, positions)
        assert held(cache, lengths) == plain.held(lengths)


@pytest.mark.parametrize(
    ("slots", "length", "expected"),
    [
        (4, 0, [-1, -1, -1, -1]),
        (4, 1, [0, -1, -1, -1]),
        (4, 3, [0, 1, 2, -1]),
        (4, 4, [0, 1, 2, 3]),
        (4, 5, [4, 1, 2, 3]),
        (4, 11, [8, 9, 10, 7]),
        (1, 0, [-1]),
        (1, 9, [8]),
        (3, 2**31 - 1, [2**31 - 2, 2**31 - 4, 2**31 - 3]),
    ],
)
def test_positions_of_slots(slots: int, length: int, expected: list[int]) -> None:
    found = empty(2, slots).positions(jnp.asarray([length, 0], jnp.int32))
    np.testing.assert_array_equal(found, [expected, [-1] * slots])


def test_padding_is_not_written() -> None:
    before = empty(2, 4).write(*tokens([[7, 8], [9, 0]]), jnp.asarray([[0, 1], [0, -1]]), jnp.asarray([2, 1]))
    nothing = jnp.full((2, 3), -1)
    after = before.write(*tokens(np.full((2, 3), np.nan)), nothing, jnp.asarray([2, 1]))
    for found, expected in zip(after, before, strict=True):
        np.testing.assert_array_equal(found, expected)
    # On the left of a row, too.
    after = before.write(*tokens([[0, 3], [4, 5]]), jnp.asarray([[-1, 2], [1, 2]]), jnp.asarray([3, 3]))
    assert held(after, [3, 3]) == [{0: 7, 1: 8, 2: 3}, {0: 9, 1: 4, 2: 5}]


def test_of_a_chunk_longer_than_the_ring_the_last_tokens_stay() -> None:
    lengths = jnp.asarray([10, 4], jnp.int32)
    positions = np.arange(10) * np.ones((2, 1), int)
    positions[1, 4:] = -1
    after = empty(2, 3).write(*tokens([range(1, 11), range(11, 21)]), jnp.asarray(positions), lengths)
    assert held(after, lengths) == [{7: 8, 8: 9, 9: 10}, {1: 12, 2: 13, 3: 14}]


def test_a_smaller_length_forgets_and_writes_again() -> None:
    after = empty(1, 6).write(*tokens([range(1, 6)]), jnp.arange(5)[None], jnp.asarray([5]))
    assert held(after, [2]) == [{0: 1, 1: 2}]
    again = after.write(*tokens([[9]]), jnp.asarray([[2]]), jnp.asarray([3]))
    assert held(again, [3]) == [{0: 1, 1: 2, 2: 9}]


def test_keys_and_values_are_rounded_to_the_dtype_of_the_cache() -> None:
    keys, values = tokens([[1 / 3]])
    after = empty(1, 2, jnp.bfloat16).write(keys, values, jnp.asarray([[0]]), jnp.asarray([1]))
    assert after.keys.dtype == after.values.dtype == jnp.bfloat16
    np.testing.assert_array_equal(after.keys[:, :1], keys.astype(jnp.bfloat16))
    np.testing.assert_array_equal(after.values[:, :1], values.astype(jnp.bfloat16))


def test_jit_and_donation_change_nothing() -> None:
    args = (*tokens([[1, 2, 3], [4, 5, 0]]), jnp.asarray([[0, 1, 2], [0, 1, -1]]), jnp.asarray([3, 2]))
    expected = empty(2, 2).write(*args)
    before = empty(2, 2)
    found = jax.jit(LayerCache.write, donate_argnums=0)(before, *args)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    assert before.keys.is_deleted()


def test_a_full_layer_has_a_slot_for_every_position_and_a_sliding_one_a_ring() -> None:
    cache = empty_cache(CONFIG, 4, 20)
    shapes = [layer.keys.shape for layer in cache.layers]
    assert shapes == [(4, slots, KEY_HEADS, HEAD_DIM) for slots in (8, 20, 8, 20, 20)]
    assert {(leaf.dtype.name, leaf.shape) for layer in cache.layers for leaf in layer} == {
        ("bfloat16", shape) for shape in shapes
    }
    np.testing.assert_array_equal(cache.lengths, np.zeros(4, np.int32))
    assert held(cache.layers[0], cache.lengths) == [{}] * 4
    assert cache.max_length(CONFIG) == 20
    assert empty_cache(CONFIG, 1, 2, dtype=jnp.float32).layers[0].values.dtype == jnp.float32


def test_without_full_layers_there_is_no_last_position() -> None:
    ring = empty(1, 8)
    sizes: dict[str, Any] = {field: getattr(CONFIG, field) for field in CONFIG.__dataclass_fields__}
    config = Config(**sizes | {"layer_types": ("sliding_attention",)})
    assert Cache((ring,), jnp.zeros(1, jnp.int32)).max_length(config) is None


def test_a_cache_may_be_spread_over_devices() -> None:
    mesh = jax.make_mesh((3,), ("tensor",), devices=jax.devices()[:3])
    sharding = NamedSharding(mesh, PartitionSpec(None, None, "tensor"))
    cache = empty_cache(CONFIG, 2, 5, sharding=sharding)
    for layer in cache.layers:
        assert [shard.data.shape[2] for shard in layer.keys.addressable_shards] == [1, 1, 1]
        assert layer.values.sharding == sharding


@pytest.mark.parametrize(("batch", "max_length"), [(0, 5), (3, 0), (-1, -1)])
def test_an_empty_batch_or_length_is_refused(batch: int, max_length: int) -> None:
    with pytest.raises(ValueError, match=f"empty_cache: found batch {batch} and max_length {max_length}, expected at"):
        empty_cache(CONFIG, batch, max_length)
