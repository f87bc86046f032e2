"""MXFP4Attention: against plain NumPy, the model and itself step by step."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gpt_oss_reference
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorport
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tensorport import mxfp4
from tensorport.models.gpt_oss import model as gpt_oss_model
from tensorport.models.gpt_oss.config import Config, Rope
from tensorport.nnx import MXFP4Attention, quantize_model

HIDDEN, HEADS, KEY_HEADS, HEAD_DIM, WINDOW, ROWS, TOKENS = 64, 6, 2, 16, 5, 4, 13
ROPE = Rope(theta=150_000.0, factor=32.0, original_context=4096)

CONFIG = {
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_HEADS,
    "head_dim": HEAD_DIM,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": WINDOW,
    "rope_theta": 150_000.0,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "original_max_position_embeddings": 4096,
        "truncate": False,
    },
}


def random(*shape: int, seed: int = 1, dtype: Any = np.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def params(*, codes: bool = False, dtype: Any = jnp.float32) -> dict[str, Any]:
    """A `self_attn` whose weights are MXFP4 values, so that quantizing them loses nothing."""
    sizes = {
        "q_proj": (HEADS * HEAD_DIM, HIDDEN),
        "k_proj": (KEY_HEADS * HEAD_DIM, HIDDEN),
        "v_proj": (KEY_HEADS * HEAD_DIM, HIDDEN),
        "o_proj": (HIDDEN, HEADS * HEAD_DIM),
    }
    made: dict[str, Any] = {"sinks": random(HEADS, seed=20).astype(dtype)}
    for seed, (name, shape) in enumerate(sizes.items()):
        w = mxfp4.quantize(random(*shape, seed=seed) * shape[1] ** -0.5)
        bias = random(shape[0], seed=10 + seed).astype(dtype)
        made[name] = {"weight": w if codes else w.dequantize(dtype), "bias": bias}
    return made


def layer_of(self_attn: Mapping[str, Any], **options: Any) -> MXFP4Attention:
    return MXFP4Attention.from_params(self_attn, **{"head_dim": HEAD_DIM, "rope": ROPE, **options})


def reference(self_attn: Mapping[str, Any], config: Mapping[str, Any], kind: int, x: Any) -> Any:
    """What the NumPy forward pass computes of one row."""
    weights = {f"model.layers.{kind}.self_attn.{name}": np.asarray(tensor) for name, tensor in flat(self_attn).items()}
    layer = gpt_oss_reference.Layer(kind, weights, config, lambda _, __, value: value)
    return gpt_oss_reference.attention(layer, gpt_oss_reference.yarn(config, len(x)), np.asarray(x))


def flat(self_attn: Mapping[str, Any]) -> dict[str, Any]:
    named = {
        f"{name}.{kind}": self_attn[name][kind] for name in self_attn if name != "sinks" for kind in self_attn[name]
    }
    return {"sinks": self_attn["sinks"], **named}


@pytest.mark.parametrize("codes", [True, False])
@pytest.mark.parametrize("kind", [0, 1])
def test_it_computes_what_numpy_computes(kind: int, codes: bool) -> None:
    layer = layer_of(params(codes=codes), sliding_window=WINDOW if kind == 0 else None)
    x = random(2, 2, TOKENS, HIDDEN)
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        found = layer(x)
    assert (found.shape, found.dtype) == (x.shape, jnp.float32)
    for place in np.ndindex(2, 2):
        expected = reference(params(), CONFIG, kind, x[place])
        np.testing.assert_allclose(found[place], expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    # A sequence alone, without further axes.
    np.testing.assert_allclose(layer(x[0, 1]), found[0, 1], rtol=0, atol=1e-5)


def test_without_rope_sinks_and_biases_it_is_the_attention_of_jax() -> None:
    made = params()
    weights = {name: {"weight": made[name]["weight"]} for name in made if name != "sinks"}
    layer = layer_of(weights, rope=None, sliding_window=WINDOW)
    assert layer.sinks is None
    assert layer.q_proj.bias is None
    x = random(ROWS, TOKENS, HIDDEN)
    query, key, value = (
        (x @ weights[name]["weight"].T).reshape(ROWS, TOKENS, -1, HEAD_DIM) for name in ("q_proj", "k_proj", "v_proj")
    )
    mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True, local_window_size=(WINDOW - 1, 0))
    expected = mixed.reshape(ROWS, TOKENS, -1) @ weights["o_proj"]["weight"].T
    np.testing.assert_allclose(layer(x), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_it_calls_the_attention_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def spy(*args: Any, **options: Any) -> Any:
        calls.append(options)
        return attention(*args, **options)

    attention = gpt_oss_model.attention  # type: ignore[attr-defined]
    monkeypatch.setattr(gpt_oss_model, "attention", spy)
    for name in ("xla", "native"):
        layer_of(params(), sliding_window=WINDOW, implementation=name)(random(3, HIDDEN))
    assert calls == [{"sliding_window": WINDOW, "implementation": name} for name in ("xla", "native")]
    with pytest.raises(NotImplementedError, match="pallas_mosaic: not in this version"):
        layer_of(params(), implementation="pallas_mosaic")(random(3, HIDDEN))


@pytest.fixture(scope="module")
def config(golden_hf: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((golden_hf / "config.json").read_text())
    return loaded


def from_golden(self_attn: Mapping[str, Any], config: Mapping[str, Any], index: int, **options: Any) -> MXFP4Attention:
    read = Config.from_json(config)
    window = read.sliding_window if read.layer_types[index] == "sliding_attention" else None
    return MXFP4Attention.from_params(
        self_attn, head_dim=read.head_dim, rope=read.rope, sliding_window=window, **options
    )


@pytest.mark.parametrize("index", range(4))
def test_a_layer_of_the_golden_checkpoint(golden_hf: Path, config: dict[str, Any], index: int) -> None:
    self_attn = tensorport.load_params(golden_hf)["model"]["layers"][str(index)]["self_attn"]
    layer = from_golden(self_attn, config, index)
    assert (layer.num_attention_heads, layer.num_key_value_heads, layer.head_dim) == (6, 2, 32)
    x = random(21, 96)
    quantized = jax.tree.map(lambda leaf: mxfp4.fake_quantize(leaf) if leaf.ndim == 2 else leaf, self_attn)
    expected = reference(quantized, config, index, x)
    found = layer(x)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    dense = reference(self_attn, config, index, x)
    error = np.linalg.norm(found - dense) / np.linalg.norm(dense)
    # Four matrices of normal values, each some 12 % off.
    assert 0.01 < error < 0.4


def test_both_layouts_give_the_same_layer(golden_hf: Path, golden_original: Path, config: dict[str, Any]) -> None:
    ours = tensorport.load_params(golden_hf)["model"]["layers"]
    theirs = tensorport.load_params(golden_original)["block"]
    x = random(21, 96)
    for index in range(4):
        found = from_golden(theirs[str(index)]["attn"], config, index)
        expected = from_golden(ours[str(index)]["self_attn"], config, index)
        np.testing.assert_array_equal(found(x), expected(x))


def test_fused_codes_are_divided() -> None:
    made = params(codes=True)
    names = ("q_proj", "k_proj", "v_proj")
    weights = [made[name]["weight"] for name in names]
    fused = mxfp4.MXFP4Array(
        *(jnp.concatenate(leaves) for leaves in zip(*((w.blocks, w.scales) for w in weights), strict=True))
    )
    bias = jnp.concatenate([made[name]["bias"] for name in names])
    original = {
        "norm": {"scale": jnp.ones(HIDDEN)},
        "qkv": {"weight": fused, "bias": bias},
        "sinks": made["sinks"],
        "out": made["o_proj"],
    }
    x = random(TOKENS, HIDDEN)
    np.testing.assert_array_equal(layer_of(original)(x), layer_of(made)(x))
    assert layer_of(made).o_proj.kernel[...].blocks is made["o_proj"]["weight"].blocks


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("chunks", [[1] * TOKENS, [TOKENS], [7, 1, 1, 4], [2, 11]], ids=str)
def test_decoding_step_by_step_gives_the_same(chunks: list[int], window: int | None) -> None:
    """Rings wrap twice and more, and one chunk is longer than the ring."""
    layer = layer_of(params(), sliding_window=window)
    x = random(ROWS, TOKENS, HIDDEN)
    expected = layer(x)
    step = nnx.jit(lambda layer, x, cache: layer(x, cache=cache))
    cache = layer.empty_cache(ROWS, TOKENS)
    assert cache.layer.keys.shape == (ROWS, window or TOKENS, KEY_HEADS, HEAD_DIM)
    found, start = [], 0
    for size in chunks:
        y, cache = step(layer, x[:, start : start + size], cache)
        found.append(y)
        start += size
        np.testing.assert_array_equal(cache.lengths, np.full(ROWS, start))
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("window", [None, WINDOW])
def test_rows_may_be_of_different_lengths(window: int | None) -> None:
    layer = layer_of(params(), sliding_window=window)
    lengths = [9, 1, 7, 0]
    positions = np.stack([np.where(np.arange(11) < length, np.arange(11), -1) for length in lengths]).reshape(2, 2, 11)
    # What is padding is never read.
    x = jnp.where((positions < 0)[..., None], jnp.nan, random(2, 2, 11, HIDDEN))
    rows = x.reshape(ROWS, 11, HIDDEN)
    found, cache = layer(x, positions=positions, cache=layer.empty_cache(ROWS, 12))
    np.testing.assert_array_equal(cache.lengths, lengths)
    alone = layer(x, positions=positions)
    tail = random(2, 2, 1, HIDDEN, seed=2)
    following, cache = layer(tail, cache=cache)
    np.testing.assert_array_equal(cache.lengths, np.add(lengths, 1))
    assert layer.o_proj.bias is not None
    for row, length in enumerate(lengths):
        expected = layer(jnp.concatenate([rows[row, :length], tail[divmod(row, 2)]]))
        atol = 1e-5 * np.abs(expected).max()
        for one in (found, alone):
            np.testing.assert_allclose(one[divmod(row, 2)][:length], expected[:length], rtol=0, atol=atol)
            padding = one[divmod(row, 2)][length:]
            np.testing.assert_array_equal(padding, np.broadcast_to(layer.o_proj.bias[...], padding.shape))
        np.testing.assert_allclose(following[divmod(row, 2)], expected[length:], rtol=0, atol=atol)


def test_a_position_behind_the_last_slot_is_nan() -> None:
    layer = layer_of(params())
    x = random(1, 5, HIDDEN)
    found, _ = layer(x, cache=layer.empty_cache(1, 5))
    assert np.isfinite(found).all()
    cache = layer.empty_cache(1, 4)
    _, cache = layer(x[:, :4], cache=cache)
    found, _ = layer(x[:, 4:], cache=cache)
    assert np.isnan(found).all()
    # A ring has no last slot.
    layer = layer_of(params(), sliding_window=2)
    found, _ = layer(x, cache=layer.empty_cache(1, 4))
    assert np.isfinite(found).all()


def test_a_cache_of_another_dtype_rounds_keys_and_values() -> None:
    layer = layer_of(params(), sliding_window=WINDOW)
    x = random(ROWS, TOKENS, HIDDEN)
    expected = layer(x)
    whole, _ = layer(x, cache=layer.empty_cache(ROWS, TOKENS, dtype=jnp.bfloat16))
    cache, steps = layer.empty_cache(ROWS, TOKENS, dtype=jnp.bfloat16), []
    for token in range(TOKENS):
        y, cache = layer(x[:, token : token + 1], cache=cache)
        steps.append(y)
    assert cache.layer.keys.dtype == jnp.bfloat16
    largest = np.abs(expected).max()
    np.testing.assert_allclose(jnp.concatenate(steps, axis=1), whole, rtol=0, atol=1e-5 * largest)
    error = np.abs(whole - expected).max() / largest
    assert 1e-4 < error < 4 * 2**-8


def test_gradients_are_those_of_finite_differences() -> None:
    with jax.enable_x64(True):
        layer = layer_of(params(dtype=jnp.float64), sliding_window=WINDOW)
        graphdef, trained, *codes = nnx.split(layer, nnx.Param, ...)
        x, direction = (random(TOKENS, HIDDEN, seed=seed, dtype=np.float64) for seed in (3, 4))
        assert layer(x).dtype == jnp.float64

        @jax.jit
        def loss(x: Any, trained: Any) -> Any:
            return jnp.sum(nnx.merge(graphdef, trained, *codes)(x) * direction)

        gradients = jax.grad(loss, (0, 1))(x, trained)
        leaves, structure = jax.tree.flatten((x, trained))
        # x, four biases and the sinks.
        assert len(leaves) == 6
        step = 1e-6
        for number, gradient in enumerate(jax.tree.leaves(gradients)):
            along = random(*gradient.shape, seed=30 + number, dtype=np.float64)
            ends = [
                loss(*jax.tree.unflatten(structure, [*leaves[:number], leaf, *leaves[number + 1 :]]))
                for leaf in (leaves[number] + step * along, leaves[number] - step * along)
            ]
            slope = float(ends[0] - ends[1]) / (2 * step)
            np.testing.assert_allclose(float(jnp.sum(gradient * along)), slope, rtol=1e-5, atol=1e-8)


def test_training_leaves_codes_as_they_are() -> None:
    layer = layer_of(params())
    optimizer = nnx.Optimizer(layer, optax.adam(1e-2), wrt=nnx.Param)
    before = jax.tree.map(np.asarray, nnx.state(layer))
    x = random(ROWS, TOKENS, HIDDEN)

    @nnx.jit
    def train(layer: MXFP4Attention, optimizer: Any) -> Any:
        loss, gradients = nnx.value_and_grad(lambda layer: jnp.mean(layer(x) ** 2))(layer)
        optimizer.update(layer, gradients)
        return loss

    losses = [float(train(layer, optimizer)) for _ in range(10)]
    assert losses[-1] < losses[0]
    changed = {
        jax.tree_util.keystr(path): not np.array_equal(a, b)
        for (path, a), b in zip(jax.tree.leaves_with_path(before), jax.tree.leaves(nnx.state(layer)), strict=True)
    }
    trained = {path for path, is_changed in changed.items() if is_changed}
    biases = {f"['{name}']['bias'].value" for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    assert trained == {*biases, "['sinks'].value"}
    assert len(changed) == 5 + 2 * 4


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, jnp.float32], ids=str)
@pytest.mark.parametrize("param_dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("input_dtype", [jnp.bfloat16, jnp.float32])
def test_dtypes_are_those_of_a_dense_layer(dtype: Any, param_dtype: Any, input_dtype: Any) -> None:
    options: Any = {"dtype": dtype, "param_dtype": param_dtype}
    x = jnp.ones((TOKENS, HIDDEN), input_dtype)

    def results() -> Any:
        layer = attention_layer(**options)
        cached, _ = layer(x, cache=layer.empty_cache(1, TOKENS))
        return layer(x), cached, nnx.Linear(HIDDEN, HIDDEN, rngs=nnx.Rngs(0), **options)(x)

    found, cached, dense = jax.eval_shape(results)
    assert found.dtype == cached.dtype == dense.dtype


def attention_layer(**options: Any) -> MXFP4Attention:
    sizes = HIDDEN, HEADS, KEY_HEADS, HEAD_DIM
    return MXFP4Attention(*sizes, **{"rope": ROPE, "rngs": nnx.Rngs(0), **options})


def test_bfloat16_is_as_exact_as_its_roundings() -> None:
    self_attn = params(dtype=jnp.bfloat16)
    x = random(TOKENS, HIDDEN).astype(jnp.bfloat16)
    found = layer_of(self_attn)(x)
    assert found.dtype == jnp.bfloat16
    widened = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), self_attn)
    expected = reference(widened, CONFIG, 1, x.astype(jnp.float32))
    error = np.linalg.norm(np.asarray(found, np.float32) - expected) / np.linalg.norm(expected)
    # Queries, keys, values, mixed values and the result are rounded once or twice each.
    assert error < 8 * 2**-8


def test_a_layer_from_a_key() -> None:
    layer = attention_layer(bias_init=nnx.initializers.normal(1.0), sinks_init=nnx.initializers.normal(1.0))
    linears = layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj
    assert [linear.kernel.shape for linear in linears] == [(96, 64), (32, 64), (32, 64), (64, 96)]
    assert layer.sinks is not None
    assert layer.sinks.shape == (HEADS,)
    values = [np.asarray(linear.kernel[...].dequantize(jnp.float32)) for linear in linears]
    assert not np.array_equal(values[1], values[2])
    bare = attention_layer(use_bias=False, use_sinks=False)
    assert bare.sinks is None
    assert all(linear.bias is None for linear in (bare.q_proj, bare.k_proj, bare.v_proj, bare.o_proj))
    np.testing.assert_array_equal(bare.q_proj.kernel[...].blocks.shape, layer.q_proj.kernel[...].blocks.shape)
    merged = nnx.merge(*nnx.split(layer))
    x = random(TOKENS, HIDDEN)
    np.testing.assert_array_equal(merged(x), layer(x))


def test_quantize_model_leaves_it_alone() -> None:
    model = nnx.Dict({"attention": attention_layer(), "up": nnx.Linear(HIDDEN, 96, rngs=nnx.Rngs(1))})
    before = nnx.state(model["attention"])
    report = quantize_model(model, "")
    assert list(report.tensors) == ["up"]
    assert all(
        found is expected
        for found, expected in zip(jax.tree.leaves(nnx.state(model["attention"])), jax.tree.leaves(before), strict=True)
    )


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_a_sharded_layer_computes_the_same(kind: AxisType) -> None:
    x = random(ROWS, TOKENS, HIDDEN)
    options: Any = {"bias_init": nnx.initializers.normal(1.0), "sinks_init": nnx.initializers.normal(1.0)}
    dense = attention_layer(**options)
    expected = dense(x)
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind, kind), devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        layer = attention_layer(
            **options,
            qkv_metadata={"out_sharding": (None, "model")},
            o_metadata={"out_sharding": (None, "data")},
            sinks_metadata={"out_sharding": ("model",)},
        )
        for linear in (layer.q_proj, layer.k_proj, layer.v_proj):
            assert linear.kernel.get_metadata("out_sharding") == ("model", None)
            assert linear.kernel[...].scales.sharding.spec == PartitionSpec("model", None)
        assert layer.o_proj.kernel[...].scales.sharding.spec == PartitionSpec("data", None)
        placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec()))
        step = nnx.jit(lambda layer, x, cache: layer(x, cache=cache))
        found = nnx.jit(lambda layer, x: layer(x))(layer, placed)
        first, cache = step(layer, placed[:, :9], layer.empty_cache(ROWS, TOKENS))
        second, cache = step(layer, placed[:, 9:], cache)
        gradient = nnx.jit(jax.grad(lambda x: layer(x).sum()))(placed)
    atol = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)
    both = np.concatenate([first, second], axis=1)
    np.testing.assert_allclose(both, expected, rtol=0, atol=atol)
    np.testing.assert_allclose(gradient, jax.grad(lambda x: dense(x).sum())(x), rtol=0, atol=1e-4)


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "hidden": ({"hidden_size": 48}, "hidden_size: found 48, expected a multiple of 32"),
    "heads": ({"num_attention_heads": 3}, r"num_attention_heads \* head_dim: found 48, expected a multiple of 32"),
    "groups": ({"num_key_value_heads": 4}, r"num_attention_heads: found 6, expected .* num_key_value_heads \(4\)"),
    "no keys": ({"num_key_value_heads": 0}, "num_attention_heads: found 6, expected a multiple of .* \\(0\\)"),
    "odd": ({"num_attention_heads": 32, "head_dim": 5}, "head_dim: found 5, expected an even number"),
    "window": ({"sliding_window": 0}, "sliding_window: found 0, expected at least 1, or None"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_sizes_that_do_not_fit_are_refused(name: str) -> None:
    changed, message = FAULTS[name]
    sizes: dict[str, Any] = {"hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS}
    with pytest.raises(ValueError, match=message):
        MXFP4Attention(**{**sizes, "head_dim": HEAD_DIM, "rope": ROPE, **changed}, rngs=nnx.Rngs(0))


def test_calls_that_do_not_fit_are_refused() -> None:
    layer, x = layer_of(params()), random(ROWS, TOKENS, HIDDEN)
    with pytest.raises(ValueError, match=r"x: found shape \(64,\), expected \[..., T, 64\]"):
        layer(x[0, 0])
    with pytest.raises(ValueError, match="K, the last axis: found 32 in x, 64 in w"):
        layer(x[..., :32])
    with pytest.raises(ValueError, match=r"positions: found shape \(4, 12\), expected \(4, 13\)"):
        layer(x, positions=np.zeros((ROWS, 12), np.int32))
    with pytest.raises(ValueError, match=r"positions: found shape \(13,\), expected 2 axes"):
        layer(x, positions=np.arange(TOKENS))
    with pytest.raises(TypeError, match="positions: found an array of float32, expected integers"):
        layer(x, positions=jnp.zeros((ROWS, TOKENS)))
    with pytest.raises(ValueError, match="cache: found 3 rows, expected 4, those of x"):
        layer(x, cache=layer.empty_cache(3, TOKENS))
    with pytest.raises(ValueError, match="empty_cache: found batch 0 and max_length 5"):
        layer.empty_cache(0, 5)


def test_parameters_that_do_not_fit_are_all_named() -> None:
    made = params()
    made["k_proj"] = {"weight": made["k_proj"]["weight"][:, :32]}
    made["o_proj"] = {"bias": made["o_proj"]["bias"][:5]}
    made["q_norm"] = {"weight": jnp.ones(HEAD_DIM)}
    with pytest.raises(tensorport.MappingError) as caught:
        layer_of(made)
    for part in (
        "4 tensors do not fit the layer",
        "o_proj.weight: found no such tensor, expected [H, Q]",
        "q_norm.weight: found, expected no such tensor",
        "k_proj.weight: found shape [32, 32], expected [K, H]",
        "o_proj.bias: found shape [5], expected [H]",
    ):
        assert part in str(caught.value)


def test_rows_that_are_not_whole_heads_are_refused() -> None:
    with pytest.raises(tensorport.MappingError, match="found 96 rows of queries, expected whole heads of 7; found 32"):
        layer_of(params(), head_dim=7)
    with pytest.raises(tensorport.MappingError, match="found 6 sinks, expected 3, one for each head of queries"):
        layer_of(params(), head_dim=32)
    made = params()
    fused = {"weight": jnp.zeros((96 + 33, HIDDEN))}
    with pytest.raises(tensorport.MappingError, match="found 129 rows of qkv and 96 of queries"):
        layer_of({"qkv": fused, "out": made["o_proj"]})


def test_rope_is_plain_unless_it_says_more() -> None:
    plain = Rope(10_000.0)
    assert plain.concentration == 1
    np.testing.assert_allclose(plain.frequencies(8), [1, 1e-1, 1e-2, 1e-3])
    assert dataclasses.replace(ROPE, factor=1.0).frequencies(HEAD_DIM) == Rope(ROPE.theta).frequencies(HEAD_DIM)
