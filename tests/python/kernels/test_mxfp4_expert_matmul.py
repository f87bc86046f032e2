"""mxfp4.expert_matmul: each token by the matrix of its expert."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import mxfp4_oracle as oracle
import numpy as np
import pytest
from jax import export
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from mxfp4_cases import assert_close, float64, random_array, random_weights, temporary_bytes
from tensorport import mxfp4
from tensorport.kernels.mxfp4_expert_matmul import reference
from tensorport.mxfp4 import MXFP4Array

E, N, K = 6, 300, 96


def expected_rows(x: Any, w: MXFP4Array, ids: Any) -> tuple[Any, Any]:
    dense = oracle.decode(np.asarray(w.blocks), np.asarray(w.scales))[np.asarray(ids)]
    x = float64(x)
    return np.einsum("tk,tnk->tn", x, dense), np.einsum("tk,tnk->tn", np.abs(x), np.abs(dense))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize(
    ("function", "tokens"),
    [(mxfp4.expert_matmul, 1), (mxfp4.expert_matmul, 29), (mxfp4.expert_matmul, 700), (reference.expert_matmul, 29)],
)
def test_values_are_those_of_float64(function: Callable[..., Any], tokens: int, dtype: str) -> None:
    w = random_weights(E, N, K)
    ids = np.random.default_rng(1).integers(0, E, tokens)
    with jax.enable_x64(dtype == "float64"):
        x = random_array(tokens, K, dtype=dtype)
        found = function(x, w, jnp.asarray(ids, jnp.int32))
    assert (found.dtype, found.shape) == (x.dtype, (tokens, N))
    assert_close(found, *expected_rows(x, w, ids), K)


@pytest.mark.parametrize("ids", [[2] * 11, [5, 4, 3, 2, 1, 0], [0, 5, 0, 5, 0]])
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8])
def test_groups_of_any_size(ids: list[int], dtype: Any) -> None:
    w, x = random_weights(E, N, K), random_array(len(ids), K)
    assert_close(mxfp4.expert_matmul(x, w, jnp.asarray(ids, dtype)), *expected_rows(x, w, ids), K)


def test_tokens_without_an_expert_become_nan_and_no_others() -> None:
    w, x, ids = random_weights(E, N, K), random_array(5, K), jnp.asarray([0, -1, 3, E, 5])
    for function in (mxfp4.expert_matmul, reference.expert_matmul):
        found = np.asarray(function(x, w, ids))
        assert np.isnan(found[[1, 3]]).all()
        assert_close(found[[0, 2, 4]], *expected_rows(x[jnp.asarray([0, 2, 4])], w, [0, 3, 5]), K)


def test_empty_arrays() -> None:
    assert mxfp4.expert_matmul(jnp.zeros((0, K)), random_weights(E, N, K), jnp.zeros(0, jnp.int32)).shape == (0, N)
    no_experts = mxfp4.expert_matmul(jnp.zeros((2, K)), random_weights(0, N, K), jnp.zeros(2, jnp.int32))
    assert np.isnan(np.asarray(no_experts)).all()


def test_gradients_in_x_of_any_order() -> None:
    w, ids = random_weights(E, 40, K), jnp.asarray([4, 0, 4, 5, 1])
    x, g = random_array(5, K, seed=2), random_array(5, 40, seed=3)
    dense = oracle.decode(np.asarray(w.blocks), np.asarray(w.scales))[np.asarray(ids)]
    dx, dw, dids = jax.vjp(mxfp4.expert_matmul, x, w, ids)[1](g)
    absolute = np.einsum("tn,tnk->tk", np.abs(float64(g)), np.abs(dense))
    assert_close(dx, np.einsum("tn,tnk->tk", float64(g), dense), absolute, 40)
    assert {leaf.dtype for leaf in jax.tree.leaves((dw, dids))} == {jax.dtypes.float0}
    second = jax.grad(lambda x: jnp.sum(jax.grad(lambda x: jnp.sum(mxfp4.expert_matmul(x, w, ids) ** 2))(x) * x))(x)
    first = jax.grad(lambda x: jnp.sum(mxfp4.expert_matmul(x, w, ids) ** 2))(x)
    np.testing.assert_allclose(np.asarray(second), 2 * np.asarray(first), rtol=1e-4, atol=1e-2)


def test_vmap_over_tokens() -> None:
    w, x = random_weights(E, 40, K), random_array(3, 5, K)
    ids = jnp.asarray(np.random.default_rng(4).integers(0, E, (3, 5)))
    found = jax.vmap(mxfp4.expert_matmul, (0, None, 0))(x, w, ids)
    flat = mxfp4.expert_matmul(x.reshape(15, K), w, ids.reshape(15))
    np.testing.assert_allclose(np.asarray(found).reshape(15, 40), np.asarray(flat), rtol=1e-5, atol=1e-5)


def test_shard_map_over_tokens() -> None:
    mesh = Mesh(np.array(jax.devices()), ("x",))
    w, x = random_weights(E, N, K), random_array(16, K)
    ids = jnp.asarray(np.random.default_rng(5).integers(0, E, 16))
    sharded = jax.jit(jax.shard_map(mxfp4.expert_matmul, mesh=mesh, in_specs=(P("x"), P(), P("x")), out_specs=P("x")))
    for found, wanted in (
        (sharded(x, w, ids), mxfp4.expert_matmul(x, w, ids)),
        (
            jax.grad(lambda x: jnp.sum(sharded(x, w, ids) ** 2))(x),
            jax.grad(lambda x: jnp.sum(mxfp4.expert_matmul(x, w, ids) ** 2))(x),
        ),
    ):
        np.testing.assert_allclose(np.asarray(found), np.asarray(wanted), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(("kind", "count"), [("int8", 128), ("uint8", 256), ("int16", 2**15), ("int4", 9)])
@pytest.mark.parametrize("implementation", ["native", "xla"])
def test_ids_may_be_of_a_dtype_that_the_number_of_experts_is_not_of(kind: str, count: int, implementation: Any) -> None:
    w, x, ids = random_weights(count, 3, 32), random_array(4, 32), [0, 5, 2, 5]
    found = mxfp4.expert_matmul(x, w, jnp.asarray(ids, kind), implementation=implementation)
    assert_close(found, *expected_rows(x, w, ids), 32)


def test_ids_beyond_32_bits_are_no_experts_either() -> None:
    ids = np.array([2**40 + 1, 2**32, -(2**32), 2], np.int64)
    for kind in (np.int64, np.uint64):
        found = np.asarray(mxfp4.expert_matmul(random_array(4, K), random_weights(E, N, K), ids.astype(kind)))
        assert np.isnan(found[:3]).all()
        assert np.isfinite(found[3]).all()


def test_it_exports_with_a_symbolic_number_of_tokens() -> None:
    w, x, ids = random_weights(E, 40, K), random_array(7, K), jnp.asarray([0, 5, 2, 2, 2, 1, 5], jnp.int32)
    (tokens,) = export.symbolic_shape("t")
    shapes = jax.ShapeDtypeStruct((tokens, K), jnp.float32), jax.ShapeDtypeStruct((tokens,), jnp.int32)
    # JAX asks whoever exports native code to vouch for it.
    allowed = [export.DisabledSafetyCheck.custom_call("tensorport.v1.mxfp4_expert_matmul")]
    exported = export.export(jax.jit(lambda x, ids: mxfp4.expert_matmul(x, w, ids)), disabled_checks=allowed)(*shapes)
    found = np.asarray(exported.call(x, ids))
    np.testing.assert_allclose(found, np.asarray(mxfp4.expert_matmul(x, w, ids)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [4, 2048])
def test_memory_does_not_grow_with_the_number_of_experts(tokens: int) -> None:
    """gate_up of gpt-oss at full width: 1 GB in bfloat16 for 32 experts."""

    def needed(num_experts: int) -> int:
        w = MXFP4Array(
            jax.ShapeDtypeStruct((num_experts, 5760, 90, 16), np.uint8),
            jax.ShapeDtypeStruct((num_experts, 5760, 90), np.uint8),
        )
        x, ids = jax.ShapeDtypeStruct((tokens, 2880), jnp.bfloat16), jax.ShapeDtypeStruct((tokens,), jnp.int32)
        return temporary_bytes(jax.jit(mxfp4.expert_matmul), x, w, ids)

    few, many = needed(32), needed(128)
    assert many <= few + 100_000
    # The output in float32 before it is rounded, twice; a chunk; a tile.
    assert many <= 2 * tokens * 5760 * 4 + 40_000_000


WRONG_CALLS: dict[str, tuple[Any, Any, Any, type[Exception], str]] = {
    "matrix": (jnp.zeros((2, K)), random_weights(5, K), [0, 1], ValueError, "w: found shape .*, expected 3 axes"),
    "batch": (jnp.zeros((2, 3, K)), random_weights(E, N, K), [0, 1], ValueError, "x: found shape .* expected 2 axes"),
    "few ids": (jnp.zeros((2, K)), random_weights(E, N, K), [0], ValueError, "T, .*: found 2 in x, 1 in expert_ids"),
    "other K": (jnp.zeros((2, 64)), random_weights(E, N, K), [0, 1], ValueError, "K, .*: found 64 in x, 96 in w"),
    "float ids": (jnp.zeros((2, K)), random_weights(E, N, K), [0.0, 1], TypeError, "expert_ids: found an array of"),
}


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_wrong_arguments_are_refused_by_name(name: str) -> None:
    x, w, ids, error, message = WRONG_CALLS[name]
    with pytest.raises(error, match=message):
        mxfp4.expert_matmul(x, w, jnp.asarray(ids))
