"""mxfp4.moe: the mixture of experts of gpt-oss."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpt_oss_reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorport
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from moe_cases import CHOICES, WIDTH, E, H, expected, inputs
from mxfp4_cases import float64, random_array, random_weights, temporary_bytes
from tensorport import mxfp4
from tensorport.kernels.mxfp4_moe import reference
from tensorport.kernels.mxfp4_moe.types import ELSEWHERE, Activation, Experts
from tensorport.mxfp4 import MXFP4Array


def moe_reference(*args: Any, limit: float = 7.0, alpha: float = 1.702) -> Any:
    x, chosen, weights, *experts = args
    return reference.moe(x, chosen, weights, Experts(*experts), Activation(limit, alpha))


TOLERANCE = {"bfloat16": 2**-8, "float16": 2**-10, "float32": 1e-5, "float64": 1e-12}
"""Of the largest value: a rounding to the dtype, or sums of 96 and 160 products in float32."""


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize(("function", "tokens"), [(mxfp4.moe, 1), (mxfp4.moe, 5), (mxfp4.moe, 131), (moe_reference, 5)])
def test_values_are_those_of_the_formula(function: Callable[..., Any], tokens: int, dtype: str) -> None:
    with jax.enable_x64(dtype == "float64"):
        args = inputs(tokens, dtype)
        found = function(*args)
    assert (found.dtype, found.shape) == (args[0].dtype, (tokens, H))
    wanted = expected(args)
    np.testing.assert_allclose(float64(found), wanted, rtol=0, atol=TOLERANCE[dtype] * np.abs(wanted).max())


@pytest.mark.parametrize(("limit", "alpha"), [(7.0, 1.702), (0.5, 1.0), (np.inf, 3.0)])
def test_limit_and_alpha(limit: float, alpha: float) -> None:
    args = inputs(9)
    wanted = expected(args, limit, alpha)
    for function in (mxfp4.moe, moe_reference):
        found = function(*args, limit=limit, alpha=alpha)
        np.testing.assert_allclose(float64(found), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("limit", [-1.0, np.nan])
def test_a_limit_that_leaves_nothing_is_refused(limit: float) -> None:
    with pytest.raises(ValueError, match=r"limit: found (-1\.0|nan), expected at least 0"):
        mxfp4.moe(*inputs(2), limit=limit)


def test_a_token_may_choose_an_expert_twice_and_all_tokens_one() -> None:
    args = list(inputs(9))
    args[1] = jnp.asarray([[2, 2, 5]] * 9)
    wanted = expected(tuple(args))
    np.testing.assert_allclose(float64(mxfp4.moe(*args)), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_a_token_with_an_index_that_no_expert_has_becomes_nan_and_no_other() -> None:
    args = list(inputs(5))
    args[1] = args[1].at[1, 0].set(-1).at[3, 2].set(E)
    for function in (mxfp4.moe, moe_reference):
        found = np.asarray(function(*args))
        assert np.isnan(found[[1, 3]]).all()
        np.testing.assert_allclose(found[[0, 2, 4]], np.asarray(mxfp4.moe(*inputs(5)))[[0, 2, 4]], atol=1e-4)


def test_pairs_elsewhere_add_nothing_and_have_no_gradient() -> None:
    args = list(inputs(5))
    args[1] = args[1].at[1, 0].set(ELSEWHERE).at[3].set(ELSEWHERE)
    is_here = np.asarray(args[1]) != ELSEWHERE
    without = [*args]
    without[1], without[2] = jnp.where(is_here, args[1], 0), jnp.where(is_here, args[2], 0)
    wanted = np.asarray(mxfp4.moe(*without))
    for function in (mxfp4.moe, moe_reference):
        found = np.asarray(function(*args))
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
        np.testing.assert_array_equal(found[3], np.zeros(H))

        def loss(x: Any, weights: Any, function: Any = function) -> Any:
            return jnp.sum(function(x, args[1], weights, *args[3:]))

        of_x, of_weights = jax.grad(loss, (0, 1))(args[0], args[2])
        np.testing.assert_array_equal(of_x[3], np.zeros(H))
        np.testing.assert_array_equal(np.asarray(of_weights) != 0, is_here)
    # Beside one that no expert has, the token is NaN all the same.
    args[1] = args[1].at[3, 1].set(E)
    for function in (mxfp4.moe, moe_reference):
        np.testing.assert_array_equal(np.isnan(np.asarray(function(*args))).all(axis=1), np.arange(5) == 3)


def test_nan_in_one_token_stays_there() -> None:
    args: list[Any] = list(inputs(6))
    args[0] = args[0].at[2, 3].set(jnp.nan)
    found = np.asarray(mxfp4.moe(*args))
    assert np.isnan(found[2]).all()
    assert np.isfinite(np.delete(found, 2, axis=0)).all()


def test_empty_arrays() -> None:
    args = inputs(5)
    none = (args[0][:0], args[1][:0], args[2][:0], *args[3:])
    assert mxfp4.moe(*none).shape == (0, H)
    no_choices = mxfp4.moe(args[0], args[1][:, :0], args[2][:, :0], *args[3:])
    np.testing.assert_array_equal(np.asarray(no_choices), np.zeros((5, H)))
    # Without values between the layers, the biases of the chosen experts are left.
    empty = random_weights(E, 0, H), jnp.zeros((E, 0)), random_weights(E, H, 0)
    narrow = mxfp4.moe(*(*args[:3], *empty, args[6]))
    np.testing.assert_allclose(narrow, np.einsum("tk,tkh->th", args[2], args[6][args[1]]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tokens", [2, 37])
def test_gradients_are_those_of_finite_differences(tokens: int) -> None:
    with jax.enable_x64(True):
        args = inputs(tokens, jnp.float64)
        direction = random_array(tokens, H, dtype=jnp.float64, seed=9)
        frozen = args[1], args[3], args[5]

        def loss(x: Any, weights: Any, gate_up_bias: Any, down_bias: Any) -> Any:
            return jnp.sum(mxfp4.moe(x, frozen[0], weights, frozen[1], gate_up_bias, frozen[2], down_bias) * direction)

        trained = args[0], args[2], args[4], args[6]
        gradients = jax.grad(loss, (0, 1, 2, 3))(*trained)
        step = 1e-6
        for number, gradient in enumerate(gradients):
            along = random_array(*gradient.shape, dtype=jnp.float64, seed=10 + number)
            ends = [
                loss(*(value + sign * step * along if i == number else value for i, value in enumerate(trained)))
                for sign in (1, -1)
            ]
            slope = float(ends[0] - ends[1]) / (2 * step)
            np.testing.assert_allclose(float(jnp.sum(gradient * along)), slope, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gradients_are_those_of_the_reference(dtype: str) -> None:
    args = inputs(23, dtype)
    direction = random_array(23, H, seed=9)

    def gradients(function: Callable[..., Any]) -> Any:
        def loss(x: Any, weights: Any, gate_up_bias: Any, down_bias: Any) -> Any:
            out = function(x, args[1], weights, args[3], gate_up_bias, args[5], down_bias)
            return jnp.sum(out.astype(jnp.float32) * direction)

        return jax.jit(jax.grad(loss, (0, 1, 2, 3)))(args[0], args[2], args[4], args[6])

    for found, wanted in zip(gradients(mxfp4.moe), gradients(moe_reference), strict=True):
        assert found.dtype == wanted.dtype == args[0].dtype
        error = np.abs(float64(found) - float64(wanted)).max() / np.abs(float64(wanted)).max()
        assert error <= TOLERANCE[dtype] * 4


def test_codes_have_no_gradient() -> None:
    args = inputs(4)
    gradients = jax.vjp(mxfp4.moe, *args)[1](args[0])
    for number in (1, 3, 5):
        assert {leaf.dtype for leaf in jax.tree.leaves(gradients[number])} == {jax.dtypes.float0}

    # The gradient goes on to the logits of a router.
    def loss(logits: Any) -> Any:
        weights, chosen = jax.lax.top_k(logits, CHOICES)
        return jnp.sum(mxfp4.moe(args[0], chosen, jax.nn.softmax(weights), *args[3:]))

    assert np.count_nonzero(np.asarray(jax.grad(loss)(random_array(4, E)))) == 4 * CHOICES


def test_nan_in_one_token_reaches_no_gradient_of_another_expert() -> None:
    """Rows that fill up a chunk are those of other experts: nothing of theirs may count."""
    args = list(inputs(8))
    args[1] = jnp.asarray([[0, 1, 2]] * 7 + [[3, 4, 5]])

    def loss(*args: Any) -> Any:
        return jnp.sum(mxfp4.moe(*args))

    clean = jax.grad(loss, (4, 6))(*args)
    for number, value in ((0, jnp.nan), (2, jnp.inf)):
        spoiled = [*args]
        spoiled[number] = args[number].at[7, 0].set(value)
        for found, wanted in zip(jax.grad(loss, (4, 6))(*spoiled), clean, strict=True):
            np.testing.assert_array_equal(np.asarray(found[:3]), np.asarray(wanted[:3]))


@pytest.mark.parametrize("over", ["tokens", "experts"])
def test_shard_map(over: str) -> None:
    mesh = Mesh(np.array(jax.devices()[:3]), ("x",))
    x, chosen, weights, gate_up, gate_up_bias, down, down_bias = inputs(6)

    def of_own_experts(x: Any, chosen: Any, weights: Any, *experts: Any) -> Any:
        """Two experts on each of the three devices; choices that are elsewhere weigh nothing."""
        local = chosen - 2 * jax.lax.axis_index("x")
        is_mine = (local >= 0) & (local < 2)
        own = mxfp4.moe(x, jnp.where(is_mine, local, 0), jnp.where(is_mine, weights, 0), *experts)
        return jax.lax.psum(own, "x")

    function, tokens, experts = (mxfp4.moe, P("x"), P()) if over == "tokens" else (of_own_experts, P(), P("x"))
    specs = (tokens,) * 3 + (experts,) * 4
    sharded = jax.jit(jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=tokens))

    def run(moe: Any) -> Any:
        def loss(x: Any, weights: Any, gate_up_bias: Any, down_bias: Any) -> Any:
            return jnp.sum(moe(x, chosen, weights, gate_up, gate_up_bias, down, down_bias) ** 2)

        return jax.value_and_grad(loss, (0, 1, 2, 3))(x, weights, gate_up_bias, down_bias)

    for found, wanted in zip(jax.tree.leaves(run(sharded)), jax.tree.leaves(run(mxfp4.moe)), strict=True):
        np.testing.assert_allclose(np.asarray(found), np.asarray(wanted), rtol=1e-4, atol=1e-3 * np.abs(wanted).max())


def test_jit_and_vmap_change_nothing() -> None:
    first, second = inputs(5, seed=0), inputs(5, seed=20)
    batch: list[Any] = [jnp.stack([a, b]) for a, b in zip(first[:3], second[:3], strict=True)]
    found = jax.vmap(mxfp4.moe, (0, 0, 0, None, None, None, None))(*batch, *first[3:])
    jitted = jax.jit(mxfp4.moe)
    for index, args in enumerate((first, second)):
        wanted = jitted(*args[:3], *first[3:])
        np.testing.assert_allclose(np.asarray(found[index]), np.asarray(wanted), rtol=1e-4, atol=1e-4)
        eager = mxfp4.moe(*args[:3], *first[3:])
        np.testing.assert_array_equal(np.asarray(eager), np.asarray(wanted))


def test_experts_of_the_golden_checkpoint(golden_hf: Path) -> None:
    """Against the NumPy forward pass whose logits equal those of transformers, in every layer."""
    params = tensorport.load_params(golden_hf)
    checkpoint = tensorport.open(golden_hf)
    golden = np.load(golden_hf / "golden.npz")
    config = model_config(golden_hf)
    seen: dict[tuple[int, str], Any] = {}

    def hook(layer: int, name: str, value: Any) -> Any:
        seen[layer, name] = value
        return value

    logits = gpt_oss_reference.forward(checkpoint, config, golden["input_ids"][0], hook)
    np.testing.assert_allclose(logits, golden["logits"][0], atol=1e-4)
    for layer in range(config["num_hidden_layers"]):
        experts = params["model"]["layers"][str(layer)]["mlp"]["experts"]
        router = jnp.asarray(seen[layer, "router"])
        weights, chosen = jax.lax.top_k(router, config["num_experts_per_tok"])
        found = mxfp4.moe(
            jnp.asarray(seen[layer, "experts_norm"]),
            chosen,
            jax.nn.softmax(weights, axis=-1),
            experts["gate_up_proj"],
            experts["gate_up_proj_bias"],
            experts["down_proj"],
            experts["down_proj_bias"],
            limit=config["swiglu_limit"],
        )
        wanted = seen[layer, "experts"]
        np.testing.assert_allclose(np.asarray(found), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def model_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
    return config


def test_values_are_those_of_transformers_on_torch(golden_hf: Path) -> None:
    torch: Any = pytest.importorskip("torch", reason="needs torch and transformers")
    modeling: Any = pytest.importorskip(
        "transformers.models.gpt_oss.modeling_gpt_oss", reason="needs torch and transformers"
    )
    configuration = pytest.importorskip("transformers.models.gpt_oss.configuration_gpt_oss")
    experts = tensorport.load_params(golden_hf)["model"]["layers"]["1"]["mlp"]["experts"]
    tensors = tensorport.open(golden_hf)
    config = configuration.GptOssConfig(**model_config(golden_hf))
    mlp: Any = modeling.GptOssMLP(config).to(torch.float32).eval()
    state = {
        "router.weight": tensors["model.layers.1.mlp.router.weight"],
        "router.bias": tensors["model.layers.1.mlp.router.bias"],
        "experts.gate_up_proj": experts["gate_up_proj"].dequantize(jnp.float32).swapaxes(1, 2),
        "experts.gate_up_proj_bias": experts["gate_up_proj_bias"],
        "experts.down_proj": experts["down_proj"].dequantize(jnp.float32).swapaxes(1, 2),
        "experts.down_proj_bias": experts["down_proj_bias"],
    }
    mlp.load_state_dict({name: torch.from_numpy(np.array(value, np.float32)) for name, value in state.items()})
    x = np.random.default_rng(0).standard_normal((1, 17, config.hidden_size)).astype(np.float32)
    with torch.no_grad():
        wanted = mlp(torch.from_numpy(x))[0][0].numpy()
    logits = x[0] @ state["router.weight"].astype(np.float32).T + state["router.bias"].astype(np.float32)
    weights, chosen = jax.lax.top_k(jnp.asarray(logits), config.num_experts_per_tok)
    found = mxfp4.moe(
        jnp.asarray(x[0]),
        chosen,
        jax.nn.softmax(weights, axis=-1),
        experts["gate_up_proj"],
        experts["gate_up_proj_bias"],
        experts["down_proj"],
        experts["down_proj_bias"],
    )
    np.testing.assert_allclose(np.asarray(found), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def shapes(num_experts: int, tokens: int, hidden: int = 2880, width: int = 2880) -> tuple[Any, ...]:
    """Shapes of a layer of gpt-oss."""
    shape: Any = jax.ShapeDtypeStruct

    def weights(n: int, k: int) -> MXFP4Array:
        return MXFP4Array(shape((num_experts, n, k // 32, 16), np.uint8), shape((num_experts, n, k // 32), np.uint8))

    return (
        shape((tokens, hidden), jnp.bfloat16),
        shape((tokens, 4), jnp.int32),
        shape((tokens, 4), jnp.bfloat16),
        weights(2 * width, hidden),
        shape((num_experts, 2 * width), jnp.bfloat16),
        weights(hidden, width),
        shape((num_experts, hidden), jnp.bfloat16),
    )


@pytest.mark.parametrize("tokens", [1, 2048])
def test_memory_is_bounded_and_does_not_grow_with_the_number_of_experts(tokens: int) -> None:
    """A layer of gpt-oss at full width: its experts are 1.6 GB in bfloat16 for 32 of them, and 6.4 GB for 128."""
    few, many = (temporary_bytes(jax.jit(mxfp4.moe), *shapes(num_experts, tokens)) for num_experts in (32, 128))
    # Biases in float32.
    assert many <= few + 96 * 3 * 2880 * 4 + 100_000
    # The output in float32, twice; a chunk between the layers; a tile.
    assert few <= 2 * tokens * 2880 * 4 + 40_000_000


def test_gradients_keep_nothing_between_the_layers() -> None:
    def loss(*args: Any) -> Any:
        return jnp.sum(mxfp4.moe(*args).astype(jnp.float32))

    gradient = jax.jit(jax.grad(loss, (0, 2, 4, 6)))
    assert temporary_bytes(gradient, *shapes(32, 2048)) <= 5 * 2048 * 2880 * 4 + 60_000_000


def wrong(number: int, value: Any) -> Callable[[], Any]:
    def call() -> Any:
        args = list(inputs(5))
        args[number] = value
        return mxfp4.moe(*args)

    return call


WRONG_CALLS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "x": (wrong(0, jnp.zeros((5, 64))), ValueError, r"H, .*: found 64 in x, 96 in gate_up \(last axis\)"),
    "tokens": (wrong(1, jnp.zeros((4, CHOICES), jnp.int32)), ValueError, "T, .*: found 5 in x, 4 in router_indices"),
    "choices": (wrong(2, jnp.zeros((5, 2))), ValueError, "k, .*: found 3 in router_indices, 2 in router_weights"),
    "experts": (
        wrong(5, random_weights(5, H, WIDTH)),
        ValueError,
        "E, .*: found 6 in gate_up, 6 in gate_up_bias, 5 in down",
    ),
    "width": (
        wrong(5, random_weights(E, H, 128)),
        ValueError,
        r"2 I, .*: found 320 in gate_up .*256 in down \(last axis, twice\)",
    ),
    "bias": (wrong(4, jnp.zeros((E, 319))), ValueError, "319 in gate_up_bias"),
    "float indices": (wrong(1, jnp.zeros((5, CHOICES))), TypeError, "router_indices: found an array of float32"),
    "dense": (wrong(3, jnp.zeros((E, 2 * WIDTH, H))), TypeError, "gate_up: found .*, expected an MXFP4Array"),
}


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_wrong_arguments_are_refused_by_name(name: str) -> None:
    call, error, message = WRONG_CALLS[name]
    with pytest.raises(error, match=message):
        call()
