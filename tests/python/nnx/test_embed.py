"""MXFP4Embed: rows by index, and logits by products with all of them."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.nnx.nn import dtypes
from tensorport import mxfp4
from tensorport.nnx import MXFP4Embed

ROWS, FEATURES = 37, 96


@pytest.fixture
def layer() -> MXFP4Embed:
    return MXFP4Embed(ROWS, FEATURES, rngs=nnx.Rngs(1))


def decoded(layer: MXFP4Embed) -> nnx.Embed:
    """A dense layer with the values that the codes stand for."""
    dense = nnx.Embed(layer.num_embeddings, layer.features, dtype=layer.dtype, rngs=nnx.Rngs(0))
    dense.embedding = nnx.Param(layer.embedding[...].dequantize(jnp.float32))
    return dense


INDICES: list[Any] = [5, [3, 0, 36, 3], [[-1, -37], [7, 8], [0, 0]], np.zeros((2, 0), np.int32), [37, -38, 4]]


@pytest.mark.parametrize("indices", INDICES, ids=str)
@pytest.mark.parametrize("index_dtype", [jnp.int32, jnp.int8])
def test_it_looks_up_what_the_dense_layer_looks_up(layer: MXFP4Embed, indices: Any, index_dtype: Any) -> None:
    indices = jnp.asarray(indices, index_dtype)
    found = layer(indices)
    assert found.shape == (*indices.shape, FEATURES)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, decoded(layer)(indices))


def test_rows_out_of_range_are_nan(layer: MXFP4Embed) -> None:
    is_nan = jnp.isnan(layer(jnp.array([36, 37, -37, -38, 2**31 - 1])))
    assert is_nan.all(axis=-1).tolist() == is_nan.any(axis=-1).tolist() == [False, True, False, True, True]


def test_with_one_row_every_index_means_that_row() -> None:
    layer = MXFP4Embed(1, FEATURES, rngs=nnx.Rngs(1))
    indices = jnp.array([[0, 5, -3]])
    np.testing.assert_array_equal(layer(indices), decoded(layer)(indices))
    assert not jnp.isnan(layer(indices)).any()


def test_indices_are_integers(layer: MXFP4Embed) -> None:
    with pytest.raises(ValueError, match="inputs: found an array of float32, expected integers"):
        layer(jnp.zeros(3))


def test_only_the_rows_that_are_looked_up_are_decoded() -> None:
    rows = 40_000
    layer = nnx.eval_shape(lambda: MXFP4Embed(rows, FEATURES, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(layer)
    compiled = (
        jax.jit(lambda state, ids: nnx.merge(graphdef, state)(ids)).lower(state, jnp.zeros(7, jnp.int32)).compile()
    )
    # All rows would be 15 MB in float32.
    memory: Any = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 100_000


@pytest.mark.parametrize("shape", [(), (5,), (2, 3)], ids=str)
def test_attend_multiplies_by_every_row(layer: MXFP4Embed, shape: tuple[int, ...]) -> None:
    query = jnp.asarray(np.random.default_rng(2).standard_normal((*shape, FEATURES)), jnp.float32)
    found = layer.attend(query)
    matrix = np.asarray(layer.embedding[...].dequantize(jnp.float32), np.float64)
    expected = np.asarray(query, np.float64) @ matrix.T
    assert found.shape == (*shape, ROWS)
    bound = FEATURES * np.finfo(np.float32).eps * (np.abs(np.asarray(query, np.float64)) @ np.abs(matrix.T))
    assert np.all(np.abs(found - expected) <= bound)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, jnp.float16, jnp.float32], ids=str)
@pytest.mark.parametrize("param_dtype", [jnp.bfloat16, jnp.float32])
def test_dtypes_are_those_of_the_dense_layer(dtype: Any, param_dtype: Any) -> None:
    options: Any = {"dtype": dtype, "param_dtype": param_dtype}

    def results() -> list[tuple[jax.Array, jax.Array]]:
        dense = nnx.Embed(ROWS, FEATURES, rngs=nnx.Rngs(0), **options)
        layers = dense, MXFP4Embed(ROWS, FEATURES, rngs=nnx.Rngs(0), **options), MXFP4Embed.from_embed(dense)
        return [(layer(jnp.array([1, 2])), layer.attend(jnp.ones(FEATURES))) for layer in layers]

    dense, *found = [tuple(result.dtype for result in pair) for pair in jax.eval_shape(results)]
    assert found == 2 * [dense]


def test_the_same_key_gives_the_quantized_dense_layer(layer: MXFP4Embed) -> None:
    dense = nnx.Embed(ROWS, FEATURES, rngs=nnx.Rngs(1))
    expected = mxfp4.quantize(dense.embedding[...])
    for found in (layer.embedding[...], MXFP4Embed.from_embed(dense).embedding[...]):
        np.testing.assert_array_equal(found.blocks, expected.blocks)
        np.testing.assert_array_equal(found.scales, expected.scales)


def test_from_array_takes_codes_as_they_are() -> None:
    w = mxfp4.quantize(np.random.default_rng(0).standard_normal((ROWS, FEATURES)).astype(np.float32))
    layer = MXFP4Embed.from_array(w)
    assert layer.embedding[...].blocks is w.blocks
    assert (layer.num_embeddings, layer.features) == (ROWS, FEATURES)
    found = layer(jnp.array([3, 36]))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(found), w.dequantize()[[3, 36]])
    with pytest.raises(ValueError, match="embedding: found shape"):
        MXFP4Embed.from_array(w[None])


@pytest.mark.parametrize("features", [0, 33, 80])
def test_a_size_that_is_not_whole_blocks_is_refused(features: int) -> None:
    with pytest.raises(ValueError, match=f"features: found {features}, expected a multiple of 32"):
        MXFP4Embed(ROWS, features, rngs=nnx.Rngs(0))


def test_a_layer_whose_meaning_would_change_is_refused() -> None:
    class Shifted(nnx.Embed):
        pass

    layers: dict[str, nnx.Embed] = {
        "found a Shifted, expected nnx.Embed itself": Shifted(ROWS, FEATURES, rngs=nnx.Rngs(0)),
        r"found embedding \[37, 33\]": nnx.Embed(ROWS, 33, rngs=nnx.Rngs(0)),
        "found a promote_dtype of its own": nnx.Embed(
            ROWS, FEATURES, promote_dtype=partial(dtypes.promote_dtype), rngs=nnx.Rngs(0)
        ),
    }
    for message, embed in layers.items():
        with pytest.raises(ValueError, match=f"embed: {message}"):
            MXFP4Embed.from_embed(embed)
