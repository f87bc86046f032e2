"""The forward pass of gpt-oss against what transformers and OpenAI's reference computed, cached and not."""

import dataclasses
import itertools
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tensorport
from numpy.typing import NDArray
from tensorport.models import gpt_oss
from tensorport.mxfp4 import MXFP4Array

DATA = Path(__file__).parents[2] / "data"
GOLDENS = ["gpt_oss_tiny", "gpt_oss_tiny_original", "gpt_oss_windows"]

forward = jax.jit(gpt_oss.forward, static_argnums=1)


@pytest.fixture(scope="module", params=GOLDENS)
def golden(request: pytest.FixtureRequest) -> tuple[Path, dict[str, NDArray[Any]]]:
    folder = DATA / request.param
    with np.load(folder / "golden.npz") as arrays:
        return folder, dict(arrays)


def loaded(folder: Path, dtype: str) -> tuple[dict[str, Any], gpt_oss.Config]:
    config = gpt_oss.load_config(folder)
    params, _ = gpt_oss.load_model_params(folder, config, dtype=dtype)
    return params, config


def relative_rms(found: NDArray[Any], expected: NDArray[Any]) -> NDArray[Any]:
    """For each position."""
    square = np.square(np.asarray(found, np.float64) - expected).mean(-1)
    rms: NDArray[Any] = np.sqrt(square / np.square(expected).mean(-1))
    return rms


def test_logits_in_float32_are_those_of_the_references(golden: tuple[Path, dict[str, NDArray[Any]]]) -> None:
    folder, arrays = golden
    params, config = loaded(folder, "float32")
    logits, cache = forward(params, config, arrays["input_ids"])
    assert cache is None
    assert logits.dtype == jnp.float32
    assert arrays["logits"].std() == pytest.approx(1, abs=0.1)  # which makes the tolerance one of the values, too
    np.testing.assert_allclose(logits, arrays["logits"], rtol=0, atol=1e-4)


def test_logits_in_bfloat16_are_near_those_of_the_references(golden: tuple[Path, dict[str, NDArray[Any]]]) -> None:
    folder, arrays = golden
    params, config = loaded(folder, "bfloat16")
    logits, _ = forward(params, config, arrays["input_ids"])
    assert logits.dtype == jnp.float32
    # transformers itself is at 0.035 to 0.04.
    assert np.median(relative_rms(logits, arrays["logits"])) <= 0.04


def test_each_layer_is_that_of_transformers(golden_hf: Path) -> None:
    params, config = loaded(golden_hf, "float32")
    with np.load(golden_hf / "golden.npz") as arrays:
        ids, last = arrays["input_ids"], arrays["hidden_3"]
    x, _ = jax.jit(gpt_oss.model.hidden_states, static_argnums=1)(params, config, ids)
    np.testing.assert_allclose(x, last, rtol=0, atol=1e-4)


# Chunks of 16, 4 and 1 tokens: above the window, below it, and one.
@pytest.mark.parametrize("cuts", [[0, 16, 32, 36, 37], [0, 1, 5, 9, 25, 26, 27, 31, 35, 36, 37], [*range(38)]], ids=len)
def test_cached_logits_are_uncached_ones_at_every_step(cuts: list[int]) -> None:
    params, config = loaded(DATA / "gpt_oss_windows", "float32")
    with np.load(DATA / "gpt_oss_windows" / "golden.npz") as arrays:
        ids, expected = arrays["input_ids"], arrays["logits"]
    assert ids.shape[1] > 5 * config.sliding_window
    cache: gpt_oss.Cache | None = gpt_oss.empty_cache(config, len(ids), 41, dtype="float32")
    for start, stop in itertools.pairwise(cuts):
        logits, cache = forward(params, config, ids[:, start:stop], cache)
        np.testing.assert_allclose(logits, expected[:, start:stop], rtol=0, atol=1e-4)
    assert cache is not None
    assert cache.lengths.tolist() == [37, 37, 37]


def test_rows_of_any_lengths_with_padding_anywhere_are_as_rows_alone() -> None:
    params, config = loaded(DATA / "gpt_oss_windows", "float32")
    with np.load(DATA / "gpt_oss_windows" / "golden.npz") as arrays:
        ids, expected = arrays["input_ids"], arrays["logits"]
    # Chunks of 16 tokens, of which each row takes another number; those of row 1 stand on the right.
    taken = [[7, 1, 13, 0, 16], [16, 5, 0, 3, 1], [0, 0, 2, 11, 9]]
    cache: gpt_oss.Cache | None = gpt_oss.empty_cache(config, 3, 41, dtype="float32")
    done = [0, 0, 0]
    for chunk in range(5):
        tokens, positions = np.full((3, 16), 299, np.int32), np.full((3, 16), -1, np.int32)
        places = []
        for row in range(3):
            count = taken[row][chunk]
            where = np.arange(16 - count, 16) if row == 1 else np.arange(count)
            tokens[row, where] = ids[row, done[row] : done[row] + count]
            positions[row, where] = np.arange(done[row], done[row] + count)
            places.append((where, np.arange(done[row], done[row] + count)))
            done[row] += count
        logits, cache = forward(params, config, tokens, cache, positions)
        for row, (where, what) in enumerate(places):
            np.testing.assert_allclose(logits[row, where], expected[row, what], rtol=0, atol=1e-4)
    assert cache is not None
    assert cache.lengths.tolist() == done == [37, 25, 22]


def test_padding_without_a_cache_is_seen_by_nothing(golden_hf: Path) -> None:
    params, config = loaded(golden_hf, "float32")
    with np.load(golden_hf / "golden.npz") as arrays:
        ids, expected = arrays["input_ids"], arrays["logits"]
    padding = 3
    tokens = np.pad(ids, ((0, 0), (padding, 0)), constant_values=7)
    positions = np.broadcast_to(np.arange(-padding, ids.shape[1]), tokens.shape)
    logits, _ = forward(params, config, tokens, None, np.maximum(positions, -1))
    np.testing.assert_allclose(logits[:, padding:], expected, rtol=0, atol=1e-4)


def test_the_plain_tree_of_load_params_is_what_forward_takes(golden_hf: Path) -> None:
    params = tensorport.load_params(golden_hf, dtype="float32")
    with np.load(golden_hf / "golden.npz") as arrays:
        logits, _ = forward(params, gpt_oss.load_config(golden_hf), arrays["input_ids"])
        np.testing.assert_allclose(logits, arrays["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("layout", ["gpt_oss_tiny", "gpt_oss_tiny_original"])
@pytest.mark.parametrize("mxfp4", ["keep", "dequantize"])
def test_converted_trees_are_the_same_model(tmp_path: Path, layout: str, mxfp4: str) -> None:
    tensorport.convert(DATA / layout, tmp_path / "tree", mxfp4=mxfp4, progress=False)  # type: ignore[arg-type]
    params, config = loaded(tmp_path / "tree", "float32")
    weights = params["model"]["layers"]["2"]["mlp"]["experts"]["down_proj"]
    assert isinstance(weights, MXFP4Array) == (mxfp4 == "keep")
    with np.load(DATA / layout / "golden.npz") as arrays:
        logits, _ = forward(params, config, arrays["input_ids"])
        np.testing.assert_allclose(logits, arrays["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decoded_experts_as_transformers_saves_them_are_the_same_model(
    tmp_path: Path, golden_hf: Path, dtype: str
) -> None:
    decoded = tensorport.load_params(golden_hf, mxfp4="dequantize", nested=False)
    tensors = {
        # [out, in] to [in, out]: what save_pretrained writes for GptOssExperts of transformers.
        name: np.ascontiguousarray(np.swapaxes(array, 1, 2)) if name.endswith(("gate_up_proj", "down_proj")) else array
        for name, array in ((name, np.asarray(array)) for name, array in decoded.items())
    }
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    fields = json.loads((golden_hf / "config.json").read_text())
    del fields["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    params, config = loaded(tmp_path, dtype)
    assert params["model"]["layers"]["0"]["mlp"]["experts"]["gate_up_proj"].shape == (6, 96, 320)
    with np.load(golden_hf / "golden.npz") as arrays:
        logits, _ = forward(params, config, arrays["input_ids"])
        one, _ = forward(params, config, arrays["input_ids"][:1, :1])
        if dtype == "float32":
            np.testing.assert_allclose(logits, arrays["logits"], rtol=0, atol=1e-4)
        assert np.median(relative_rms(logits, arrays["logits"])) <= 0.04
        np.testing.assert_allclose(one, arrays["logits"][:1, :1], rtol=0, atol=1e-4 if dtype == "float32" else 0.3)


def test_experts_of_transformers_are_not_divided_by_width(tmp_path: Path, golden_hf: Path) -> None:
    config = gpt_oss.load_config(golden_hf)
    shapes = {"model.layers.0.mlp.experts.gate_up_proj": np.zeros((6, 96, 320), np.float32)}
    safetensors.numpy.save_file(shapes, tmp_path / "model.safetensors")
    mesh = jax.make_mesh((1, 1), ("expert", "tensor"))
    with pytest.raises(tensorport.MappingError, match=r"mismatches with the target"):
        gpt_oss.load_model_params(tmp_path, config, dtype="float32", sharding=gpt_oss.sharding_rules(mesh), mesh=mesh)
    mesh = jax.make_mesh((2,), ("tensor",))
    config = dataclasses.replace(config, intermediate_size=320, vocab_size=520)
    shapes = {"model.layers.0.mlp.experts.gate_up_proj": np.zeros((6, 96, 640), np.float32)}
    safetensors.numpy.save_file(shapes, tmp_path / "model.safetensors")
    with pytest.raises(tensorport.MappingError, match=r"found experts \[in, out\], expected \[out, in\] or MXFP4"):
        gpt_oss.load_model_params(tmp_path, config, dtype="float32", sharding=gpt_oss.sharding_rules(mesh), mesh=mesh)


def test_both_layouts_are_loaded_as_the_same_tree(golden_hf: Path, golden_original: Path) -> None:
    trees = [loaded(folder, "bfloat16")[0] for folder in (golden_hf, golden_original)]
    jax.tree.map(np.testing.assert_array_equal, *trees)  # which refuses trees of other structures


def test_a_token_or_position_that_cannot_be_makes_nan_of_its_row_alone(golden_hf: Path) -> None:
    params, config = loaded(golden_hf, "float32")
    for token in (-1, config.vocab_size, 2**30):
        logits, _ = forward(params, config, np.array([[3, token, 5], [3, 4, 5]]))
        assert np.isfinite(logits[0, 0]).all()
        assert np.isnan(logits[0, 1:]).all()
        assert np.isfinite(logits[1]).all()
    cache: gpt_oss.Cache | None = gpt_oss.empty_cache(config, 2, 4, dtype="float32")
    positions = np.array([[0, 1, 2, 3, 4], [0, 1, 2, 3, -1]])
    logits, cache = forward(params, config, np.ones((2, 5), np.int32), cache, positions)
    assert np.isfinite(logits[:, :4]).all()
    assert np.isnan(logits[0, 4]).all()


def test_rings_have_no_more_slots_than_positions() -> None:
    params, config = loaded(DATA / "gpt_oss_windows", "float32")
    only_rings = dataclasses.replace(config, layer_types=("sliding_attention",) * 5, sliding_window=2**30)
    cache: gpt_oss.Cache | None = gpt_oss.empty_cache(only_rings, 1, 9, dtype="float32")
    assert cache is not None
    assert {layer.keys.shape[1] for layer in cache.layers} == {9}
    ids = np.arange(10)[None]
    logits, cache = forward(params, only_rings, ids, cache)
    uncached, _ = forward(params, only_rings, ids)
    np.testing.assert_allclose(logits[:, :9], uncached[:, :9], rtol=0, atol=1e-4)
    assert np.isnan(logits[:, 9]).all()
    whole = dataclasses.replace(only_rings, sliding_window=6)
    logits, _ = forward(params, whole, ids, gpt_oss.empty_cache(whole, 1, 9, dtype="float32"))
    assert np.isfinite(logits).all()  # rings of a whole window never end


def test_decoding_in_a_loop_on_the_device_with_a_donated_cache_is_the_greedy_continuation(golden_hf: Path) -> None:
    params, config = loaded(golden_hf, "float32")
    with np.load(golden_hf / "golden.npz") as arrays:
        expected, prompt = arrays["greedy_ids"], arrays["input_ids"][:1]

    @partial(jax.jit, donate_argnums=1)
    def continued(params: Any, cache: gpt_oss.Cache, token: Any) -> Any:
        def step(carry: Any, _: None) -> Any:
            token, cache = carry
            logits, cache = gpt_oss.forward(params, config, token, cache)
            token = jnp.argmax(logits[:, -1:], axis=-1).astype(jnp.int32)
            return (token, cache), token[0, 0]

        return jax.lax.scan(step, (token, cache), None, length=24)

    cache: gpt_oss.Cache | None = gpt_oss.empty_cache(config, 1, 80, dtype="float32")
    _, cache = forward(params, config, prompt[:, :-1], cache)
    assert cache is not None
    donated = cache.layers[1].keys
    _, tokens = continued(params, cache, jnp.asarray(prompt[:, -1:]))
    assert donated.is_deleted()
    assert tokens.tolist() == expected[prompt.shape[1] :].tolist()


def test_gradients_reach_dense_parameters(golden_hf: Path) -> None:
    params, config = loaded(golden_hf, "float32")

    def loss(scale: jax.Array) -> jax.Array:
        changed = {**params, "model": {**params["model"], "norm": {"weight": scale}}}
        logits, _ = gpt_oss.forward(changed, config, jnp.arange(6, dtype=jnp.int32)[None])
        return jnp.mean(jax.nn.log_softmax(logits)[..., 3])

    def through_layers(scale: jax.Array) -> jax.Array:
        layer = {**params["model"]["layers"]["0"], "input_layernorm": {"weight": scale}}
        changed = {**params, "model": {**params["model"], "layers": {**params["model"]["layers"], "0": layer}}}
        logits, _ = gpt_oss.forward(changed, config, jnp.arange(6, dtype=jnp.int32)[None])
        return jnp.mean(jax.nn.log_softmax(logits)[..., 3])

    for function, scale in (
        (loss, params["model"]["norm"]["weight"]),
        (through_layers, params["model"]["layers"]["0"]["input_layernorm"]["weight"]),
    ):
        gradient = jax.grad(function)(scale)
        direction = np.random.default_rng(1).normal(size=scale.shape).astype(np.float32)
        step = 3e-4  # a larger one changes the choices of routers
        difference = (function(scale + step * direction) - function(scale - step * direction)) / (2 * step)
        np.testing.assert_allclose(float(jnp.vdot(gradient, direction)), float(difference), rtol=2e-2)
