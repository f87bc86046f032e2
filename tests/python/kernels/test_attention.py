"""attention: grouped queries, sinks, sliding windows, keys anywhere in a cache."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gpt_oss_reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorport
from attention_cases import B, attention_inputs
from mxfp4_cases import EPSILON, float64, random_array, temporary_bytes
from numpy.typing import NDArray
from tensorport import kernels
from tensorport.kernels import native
from tensorport.kernels.attention import configs, reference, xla
from tensorport.kernels.attention.api import attention
from tensorport.kernels.attention.configs import Config
from tensorport.kernels.attention.types import Settings
from tensorport.kernels.registry import Device

DTYPES = ["bfloat16", "float16", "float32", "float64"]
T, S, N, G, D = 5, 11, 12, 3, 8  # queries, keys, heads of queries and of keys, width of a head

Args = tuple[Any, ...]


def inputs(
    queries: int = T, keys: int = S, *, heads: int = N, key_heads: int = G, dtype: Any = jnp.float32, seed: int = 0
) -> Args:
    return attention_inputs(queries, keys, heads, key_heads, D, dtype, seed)


def expected(args: Args, sliding_window: int | None = None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The formula in float64, query by query, and how far from it sums in the accumulator's dtype may be."""
    *floats, at, of, sinks = args
    query, key, value = map(float64, floats)
    logits = None if sinks is None else float64(sinks)
    out, bound = np.zeros(query.shape), np.zeros(query.shape)
    unit = min(EPSILON["float32"], EPSILON[args[0].dtype.name])
    for row, number, head in np.ndindex(query.shape[:3]):
        position, group = int(at[row, number]), head // (query.shape[2] // key.shape[2])
        first = 0 if sliding_window is None else max(position - sliding_window + 1, 0)
        seen = [slot for slot, other in enumerate(np.asarray(of[row])) if first <= other <= position]
        if not seen:
            continue
        products = query[row, number, head] * key[row, seen, group] / np.sqrt(query.shape[3])
        scores, values = products.sum(axis=-1), value[row, seen, group]
        sink = -np.inf if logits is None else logits[head]
        largest = max(scores.max(), sink)
        shares = np.exp(scores - largest)
        shares /= shares.sum() + np.exp(sink - largest)
        out[row, number, head] = shares @ values
        # An error e of each score changes its share by a factor of at most exp(2 e); the rest are sums over the keys.
        of_scores = query.shape[3] * unit * max(np.abs(products).sum(axis=-1).max(), abs(largest))
        bound[row, number, head] = (np.expm1(4 * of_scores) + 2 * (len(seen) + 4) * unit) * (shares @ np.abs(values))
        # Shares that are no normal float32 may be zero.
        bound[row, number, head] += float(np.finfo(np.float32).tiny) * np.abs(values).sum(axis=0)
    return out, bound + np.abs(out) * EPSILON[args[0].dtype.name]


def assert_fits(found: Any, args: Args, sliding_window: int | None = None) -> None:
    wanted, bound = expected(args, sliding_window)
    error = np.abs(float64(found) - wanted)
    assert np.isfinite(error).all()
    worst = np.max(error / np.maximum(bound, np.finfo(np.float64).tiny), initial=0)
    assert worst <= 1, f"{worst} times the bound"


def attention_reference(*args: Any, sliding_window: int | None = None) -> Any:
    query, key, value, query_positions, key_positions, sinks = args
    settings = Settings(query.shape[3] ** -0.5, sliding_window)
    return reference.attention(query, key, value, query_positions, key_positions, sinks, settings)


FUNCTIONS = [attention, attention_reference]


@pytest.mark.parametrize("sliding_window", [None, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [1, T])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_values_are_those_of_float64(
    function: Callable[..., Any], queries: int, dtype: str, sliding_window: int | None
) -> None:
    with jax.enable_x64(dtype == "float64"):
        args = inputs(queries, dtype=dtype)
        found = function(*args, sliding_window=sliding_window)
    assert (found.dtype, found.shape) == (args[0].dtype, args[0].shape)
    assert_fits(found, args, sliding_window)


@pytest.mark.parametrize(
    "dtypes",
    [
        ("bfloat16", "bfloat16", "bfloat16"),
        ("float16", "float16", "float16"),
        ("float32", "bfloat16", "bfloat16"),
        ("bfloat16", "float32", "float16"),
        ("float32", "float64", "float64"),
        ("float64", "float32", "bfloat16"),
    ],
    ids=str,
)
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_dtypes_may_differ_and_accelerators_round_the_shares(
    monkeypatch: pytest.MonkeyPatch, platform: str, dtypes: tuple[str, str, str]
) -> None:
    """What is compiled for an accelerator runs on a CPU as well."""

    class Elsewhere(Device):
        @classmethod
        def of(cls, *_: Any) -> Device:
            return Device(platform, platform, None)

    monkeypatch.setattr(xla, "Device", Elsewhere)
    with jax.enable_x64(True):
        wide = inputs(dtype=jnp.float64)
        query, key, value = (x.astype(dtype) for x, dtype in zip(wide[:3], dtypes, strict=True))
        args = (query, key, value, *wide[3:5], wide[5].astype(dtypes[0]))
        found = attention(*args, sliding_window=4, implementation="xla")
    assert found.dtype == dtypes[0]
    wanted, bound = expected(args, 4)
    error = np.abs(float64(found) - wanted)
    of_shares = EPSILON[dtypes[2]] * np.abs(float64(value)).max()
    assert np.all(error <= bound + (of_shares if platform == "gpu" else 0))
    if platform == "gpu" and dtypes[0] in ("float32", "float64") and dtypes[2] == "bfloat16":
        assert np.any(error > bound), "the shares were not rounded"


@pytest.mark.parametrize(("heads", "key_heads"), [(7, 1), (12, 12), (12, 4), (24, 3)])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_groups_of_queries_share_a_head_of_keys(function: Callable[..., Any], heads: int, key_heads: int) -> None:
    args = inputs(heads=heads, key_heads=key_heads)
    assert_fits(function(*args), args)


@pytest.mark.parametrize("sliding_window", [1, 2, T, S, 1000])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_query_sees_so_many_keys(function: Callable[..., Any], sliding_window: int) -> None:
    args = inputs()
    assert_fits(function(*args, sliding_window=sliding_window), args, sliding_window)
    if sliding_window >= S:
        np.testing.assert_array_equal(function(*args, sliding_window=sliding_window), function(*args))
    if sliding_window == 1:
        # Without a sink, the whole share is its own.
        found = np.asarray(function(*args[:5], None, sliding_window=1))
        for number, position in enumerate(np.asarray(args[3])[0]):
            own = int(np.argmax(np.asarray(args[4])[0] == position))
            np.testing.assert_array_equal(found[0, number], np.repeat(np.asarray(args[2])[0, own], N // G, axis=0))


@pytest.mark.parametrize("sliding_window", [None, 1, 4])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_without_sinks_it_is_the_attention_of_jax(function: Callable[..., Any], sliding_window: int | None) -> None:
    query, key, value, *_ = inputs(S, S)
    positions = jnp.tile(jnp.arange(S, dtype=jnp.int32), (B, 1))
    args = (query, key, value, positions, positions, None)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        wanted = jax.nn.dot_product_attention(
            query,
            key,
            value,
            is_causal=True,
            local_window_size=None if sliding_window is None else (sliding_window - 1, 0),
            implementation="xla",
        )
    _, bound = expected(args, sliding_window)
    # Both are off by no more than the bound.
    found = function(*args, sliding_window=sliding_window)
    assert np.all(np.abs(float64(found) - float64(wanted)) <= 2 * bound)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_attention_of_the_golden_checkpoint(function: Callable[..., Any], golden_hf: Path) -> None:
    """Against the NumPy forward pass whose logits equal those of transformers, in every layer."""
    config = json.loads((golden_hf / "config.json").read_text("utf-8"))
    golden = np.load(golden_hf / "golden.npz")
    checkpoint = tensorport.open(golden_hf)
    seen: dict[tuple[int, str], Any] = {}

    def hook(layer: int, name: str, value: Any) -> Any:
        seen[layer, name] = value
        return value

    logits = gpt_oss_reference.forward(checkpoint, config, golden["input_ids"][0], hook)
    np.testing.assert_allclose(logits, golden["logits"][0], atol=1e-4)
    heads, tokens = config["num_attention_heads"], len(logits)
    positions = jnp.arange(tokens, dtype=jnp.int32)[None]
    for layer, kind in enumerate(config["layer_types"]):
        window = config["sliding_window"] if kind == "sliding_attention" else None
        assert window is None or window < tokens
        sinks = jnp.asarray(checkpoint[f"model.layers.{layer}.self_attn.sinks"])
        query, key = (jnp.asarray(seen[layer, name]) for name in ("query", "key"))
        args = (
            query.reshape(1, tokens, heads, -1),
            key.reshape(1, tokens, config["num_key_value_heads"], -1),
            jnp.asarray(seen[layer, "value"])[None],
            positions,
            positions,
            sinks,
        )
        assert_fits(function(*args, sliding_window=window), args, window)
        found = np.asarray(function(*args, sliding_window=window)).reshape(tokens, -1)
        wanted = seen[layer, "mixed"]
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_where_keys_stand_does_not_matter() -> None:
    args = inputs()
    rng = np.random.default_rng(7)
    order = rng.permutation(S)
    shuffled = (args[0], *(x[:, order] for x in args[1:3]), args[3], args[4][:, order], args[5])
    assert_fits(attention(*shuffled), args)
    # And empty slots between them add nothing.
    places = np.sort(rng.permutation(2 * S)[:S])

    def spread(x: Any, fill: float) -> Any:
        return jnp.full((B, 2 * S, *x.shape[2:]), fill, x.dtype).at[:, places].set(x)

    wider = (args[0], spread(args[1], 3), spread(args[2], 5), args[3], spread(args[4], -1), args[5])
    assert_fits(attention(*wider), args)


@pytest.mark.parametrize("fill", [np.nan, np.inf])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_stands_at_no_position_is_never_read(function: Callable[..., Any], fill: float) -> None:
    args = inputs()

    def filled(value: float) -> Args:
        query, key, value_ = (
            jnp.where((positions < 0)[:, :, None, None], value, x)
            for x, positions in zip(args[:3], (args[3], args[4], args[4]), strict=True)
        )
        return query, key, value_

    def loss(query: Any, key: Any, value: Any, sinks: Any) -> Any:
        return jnp.sum(function(query, key, value, args[3], args[4], sinks) ** 2)

    gradients = jax.value_and_grad(loss, (0, 1, 2, 3))
    found, wanted = (gradients(*filled(value), args[5]) for value in (fill, 0.0))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("has_sinks", [True, False])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_query_that_sees_nothing_is_zero(function: Callable[..., Any], has_sinks: bool) -> None:
    args = inputs()
    query_positions = args[3].at[0, 1].set(-1)
    # The first position of the other row is not there, and nothing is before it.
    key_positions = jnp.where(args[4] == 0, -1, args[4]).at[0].set(args[4][0])
    sinks = args[5] if has_sinks else None
    found = np.asarray(function(*args[:3], query_positions, key_positions, sinks))
    nothing = [(0, 1), (1, 0), (1, T - 1)]
    for row, number in np.ndindex(B, T):
        assert bool(np.any(found[row, number])) is ((row, number) not in nothing)
    assert_fits(found, (*args[:3], query_positions, key_positions, sinks))

    def loss(query: Any) -> Any:
        return jnp.sum(function(query, *args[1:3], query_positions, key_positions, sinks))

    assert np.isfinite(jax.grad(loss)(args[0])).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_large_scores_do_not_overflow(function: Callable[..., Any], dtype: str) -> None:
    args = list(inputs(dtype=dtype))
    args[0] = args[0] * jnp.asarray(10_000, args[0].dtype)
    scores = np.einsum("btnd,bsd->btns", float64(args[0]), float64(args[1])[:, :, 0]) * D**-0.5
    assert scores.min() < -10_000
    assert scores.max() > 10_000
    assert_fits(function(*args), tuple(args))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_sinks_take_their_share(function: Callable[..., Any]) -> None:
    args = inputs()
    none = function(*args[:5], None)
    np.testing.assert_array_equal(function(*args[:5], jnp.full(N, -jnp.inf)), none)
    np.testing.assert_array_equal(function(*args[:5], jnp.full(N, 1e4)), jnp.zeros_like(none))
    # A sink as large as the only score leaves half of the value.
    query, key, value = jnp.zeros((1, 1, N, D)), jnp.zeros((1, 1, G, D)), args[2][:1, :1]
    position = jnp.zeros((1, 1), jnp.int32)
    half = function(query, key, value, position, position, jnp.zeros(N))
    np.testing.assert_array_equal(half[0, 0], jnp.repeat(value[0, 0] / 2, N // G, axis=0))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_nan_in_a_query_or_a_key_reaches_only_those_that_see_it(function: Callable[..., Any]) -> None:
    args = inputs()
    clean = np.asarray(function(*args, sliding_window=4))
    query, key, *rest = args
    found = np.asarray(function(query.at[0, 1, 2, 3].set(jnp.nan), key, *rest, sliding_window=4))
    assert np.isnan(found[0, 1, 2]).all()
    assert np.isnan(found).sum() == D
    slot, group = 6, 1
    found = np.asarray(function(query, key.at[0, slot, group, 0].set(jnp.nan), *rest, sliding_window=4))
    distance = np.asarray(args[3])[0] - int(args[4][0, slot])
    sees = np.zeros((B, T, N), bool)
    sees[0, :, group * N // G : (group + 1) * N // G] = ((distance >= 0) & (distance < 4))[:, None]
    assert 0 < sees.sum() < T * N // G
    np.testing.assert_array_equal(np.isnan(found).all(axis=-1), sees)
    np.testing.assert_array_equal(found[~sees], clean[~sees])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_score_of_minus_infinity_is_as_good_as_no_key(function: Callable[..., Any]) -> None:
    query, key, *rest = inputs()
    query = jnp.abs(query)
    slot = int(np.argmax(np.asarray(rest[2])[0] == S - 2))
    found = function(query, key.at[0, slot].set(-jnp.inf), *rest)
    hidden = function(query, key, rest[0], rest[1], rest[2].at[0, slot].set(-1), rest[3])
    np.testing.assert_array_equal(found[:1], hidden[:1])
    # Nor is there anything to see where all scores are.
    alone = function(query, jnp.full_like(key, -jnp.inf), *rest[:3], None)
    np.testing.assert_array_equal(alone, jnp.zeros_like(query))


@pytest.mark.parametrize("sliding_window", [None, 4])
def test_blocks_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch, sliding_window: int | None) -> None:
    args = inputs(S, S)
    function = partial(attention, sliding_window=sliding_window)

    def loss(query: Any, key: Any, value: Any, sinks: Any) -> Any:
        return jnp.sum(function(query, key, value, args[3], args[4], sinks) ** 3)

    def run() -> list[Any]:
        gradients = jax.grad(loss, (0, 1, 2, 3))(*args[:3], args[5])
        return [function(*args), *gradients]

    def has_loop() -> bool:
        # A new function, for JAX remembers what it traced.
        return "scan" in str(jax.make_jaxpr(partial(function))(*args))

    assert not has_loop()
    whole = run()
    for most, block_t in ((4, 4), (1, 1), (S - 1, S - 1)):
        monkeypatch.setattr(configs, "_MOST_SCORES", most * B * N * S + 1)
        assert Config.choose(B, S, N, S).block_t == block_t
        assert has_loop()
        found = run()
        assert_fits(found[0], args, sliding_window)
        for one, other in zip(found, whole, strict=True):
            # Sums over S queries, S keys and D dimensions in another order.
            atol = (2 * S + D) * EPSILON["float32"] * np.abs(other).max()
            np.testing.assert_allclose(one, other, rtol=0, atol=4 * atol)


def test_a_block_is_at_least_one_query_and_at_most_all() -> None:
    assert Config.choose(1, 7, 3, 2).block_t == 7
    assert Config.choose(1, 7, 3, 10**9).block_t == 1
    assert Config.choose(0, 0, 0, 0).block_t == 1
    assert Config.choose(2, 1000, 64, 4096).block_t == 2**24 // (2 * 64 * 4096)


def test_memory_does_not_grow_with_the_number_of_queries() -> None:
    """The scores of 8192 tokens of gpt-oss to each other take 17 GB in float32."""

    def bytes_of(tokens: int) -> int:
        shape: Any = jax.ShapeDtypeStruct
        floats = [shape((1, tokens, heads, 64), jnp.bfloat16) for heads in (64, 8, 8)]
        positions = [shape((1, tokens), jnp.int32)] * 2
        return temporary_bytes(jax.jit(attention), *floats, *positions, shape((64,), jnp.bfloat16))

    # Some copies of the scores of a block, and of queries, keys and values in float32.
    assert bytes_of(8192) <= 4 * 4 * 2**24 + 4 * 4 * 8192 * (64 + 8 + 8) * 64


def test_gradients_are_those_of_finite_differences() -> None:
    with jax.enable_x64(True):
        args = inputs(dtype=jnp.float64)
        direction = random_array(B, T, N, D, dtype=jnp.float64, seed=9)
        trained = args[0], args[1], args[2], args[5]

        def loss(query: Any, key: Any, value: Any, sinks: Any) -> Any:
            return jnp.sum(attention(query, key, value, args[3], args[4], sinks, sliding_window=4) * direction)

        step = 1e-6
        for number, gradient in enumerate(jax.grad(loss, (0, 1, 2, 3))(*trained)):
            along = random_array(*gradient.shape, dtype=jnp.float64, seed=10 + number)
            ends = [
                loss(*(value + sign * step * along if i == number else value for i, value in enumerate(trained)))
                for sign in (1, -1)
            ]
            slope = float(ends[0] - ends[1]) / (2 * step)
            np.testing.assert_allclose(float(jnp.sum(gradient * along)), slope, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gradients_are_those_of_the_reference(dtype: str) -> None:
    args = inputs(dtype=dtype)
    direction = random_array(B, T, N, D, seed=9)

    def gradients(function: Callable[..., Any]) -> Any:
        def loss(query: Any, key: Any, value: Any, sinks: Any) -> Any:
            out = function(query, key, value, args[3], args[4], sinks, sliding_window=4)
            return jnp.sum(out.astype(jnp.float32) * direction)

        return jax.jit(jax.grad(loss, (0, 1, 2, 3)))(*args[:3], args[5])

    for found, wanted in zip(gradients(attention), gradients(attention_reference), strict=True):
        assert found.dtype == wanted.dtype == args[0].dtype
        error = np.abs(float64(found) - float64(wanted)).max() / np.abs(float64(wanted)).max()
        assert error <= 2 * EPSILON[dtype] + 4 * (T + S + D) * EPSILON["float32"]


def test_jit_and_vmap_change_nothing() -> None:
    first, second = inputs(seed=0), inputs(seed=20)
    batch = [jnp.stack([a, b]) for a, b in zip(first, second, strict=True)]
    found = jax.vmap(partial(attention, sliding_window=4))(*batch)
    jitted = jax.jit(partial(attention, sliding_window=4, implementation="xla"))
    for index, args in enumerate((first, second)):
        assert_fits(found[index], args, 4)
        assert_fits(jitted(*args), args, 4)


def test_scale_is_that_of_the_root_unless_it_is_given() -> None:
    args = inputs()
    np.testing.assert_array_equal(attention(*args, scale=D**-0.5), attention(*args))
    scaled = (args[0] * 0.25, *args[1:])
    assert_fits(attention(*args, scale=0.25 * D**-0.5), scaled)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_positions_may_be_any_that_int32_holds(function: Callable[..., Any]) -> None:
    args = inputs()
    last = 2**31 - 1
    late = tuple(jnp.where(x >= 0, x + (last - S + 1), x) for x in args[3:5])
    for window in (None, 3):
        wanted = function(*args, sliding_window=window)
        np.testing.assert_array_equal(function(*args[:3], *late, args[5], sliding_window=window), wanted)
    # Every negative one is padding.
    lowest = jnp.where(args[3] < 0, -(2**31), args[3]), jnp.where(args[4] < 0, -(2**31), args[4])
    np.testing.assert_array_equal(function(*args[:3], *lowest, args[5]), function(*args))


def test_numpy_arrays_are_taken() -> None:
    args = inputs()
    query, key, value, at, of, sinks = map(np.asarray, args)
    found = attention(query, key, value, at.astype(np.int64), of.astype(np.int16), sinks)
    np.testing.assert_array_equal(found, attention(*args))


@pytest.mark.parametrize("sizes", [(0, S), (T, 0), (0, 0)], ids=str)
def test_empty_arrays(sizes: tuple[int, int]) -> None:
    queries, keys = sizes
    query, key = jnp.ones((B, queries, N, D)), jnp.ones((B, keys, G, D))
    at, of = (jnp.zeros((B, size), jnp.int32) for size in sizes)
    found = attention(query, key, key, at, of, jnp.zeros(N))
    np.testing.assert_array_equal(found, jnp.zeros((B, queries, N, D)))


def test_which_implementation_runs_is_told() -> None:
    args = inputs()
    explained = kernels.explain(attention, *args)
    assert (explained.op, explained.implementation) == ("attention", "native")
    half = (args[0], args[1].astype(jnp.float16), *args[2:])
    explained = kernels.explain(attention, *half)
    assert explained.implementation == "xla"
    assert explained.reasons["native"] == "found key in float16, expected one of bfloat16, float32"
    with pytest.raises(NotImplementedError, match="attention on cpu: native: found key in float16"):
        attention(*half, implementation="native")
    with pytest.raises(NotImplementedError, match="attention on cpu: pallas_triton: runs on NVIDIA GPUs alone"):
        attention(*args, implementation="pallas_triton")
    with pytest.raises(NotImplementedError, match="attention on cpu: pallas_mosaic: not in this version"):
        attention(*args, implementation="pallas_mosaic")


def wrong(number: int, value: Any, **options: Any) -> Callable[[], Any]:
    def call() -> Any:
        args = list(inputs())
        args[number] = value
        return attention(*args, **options)

    return call


def zeros(*shape: int) -> Any:
    return jnp.zeros(shape)


def positions_of(*shape: int) -> Any:
    return jnp.zeros(shape, jnp.int32)


WRONG_CALLS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "axes": (wrong(0, zeros(T, N, D)), ValueError, r"query: found shape \(5, 12, 8\), expected 4 axes"),
    "integers": (wrong(1, positions_of(B, S, G, D)), TypeError, "key: found an array of int32, expected one of"),
    "no array": (wrong(2, 1.0), TypeError, "value: found float, expected an array"),
    "batch": (wrong(1, zeros(3, S, G, D)), ValueError, "B, the rows of the batch: found 2 in query, 3 in key, 2 in"),
    "batch of positions": (wrong(4, positions_of(3, S)), ValueError, "2 in query_positions, 3 in key_positions"),
    "queries": (wrong(3, positions_of(B, 4)), ValueError, "T, .*: found 5 in query, 4 in query_positions"),
    "keys": (wrong(2, zeros(B, 10, G, D)), ValueError, "S, .*: found 11 in key, 10 in value, 11 in key_positions"),
    "slots": (wrong(4, positions_of(B, 10)), ValueError, "S, .*: found 11 in key, 11 in value, 10 in key_positions"),
    "key heads": (wrong(2, zeros(B, S, 4, D)), ValueError, "G, .*: found 3 in key, 4 in value"),
    "head": (wrong(1, zeros(B, S, G, 16)), ValueError, "D, .*: found 8 in query, 16 in key, 8 in value"),
    "sinks": (wrong(5, zeros(G)), ValueError, "N, .*: found 12 in query, 3 in sinks"),
    "axes of sinks": (wrong(5, zeros(N, 1)), ValueError, r"sinks: found shape \(12, 1\), expected 1 axis"),
    "groups": (wrong(0, zeros(B, T, 13, D)), ValueError, "13 in query, 12 in sinks"),
    "float positions": (wrong(3, zeros(B, T)), TypeError, "query_positions: found an array of float32, expected int"),
    "window": (wrong(5, None, sliding_window=0), ValueError, "sliding_window: found 0, expected at least 1, or None"),
    "implementation": (wrong(5, None, implementation="cuda"), ValueError, "implementation: found 'cuda', expected"),
}


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_wrong_arguments_are_refused_by_name(name: str) -> None:
    call, error, message = WRONG_CALLS[name]
    with pytest.raises(error, match=message):
        call()


def test_heads_of_queries_are_whole_groups_and_have_a_width() -> None:
    query, key, value, at, of, _ = inputs()
    with pytest.raises(ValueError, match="N, the number of query heads: found 11, expected a multiple of 3, of key"):
        attention(query[:, :, :11], key, value, at, of)
    with pytest.raises(ValueError, match="N, the number of query heads: found 12, expected a multiple of 0, of key"):
        attention(query, key[:, :, :0], value[:, :, :0], at, of)
    with pytest.raises(ValueError, match="D, the size of a head: found 0, expected at least 1"):
        attention(query[..., :0], key[..., :0], value[..., :0], at, of)


def gpt_oss_inputs(queries: int, keys: int, *, dtype: str = "bfloat16") -> Args:
    """One row in the sizes of gpt-oss; its last query is at the last key, and keys are in the order of a ring."""
    key_positions = np.roll(np.arange(keys), keys // 3)[None]
    query_positions = np.arange(keys - queries, keys)[None]
    return (
        random_array(1, queries, 64, 64, dtype=dtype, seed=0),
        random_array(1, keys, 8, 64, dtype=dtype, seed=1),
        random_array(1, keys, 8, 64, dtype=dtype, seed=2),
        jnp.asarray(query_positions, jnp.int32),
        jnp.asarray(key_positions, jnp.int32),
        random_array(64, dtype=dtype, seed=3),
    )


class TestNative:
    """What Rust computes on CPU."""

    @pytest.mark.parametrize("sliding_window", [None, 128])
    @pytest.mark.parametrize(("queries", "keys"), [(1, 128), (1, 1500), (40, 200)])
    def test_sizes_of_gpt_oss(self, queries: int, keys: int, sliding_window: int | None) -> None:
        args = gpt_oss_inputs(queries, keys)
        run = jax.jit(partial(attention, sliding_window=sliding_window, implementation="native"))
        assert_fits(run(*args), args, sliding_window)

    @pytest.mark.parametrize("query_dtype", native.FLOATS)
    @pytest.mark.parametrize("key_dtype", native.FLOATS)
    @pytest.mark.parametrize("value_dtype", native.FLOATS)
    def test_dtypes_may_differ(self, query_dtype: str, key_dtype: str, value_dtype: str) -> None:
        query, key, value, *rest = inputs()
        args = (query.astype(query_dtype), key.astype(key_dtype), value.astype(value_dtype), *rest)
        found = attention(*args, implementation="native")
        assert found.dtype == query_dtype
        assert_fits(found, args)

    def test_shares_are_not_rounded(self) -> None:
        args = inputs(dtype="bfloat16")
        wide = (args[0].astype(jnp.float32), *args[1:])
        assert_fits(attention(*wide, implementation="native"), wide)

    @pytest.mark.parametrize("sliding_window", [2**31 - 1, 2**31, 10**12])
    def test_a_window_may_be_wider_than_positions_go(self, sliding_window: int) -> None:
        query, key, value, _, _, sinks = inputs(1, 1)
        positions = jnp.asarray([[2**31 - 1], [3]], jnp.int32), jnp.asarray([[0], [0]], jnp.int32)
        args = (query, key, value, *positions, sinks)
        for implementation in ("native", "xla"):
            found = attention(*args, sliding_window=sliding_window, implementation=implementation)
            assert_fits(found, args, sliding_window)
        jax.grad(lambda query: attention(query, *args[1:], sliding_window=sliding_window).sum())(query)

    def test_positions_that_32_bits_do_not_hold_are_the_last(self) -> None:
        query, key, value, _, _, sinks = inputs(1, 1)
        positions = jnp.asarray([[2**31], [2**32 - 1]], jnp.uint32), jnp.asarray([[0], [0]], jnp.int8)
        last = jnp.full((2, 1), 2**31 - 1, jnp.int32), positions[1].astype(jnp.int32)
        found = attention(query, key, value, *positions, sinks)
        assert_fits(found, (query, key, value, *last, sinks))

    def test_in_loops_and_in_branches(self) -> None:
        args = inputs()

        def twice(query: Any) -> Any:
            def step(_: Any, query: Any) -> Any:
                return attention(query, *args[1:], implementation="native")

            return jax.lax.fori_loop(0, 2, step, query)

        once = attention(*args)
        np.testing.assert_array_equal(jax.jit(twice)(args[0]), attention(once, *args[1:]))

    def test_second_derivatives_are_those_of_xla(self) -> None:
        args = inputs()

        def curvature(implementation: Any) -> Any:
            def loss(query: Any) -> Any:
                return jnp.sum(attention(query, *args[1:], implementation=implementation) ** 2)

            return jax.jvp(jax.grad(loss), (args[0],), (args[0],))[1]

        found, wanted = curvature("native"), curvature("xla")
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())

    def test_arrays_on_several_devices_are_for_xla(self) -> None:
        mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices("cpu")[:2])
        query, *rest = inputs()
        spread = jax.device_put(query, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x")))
        with pytest.raises(NotImplementedError, match="native: arrays are spread over devices"):
            attention(spread, *rest, implementation="native")
