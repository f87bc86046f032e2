"""MXFP4MoE: against plain NumPy, on the golden checkpoint, from a key and from parameters."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gpt_oss_reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorport
from flax import nnx
from tensorport import mxfp4
from tensorport.nnx import MXFP4MoE

HIDDEN, INTERMEDIATE, EXPERTS, CHOSEN, TOKENS = 64, 96, 5, 3, 7


def moe(**options: Any) -> MXFP4MoE:
    bias_init = nnx.initializers.normal(1.0)
    return MXFP4MoE(HIDDEN, INTERMEDIATE, EXPERTS, CHOSEN, bias_init=bias_init, rngs=nnx.Rngs(0), **options)


def tokens(*shape: int, width: int = HIDDEN, seed: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal((*shape, width)), jnp.float32)


def f64(x: Any) -> np.ndarray[Any, Any]:
    return np.asarray(x).astype(np.float64)


def plain(layer: MXFP4MoE, x: Any) -> np.ndarray[Any, Any]:
    """The layer in float64, token by token."""
    gate_up, down = (f64(w[...].dequantize(jnp.float32)) for w in (layer.gate_up, layer.down))
    kernel, gate_up_bias, down_bias = map(
        f64, (layer.router.kernel[...], layer.gate_up_bias[...], layer.down_bias[...])
    )
    assert layer.router.bias is not None
    out = []
    for token in f64(x).reshape(-1, HIDDEN):
        logits = token @ kernel + f64(layer.router.bias[...])
        chosen = np.argsort(-logits, kind="stable")[: layer.num_experts_per_tok]
        weights = np.exp(logits[chosen]) / np.exp(logits[chosen]).sum()
        total = np.zeros(HIDDEN)
        for expert, weight in zip(chosen, weights, strict=True):
            h = gate_up[expert] @ token + gate_up_bias[expert]
            gate = np.minimum(h[0::2], layer.swiglu_limit)
            up = np.clip(h[1::2], -layer.swiglu_limit, layer.swiglu_limit)
            activated = gate / (1 + np.exp(-1.702 * gate)) * (up + 1)
            total += weight * (down[expert] @ activated + down_bias[expert])
        out.append(total)
    return np.array(out).reshape(x.shape)


@pytest.mark.parametrize("shape", [(TOKENS,), (2, 4), (), (2, 0)], ids=str)
@pytest.mark.parametrize("limit", [7.0, 0.5])
def test_it_computes_what_numpy_computes(shape: tuple[int, ...], limit: float) -> None:
    layer, x = moe(swiglu_limit=limit), tokens(*shape)
    expected = plain(layer, x)
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        found = layer(x)
    assert found.shape == x.shape
    assert found.dtype == jnp.float32
    largest = np.abs(expected).max(initial=1)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2 * INTERMEDIATE * np.finfo(np.float32).eps * largest)


def test_the_router_weighs_the_experts_with_the_largest_logits() -> None:
    layer, x = moe(), tokens(2, 4)
    indices, weights = layer.route(x)
    logits = layer.router(x)
    assert indices.shape == weights.shape == (2, 4, CHOSEN)
    np.testing.assert_array_equal(indices, np.argsort(-np.asarray(logits), axis=-1)[..., :CHOSEN])
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-6)
    assert np.all(np.diff(weights, axis=-1) <= 0)


def test_routing_is_float32_whatever_the_dtype() -> None:
    layer = moe(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    x = tokens(TOKENS).astype(jnp.bfloat16)
    assert layer(x).dtype == jnp.bfloat16
    assert layer.route(x)[1].dtype == jnp.float32
    expected = plain(layer, x)
    found = f64(layer(x))
    # x is the layer's input as it is, and all in between float32: one rounding at the end.
    assert np.all(np.abs(found - expected) <= 2**-8 * np.abs(expected) + 1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, jnp.float32], ids=str)
@pytest.mark.parametrize("param_dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("input_dtype", [jnp.bfloat16, jnp.float32])
def test_dtypes_are_those_of_a_dense_layer(dtype: Any, param_dtype: Any, input_dtype: Any) -> None:
    options: Any = {"dtype": dtype, "param_dtype": param_dtype}
    x = jnp.ones((TOKENS, HIDDEN), input_dtype)
    found, dense = jax.eval_shape(
        lambda: (moe(**options)(x), nnx.Linear(HIDDEN, HIDDEN, rngs=nnx.Rngs(0), **options)(x))
    )
    assert found.dtype == dense.dtype


@pytest.fixture(scope="session")
def config(golden_hf: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((golden_hf / "config.json").read_text())
    return loaded


def from_golden(params: Mapping[str, Any], config: Mapping[str, Any], **options: Any) -> MXFP4MoE:
    return MXFP4MoE.from_params(
        params, num_experts_per_tok=config["num_experts_per_tok"], swiglu_limit=config["swiglu_limit"], **options
    )


@pytest.mark.parametrize("index", range(4))
def test_a_layer_of_the_golden_checkpoint(golden_hf: Path, config: dict[str, Any], index: int) -> None:
    params = tensorport.load_params(golden_hf)
    layer = from_golden(params["model"]["layers"][str(index)]["mlp"], config, dtype=jnp.float32)
    assert layer.gate_up.shape == (6, 320, 96)
    assert layer.down.shape == (6, 96, 160)
    assert (layer.router.in_features, layer.router.out_features) == (96, 6)
    x = tokens(11, width=96)
    reference = gpt_oss_reference.Layer(index, tensorport.open(golden_hf), config, lambda _, __, value: value)
    expected = gpt_oss_reference.mixture_of_experts(reference, np.asarray(x))
    np.testing.assert_allclose(layer(x), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_both_layouts_give_the_same_layer(golden_hf: Path, golden_original: Path, config: dict[str, Any]) -> None:
    ours = tensorport.load_params(golden_hf)["model"]["layers"]
    theirs = tensorport.load_params(golden_original)["block"]
    x = tokens(11, width=96)
    for index in range(4):
        found = from_golden(theirs[str(index)]["mlp"], config)
        np.testing.assert_array_equal(found(x), from_golden(ours[str(index)]["mlp"], config)(x))


def test_codes_of_the_checkpoint_are_kept_as_they_are(golden_hf: Path, config: dict[str, Any]) -> None:
    mlp = tensorport.load_params(golden_hf)["model"]["layers"]["2"]["mlp"]
    layer = from_golden(mlp, config)
    assert layer.gate_up[...].blocks is mlp["experts"]["gate_up_proj"].blocks
    assert layer.down[...].scales is mlp["experts"]["down_proj"].scales
    assert layer(tokens(3, width=96).astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_dense_experts_are_quantized(golden_hf: Path, config: dict[str, Any]) -> None:
    mlp = tensorport.load_params(golden_hf, mxfp4="dequantize")["model"]["layers"]["0"]["mlp"]
    dense = mlp["experts"]["gate_up_proj"]
    layer = from_golden(mlp, config, scale_rule="ceil")
    expected = mxfp4.quantize(dense, scale_rule="ceil")
    np.testing.assert_array_equal(layer.gate_up[...].blocks, expected.blocks)
    np.testing.assert_array_equal(layer.gate_up[...].scales, expected.scales)


def test_parameters_that_do_not_fit_are_all_named(golden_hf: Path, config: dict[str, Any]) -> None:
    mlp = tensorport.load_params(golden_hf)["model"]["layers"]["0"]["mlp"]
    experts = dict(mlp["experts"])
    experts["gate_up_proj"] = experts["gate_up_proj"][:, :300]
    experts["down_proj_bias"] = experts["down_proj_bias"][0]
    del experts["gate_up_proj_bias"]
    with pytest.raises(tensorport.MappingError) as caught:
        from_golden({**mlp, "experts": experts, "norm": {"scale": jnp.ones(96)}}, config)
    for part in (
        "4 tensors do not fit the layer",
        "norm.scale: found, expected no such tensor",
        "experts.gate_up_proj_bias: found no such tensor, expected [E, 2I]",
        "experts.down_proj_bias: found shape [96], expected [E, H]",
        "[6, 300, 96], expected [E, 2I, H]",
    ):
        assert part in str(caught.value).replace("down_proj: found shape [6, 96, 160], expected [E, H, I]", part)


@pytest.mark.parametrize("size", ["hidden_size", "intermediate_size"])
def test_a_size_that_is_not_whole_blocks_is_refused(size: str) -> None:
    sizes: Any = {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE} | {size: 48}
    with pytest.raises(ValueError, match=f"{size}: found 48, expected a multiple of 32"):
        MXFP4MoE(**sizes, num_experts=EXPERTS, num_experts_per_tok=CHOSEN, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("chosen", [0, 6])
def test_a_token_takes_no_more_experts_than_there_are(chosen: int) -> None:
    with pytest.raises(ValueError, match=f"num_experts_per_tok: found {chosen}, expected 1 to 5"):
        MXFP4MoE(HIDDEN, INTERMEDIATE, EXPERTS, chosen, rngs=nnx.Rngs(0))


def test_each_expert_is_initialized_like_a_dense_layer() -> None:
    shapes = []

    def init(key: Any, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        shapes.append((shape, jnp.dtype(dtype)))
        return nnx.initializers.lecun_normal()(key, shape, dtype)

    layer = moe(kernel_init=init, param_dtype=jnp.bfloat16)
    dtype = jnp.dtype(jnp.bfloat16)
    kernels = (HIDDEN, EXPERTS), (HIDDEN, 2 * INTERMEDIATE), (INTERMEDIATE, HIDDEN)
    assert set(shapes) == {(shape, dtype) for shape in kernels}
    for w in (layer.gate_up[...], layer.down[...]):
        values = np.asarray(w.dequantize(jnp.float32))
        # lecun_normal: a variance of one over the number of inputs.
        np.testing.assert_allclose(values.std(axis=(1, 2)), w.shape[-1] ** -0.5, rtol=0.1)
        assert len({row.tobytes() for row in values}) == EXPERTS


def test_no_dense_copy_of_all_experts_is_made() -> None:
    experts, hidden, intermediate = 16, 256, 512
    state = jax.jit(
        lambda key: nnx.state(MXFP4MoE(hidden, intermediate, experts, 4, rngs=nnx.Rngs(key)), nnx.Not(nnx.RngState))
    )
    memory: Any = state.lower(jax.random.key(0)).compile().memory_analysis()
    one_expert = 4 * hidden * 2 * intermediate
    # The initializer and the encoder take some copies of one expert; 16 of them would be all.
    assert memory.temp_size_in_bytes < 8 * one_expert


def test_an_initializer_with_metadata_is_refused() -> None:
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, None), eager_sharding=False)
    with pytest.raises(ValueError, match="kernel_init: found metadata around the kernel of one expert"):
        moe(kernel_init=init)


def test_metadata_speaks_of_dense_experts() -> None:
    layer = moe(
        gate_up_metadata={"out_sharding": ("expert", None, "model"), "eager_sharding": False},
        down_metadata={"out_sharding": ("expert", "model"), "eager_sharding": False},
    )
    assert layer.gate_up.get_metadata("out_sharding") == ("expert", "model", None)
    assert layer.down.get_metadata("out_sharding") == ("expert", None, "model")
