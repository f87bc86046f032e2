"""Experts through Triton, interpreted on CPU against float64, and where they run."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import moe_cases
import numpy as np
import pytest
from mxfp4_cases import assert_close, expert_products, float64, random_array, random_weights, scales_at_their_ends
from tensorport.kernels.mxfp4_expert_matmul import pallas_triton as expert_matmul_triton
from tensorport.kernels.mxfp4_moe import pallas_triton as moe_triton
from tensorport.kernels.mxfp4_moe.types import ELSEWHERE, Activation, Experts
from tensorport.kernels.registry import OPS, Device
from tensorport.mxfp4 import MXFP4Array

# JAX 0.11 announces that its backend for Triton will go.
pytestmark = pytest.mark.filterwarnings("ignore:.*[Tt]riton.*:DeprecationWarning")

DTYPES = ["bfloat16", "float16", "float32"]
# Up to 16 pairs of a token and an expert are few; 17 and more are sorted.
FEW, MANY = 5, 29

expert_matmul: Any = partial(expert_matmul_triton.expert_matmul, interpret=True)
moe: Any = partial(moe_triton.moe, interpret=True)


class TestExpertMatmul:
    E, N, K = 6, 70, 96

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("tokens", [1, FEW, 16, 17, MANY, 300])
    def test_values_are_those_of_float64(self, tokens: int, dtype: str) -> None:
        w, x = random_weights(self.E, self.N, self.K), random_array(tokens, self.K, dtype=dtype)
        ids = np.random.default_rng(1).integers(0, self.E, tokens)
        found = expert_matmul(x, w, jnp.asarray(ids))
        assert (found.dtype, found.shape) == (x.dtype, (tokens, self.N))
        assert_close(found, *expert_products(x, w, ids), self.K)

    @pytest.mark.parametrize("ids", [[2] * 40, [0, 5] * 20, list(range(6)) * 7, [5, 4, 3]])
    def test_groups_of_any_size(self, ids: list[int]) -> None:
        w, x = random_weights(self.E, self.N, self.K), random_array(len(ids), self.K)
        assert_close(expert_matmul(x, w, jnp.asarray(ids)), *expert_products(x, w, ids), self.K)

    @pytest.mark.parametrize("tokens", [FEW, MANY])
    def test_tokens_without_an_expert_become_nan_and_no_others(self, tokens: int) -> None:
        w, x = random_weights(self.E, self.N, self.K), random_array(tokens, self.K)
        ids = np.random.default_rng(2).integers(0, self.E, tokens)
        ids[[1, 3]] = -1, self.E
        found = expert_matmul(x, w, jnp.asarray(ids))
        assert np.isnan(found[np.array([1, 3])]).all()
        kept = np.delete(np.arange(tokens), [1, 3])
        assert_close(found[kept], *expert_products(x[kept], w, ids[kept]), self.K)

    @pytest.mark.parametrize("tokens", [1, MANY])
    def test_scales_at_their_ends(self, tokens: int) -> None:
        x, w = scales_at_their_ends(tokens)
        found = expert_matmul(x, w, jnp.ones(tokens, jnp.int32))
        assert np.isnan(found[:, 4]).all()
        wanted, magnitude = expert_products(x, w, [1] * tokens)
        assert_close(found[:, :4], wanted[:, :4], magnitude[:, :4], 128)


# Of the largest value: a rounding to the dtype, or sums of 96 and 160 products in float32.
TOLERANCE = {"bfloat16": 2**-8, "float16": 2**-10, "float32": 1e-5}


class TestMoe:
    ACTIVATION = Activation(7.0, 1.702)

    def inputs(self, tokens: int, dtype: str = "float32") -> tuple[Any, Any, Any, Experts]:
        x, chosen, weights, *experts = moe_cases.inputs(tokens, dtype)
        return x, chosen, weights, Experts(*experts)

    def expected(self, x: Any, chosen: Any, weights: Any, experts: Experts, activation: Activation = ACTIVATION) -> Any:
        return moe_cases.expected((x, chosen, weights, *experts), *activation)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("tokens", [1, FEW, 6, MANY])
    def test_values_are_those_of_the_formula(self, tokens: int, dtype: str) -> None:
        args = self.inputs(tokens, dtype)
        found = moe(*args, self.ACTIVATION)
        assert (found.dtype, found.shape) == (args[0].dtype, (tokens, moe_cases.H))
        wanted = self.expected(*args)
        np.testing.assert_allclose(float64(found), wanted, rtol=0, atol=TOLERANCE[dtype] * np.abs(wanted).max())

    @pytest.mark.parametrize("tokens", [FEW, MANY])
    @pytest.mark.parametrize("activation", [Activation(0.5, 1.0), Activation(np.inf, 3.0)])
    def test_limit_and_alpha(self, activation: Activation, tokens: int) -> None:
        args = self.inputs(tokens)
        wanted = self.expected(*args, activation)
        found = moe(*args, activation)
        np.testing.assert_allclose(float64(found), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())

    @pytest.mark.parametrize("tokens", [FEW, MANY])
    def test_a_token_may_choose_an_expert_twice_and_all_tokens_one(self, tokens: int) -> None:
        x, _, weights, experts = self.inputs(tokens)
        args = x, jnp.asarray([[2, 2, 5]] * tokens), weights, experts
        wanted = self.expected(*args)
        found = moe(*args, self.ACTIVATION)
        np.testing.assert_allclose(float64(found), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())

    @pytest.mark.parametrize("tokens", [FEW, MANY])
    def test_pairs_elsewhere_add_nothing_and_other_ids_make_nan(self, tokens: int) -> None:
        x, chosen, weights, experts = self.inputs(tokens)
        marked = chosen.at[1, 0].set(ELSEWHERE).at[3].set(ELSEWHERE)
        is_here = np.asarray(marked) != ELSEWHERE
        # A weight of a pair elsewhere may be anything.
        found = np.asarray(moe(x, marked, jnp.where(is_here, weights, jnp.nan), experts, self.ACTIVATION))
        wanted = self.expected(x, chosen, jnp.where(is_here, weights, 0), experts)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
        np.testing.assert_array_equal(found[3], np.zeros(moe_cases.H))
        marked = marked.at[3, 1].set(moe_cases.E).at[4, 2].set(-1)
        found = np.asarray(moe(x, marked, weights, experts, self.ACTIVATION))
        np.testing.assert_array_equal(np.isnan(found).all(axis=1), np.isin(np.arange(tokens), [3, 4]))
        assert np.isnan(found).any(axis=1).sum() == 2

    @pytest.mark.parametrize("tokens", [FEW, MANY])
    def test_nan_in_one_token_stays_there(self, tokens: int) -> None:
        x, *others = self.inputs(tokens)
        found = np.asarray(moe(x.at[2, 3].set(jnp.nan), *others, self.ACTIVATION))
        assert np.isnan(found[2]).all()
        assert np.isfinite(np.delete(found, 2, axis=0)).all()


@pytest.mark.parametrize("op", ["mxfp4.expert_matmul", "mxfp4.moe"])
def test_it_runs_where_it_is_named_alone(op: str) -> None:
    array: Any = jax.ShapeDtypeStruct
    x, ids, weights = array((7, 96), "bfloat16"), array((7, 3), "int32"), array((7, 3), "bfloat16")
    bias = array((6, 96), "bfloat16")
    inputs = {
        "mxfp4.expert_matmul": (x, stack(6, 64, 96), array((7,), "int32")),
        "mxfp4.moe": (x, ids, weights, Experts(stack(6, 96, 96), bias, stack(6, 96, 64), bias)),
    }[op]
    device = Device("gpu", "NVIDIA H200", (9, 0))
    assert OPS[op].explain("pallas_triton", device, *inputs).implementation == "pallas_triton"
    chosen = OPS[op].explain("auto", device, *inputs)
    assert chosen.implementation == "xla"
    assert "not measured" in str(chosen.reasons["pallas_triton"])


def stack(experts: int, n: int, k: int) -> Any:
    blocks, scales = ((experts, n, k // 32, *rest) for rest in ((16,), ()))
    return MXFP4Array(jax.ShapeDtypeStruct(blocks, jnp.uint8), jax.ShapeDtypeStruct(scales, jnp.uint8))
