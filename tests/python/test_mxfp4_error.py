"""What quantization loses: figures against sums taken by hand and in rational numbers, reports, and chosen matrices."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib as mpl
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from matplotlib import pyplot as plt
from tensorport import MappingError, mxfp4
from tensorport.mxfp4 import error as error_module

mpl.use("Agg")

FLOATS = (ml_dtypes.bfloat16, np.float16, np.float32, np.float64)

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def normal(*shape: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray[Any, Any]:
    values: np.ndarray[Any, Any] = np.random.default_rng(seed).normal(size=shape).astype(dtype)
    return values


def block(*values: float, dtype: Any = np.float32) -> np.ndarray[Any, Any]:
    """Some values and zeros up to a block."""
    return np.array([*values, *[0.0] * (32 - len(values))], dtype)


def decoded(w: mxfp4.MXFP4Array) -> np.ndarray[Any, Any]:
    """What the codes stand for, by a table."""
    blocks, scales = np.asarray(w.blocks), np.asarray(w.scales).astype(int)
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*scales.shape, 32)
    values: np.ndarray[Any, Any] = np.ldexp(E2M1[codes], scales[..., None] - 127).reshape(w.shape)
    return values


def exact(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> tuple[float, float, float]:
    """Mean squared error, SQNR in dB and largest error, in rational numbers."""
    source = [Fraction(float(value)) for value in x.ravel()]
    errors = [value - Fraction(float(other)) for value, other in zip(source, y.ravel(), strict=True)]
    signal, noise = sum(value**2 for value in source), sum(error**2 for error in errors)
    return float(noise / len(source)), 10 * math.log10(signal / noise), float(max(map(abs, errors)))


def assert_exact(found: mxfp4.QuantizationError, expected: tuple[float, float, float]) -> None:
    assert found.mse == pytest.approx(expected[0], rel=1e-14)
    assert found.sqnr_db == pytest.approx(expected[1], abs=1e-12)
    assert found.max_error == pytest.approx(expected[2], rel=1e-15)


@pytest.fixture
def ax() -> Iterator[Any]:
    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)


# Figures of one array.


def test_a_block_counted_by_hand() -> None:
    # The scale is 1: 6 and -1.5 are codes, 0.625 lies between 0.5 and 1.
    found = mxfp4.quantization_error(block(6, -1.5, 0.625))
    assert found.mse == 0.125**2 / 32
    assert found.max_error == 0.125
    assert found.sqnr_db == pytest.approx(10 * math.log10((36 + 2.25 + 0.625**2) / 0.125**2), abs=1e-12)
    assert (found.shape, found.dtype, found.nonfinite) == ((32,), "float32", 0)
    assert (found.source_bytes, found.quantized_bytes, found.compression) == (128, 17, 128 / 17)


@pytest.mark.parametrize(("rule", "max_error"), [("floor", 1.5), ("ceil", 0.5), ("nearest", 0.5)])
def test_a_rule_that_saturates_shows_in_the_largest_error(rule: Any, max_error: float) -> None:
    # 7.5 is 6 under scale 1, and 8 under scale 2.
    assert mxfp4.quantization_error(block(7.5), scale_rule=rule).max_error == max_error


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rule", ["floor", "ceil", "nearest"])
def test_figures_are_those_of_exact_arithmetic(dtype: Any, rule: Any) -> None:
    x = normal(5, 3, 96, dtype=dtype) * np.exp2(np.arange(-7, 8)).reshape(5, 3, 1).astype(dtype)
    w = mxfp4.quantize(x, scale_rule=rule)
    assert_exact(mxfp4.error_between(x, w), exact(x, decoded(w)))
    assert mxfp4.quantization_error(x, scale_rule=rule) == mxfp4.error_between(x, w)


@pytest.mark.parametrize("shape", [(32,), (7, 64), (3, 5, 96), (2, 3, 1, 160), (11, 1, 32)])
@pytest.mark.parametrize("piece_blocks", [1, 2, 7])
def test_pieces_cover_the_array_once(
    shape: tuple[int, ...], piece_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(error_module, "_PIECE_BLOCKS", piece_blocks)
    x = normal(*shape)
    expected = exact(x, decoded(mxfp4.quantize(x)))
    assert_exact(mxfp4.quantization_error(x), expected)
    # Two devices: arrays that do not lie in one piece in host memory are cut where they are.
    mesh = Mesh(np.array(jax.devices()[:2]), ("d",))
    spread = jax.device_put(x, NamedSharding(mesh, PartitionSpec("d") if len(x) % 2 == 0 else PartitionSpec()))
    assert_exact(mxfp4.quantization_error(spread), expected)


def test_arrays_larger_than_a_piece_and_in_any_memory_order() -> None:
    x = normal(3, 1100, 416)
    assert x.size // 32 > 5 * error_module._PIECE_BLOCKS
    error = (x - decoded(mxfp4.quantize(x))).astype(np.float64)
    for array in (x, np.asfortranarray(x), jnp.asarray(x)):
        found = mxfp4.quantization_error(array)
        assert found.mse == pytest.approx(math.fsum(np.square(error).ravel()) / x.size, rel=1e-14)
        assert found.max_error == np.abs(error).max()


@pytest.mark.parametrize("dtype", FLOATS[:3])
def test_jax_arrays_give_the_figures_of_numpy_arrays(dtype: Any) -> None:
    x = normal(6, 10, 64, dtype=dtype)
    expected = mxfp4.quantization_error(x)
    assert mxfp4.quantization_error(jnp.asarray(x)) == expected
    mesh = Mesh(np.array(jax.devices()[:6]).reshape(3, 2), ("e", "n"))
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("e", "n")))
    assert mxfp4.quantization_error(sharded) == expected
    assert mxfp4.error_between(x, mxfp4.quantize(sharded)) == expected


def test_numpy_arrays_start_no_backend() -> None:
    program = """
import numpy as np
from jax._src import xla_bridge
from tensorport import mxfp4
x = np.linspace(-3, 5, 320, dtype=np.float32).reshape(5, 64)
params, report = mxfp4.quantize_params({"w": x}, "w")
assert report.tensors["w"] == mxfp4.quantization_error(x)
assert not xla_bridge.backends_are_initialized()
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)


def test_stochastic_rounding_is_worse_in_the_mean_square_and_needs_its_key() -> None:
    x = jnp.asarray(normal(40, 96))
    nearest = mxfp4.quantization_error(x, scale_rule="ceil")
    random = mxfp4.quantization_error(x, scale_rule="ceil", rounding="stochastic", key=jax.random.key(0))
    # Rounding up with probability p, p uniform, has twice the squared error of rounding to the nearest.
    assert random.mse == pytest.approx(2 * nearest.mse, rel=0.1)
    with pytest.raises(ValueError, match="key: found no key"):
        mxfp4.quantization_error(x, rounding="stochastic")


def test_blocks_with_nan_or_infinity_are_counted_and_left_out() -> None:
    x = normal(4, 96)
    x[1, 40], x[3, 0], x[3, 31], x[3, 95] = np.nan, np.inf, -np.inf, np.nan
    blocks = x.reshape(12, 32)
    whole = blocks[[0, 1, 2, 3, 5, 6, 7, 8, 10]]
    expected = mxfp4.quantization_error(whole)
    for array in (x, jnp.asarray(x)):
        found = mxfp4.quantization_error(array)
        assert found.nonfinite == 4
        assert (found.mse, found.sqnr_db, found.max_error) == (expected.mse, expected.sqnr_db, expected.max_error)
    alone = mxfp4.quantization_error(np.full((2, 32), np.nan, np.float32))
    assert math.isnan(alone.mse)
    assert math.isnan(alone.sqnr_db)
    assert (alone.max_error, alone.nonfinite) == (0, 64)


def test_what_is_lossless_has_an_infinite_sqnr() -> None:
    for x in (np.zeros((3, 32), np.float16), np.tile(E2M1, 8).astype(np.float32)):
        found = mxfp4.quantization_error(x)
        assert (found.mse, found.sqnr_db, found.max_error) == (0, math.inf, 0)


def test_codes_of_something_else() -> None:
    ones = mxfp4.quantize(np.ones((3, 32), np.float32))
    assert mxfp4.error_between(np.zeros((3, 32), np.float32), ones).sqnr_db == -math.inf
    nan = mxfp4.MXFP4Array(ones.blocks, np.full((3, 1), 255, np.uint8))
    found = mxfp4.error_between(np.ones((3, 32), np.float32), nan)
    assert (found.mse, found.sqnr_db, found.max_error) == (math.inf, -math.inf, math.inf)
    # Under scale byte 254 codes are infinite in bfloat16, but stand for numbers.
    large = mxfp4.MXFP4Array(ones.blocks, np.full((3, 1), 254, np.uint8))
    assert mxfp4.error_between(decoded(large), large).max_error == 0


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (0,)])
def test_nothing_to_compare(shape: tuple[int, ...]) -> None:
    for found in (mxfp4.quantization_error(x) for x in (np.zeros(shape, np.float32), jnp.zeros(shape))):
        assert math.isnan(found.mse)
        assert math.isnan(found.sqnr_db)
        assert (found.max_error, found.source_bytes, found.quantized_bytes, found.compression) == (0, 0, 0, 1)


@pytest.mark.parametrize("exponents", [(300, -300), (1000, 0), (-1000, -1000), (-500, 510)])
@pytest.mark.parametrize("scale", [0, 252])
@pytest.mark.parametrize("piece_blocks", [1, 8192])
def test_squares_beyond_the_range_of_float64(
    exponents: tuple[int, int], scale: int, piece_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(error_module, "_PIECE_BLOCKS", piece_blocks)
    x = np.concatenate([np.ldexp(normal(1, 32, seed=i, dtype=np.float64), n) for i, n in enumerate(exponents)])
    rng = np.random.default_rng(5)
    scales = np.array([[scale], [0]], np.uint8)
    w = mxfp4.MXFP4Array(rng.integers(0, 256, (2, 1, 16), np.uint8), scales)
    source = [Fraction(value) for value in x.ravel()]
    errors = [value - Fraction(other) for value, other in zip(source, decoded(w).ravel(), strict=True)]
    noise = sum((error**2 for error in errors), Fraction())
    found = mxfp4.error_between(x, w)
    ratio = sum((value**2 for value in source), Fraction()) / noise
    # Neither need the ratio be within the range of floats.
    exponent = ratio.numerator.bit_length() - ratio.denominator.bit_length()
    decibels = 10 * (math.log10(ratio / Fraction(2) ** exponent) + exponent * math.log10(2))
    assert found.sqnr_db == pytest.approx(decibels, abs=4e-12)
    mean = noise / x.size
    assert found.mse == (math.inf if mean > sys.float_info.max else pytest.approx(float(mean), rel=1e-14))


def test_an_error_reads_well() -> None:
    assert repr(mxfp4.quantization_error(normal(40, 96))) == (
        "QuantizationError(sqnr_db=18.68, mse=0.0135, max_error=0.899, compression=7.53 (15.36 kB -> 2.04 kB), "
        "shape=(40, 96), dtype=float32)"
    )
    assert "nonfinite=64" in repr(mxfp4.quantization_error(np.full((2, 32), np.nan, np.float32)))


def test_an_error_as_json_has_neither_nan_nor_infinity() -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    found = mxfp4.quantization_error(block(7.5))
    fields = json.loads(found.to_json(), parse_constant=refuse)
    assert list(fields) == [*(field.name for field in dataclasses.fields(found)), "compression"]
    assert (fields["mse"], fields["sqnr_db"], fields["shape"]) == (found.mse, found.sqnr_db, [32])
    lossless = json.loads(mxfp4.quantization_error(block(6)).to_json(), parse_constant=refuse)
    assert (lossless["mse"], lossless["sqnr_db"]) == (0, None)
    nothing = json.loads(mxfp4.quantization_error(block(math.nan)).to_json(), parse_constant=refuse)
    assert (nothing["mse"], nothing["sqnr_db"], nothing["nonfinite"]) == (None, None, 1)


def test_bad_arguments_are_refused() -> None:
    x = normal(3, 64)
    w = mxfp4.quantize(x)
    with pytest.raises(ValueError, match=re.escape("found shapes (3, 32) and (3, 64), expected the same")):
        mxfp4.error_between(x[:, :32], w)
    with pytest.raises(TypeError, match="x: found list, expected an array"):
        mxfp4.error_between([1.0], w)  # type: ignore[arg-type, unused-ignore]
    with pytest.raises(TypeError, match="x: found MXFP4Array"):
        mxfp4.error_between(w, w)
    with pytest.raises(TypeError, match="x: found an array of int32"):
        mxfp4.error_between(np.zeros((3, 64), np.int32), w)
    with pytest.raises(TypeError, match="w: found ndarray, expected an MXFP4Array"):
        mxfp4.error_between(x, x)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"x: found a traced array, expected values"):
        jax.jit(mxfp4.quantization_error)(x)
    with pytest.raises(TypeError, match=r"w: found ShapeDtypeStruct, expected values"):
        mxfp4.error_between(x, jax.eval_shape(lambda: jax.device_put(w)))
    with pytest.raises(ValueError, match=r"found shape \(3, 63\)"):
        mxfp4.quantization_error(x[:, :63])
    with pytest.raises(ValueError, match="scale_rule: found 'up'"):
        mxfp4.quantization_error(x, scale_rule="up")  # type: ignore[arg-type]


# Trees.


def tree() -> dict[str, Any]:
    return {
        "embed": normal(7, 96),
        "layers": [
            {"mlp": {"weight": normal(5, 64, seed=i) * 3**i, "bias": normal(64, seed=i), "name": "mlp"}}
            for i in range(3)
        ],
        "frozen": mxfp4.quantize(normal(4, 32)),
        "steps": np.arange(64).reshape(2, 32),
        "odd": normal(6, 33),
    }


def test_chosen_matrices_are_quantized_and_all_else_is_the_same_object() -> None:
    before = tree()
    after, report = mxfp4.quantize_params(before, r"mlp\.(weight|bias)$")
    assert list(report.tensors) == [f"layers.{i}.mlp.weight" for i in range(3)]
    assert report.warnings == ()
    for name in ("embed", "frozen", "steps", "odd"):
        assert after[name] is before[name]
    for old, new in zip(before["layers"], after["layers"], strict=True):
        assert new["mlp"]["bias"] is old["mlp"]["bias"]
        assert new["mlp"]["name"] == "mlp"
        expected = mxfp4.quantize(old["mlp"]["weight"])
        assert np.array_equal(new["mlp"]["weight"].blocks, expected.blocks)
        assert np.array_equal(new["mlp"]["weight"].scales, expected.scales)
    assert report.tensors["layers.1.mlp.weight"] == mxfp4.quantization_error(before["layers"][1]["mlp"]["weight"])


@pytest.mark.parametrize(
    "where",
    [
        r"^layers\.1",
        re.compile(r"^LAYERS\.1", re.IGNORECASE),
        lambda name, leaf: name[7:8] == "1" and hasattr(leaf, "shape"),
    ],
)
def test_where_is_a_pattern_or_a_function_of_name_and_leaf(where: Any) -> None:
    _, report = mxfp4.quantize_params(tree(), where)
    assert list(report.tensors) == ["layers.1.mlp.weight"]


def test_a_matrix_without_whole_blocks_stays_with_a_warning() -> None:
    before = tree()
    with pytest.warns(UserWarning, match="tensor 'odd' is not quantized: its last axis has 33 values") as caught:
        after, report = mxfp4.quantize_params(before, "odd|embed")
    assert caught[0].filename == __file__
    assert after["odd"] is before["odd"]
    assert list(report.tensors) == ["embed"]
    assert report.warnings == (str(caught[0].message),)


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ("nothing", r"found 13 leaves, 0 of them chosen by 'nothing', expected a float matrix"),
        ("bias|frozen|steps|name", r"found 13 leaves, 8 of them chosen by"),
        ("odd", r"(?s)1 of them chosen by 'odd'.*\n  tensor 'odd' is not quantized: its last axis has 33 values"),
    ],
)
def test_a_choice_without_a_matrix_is_refused(where: str, told: str) -> None:
    with pytest.raises(MappingError, match=told):
        mxfp4.quantize_params(tree(), where)


def test_two_matrices_of_one_name_are_refused() -> None:
    with pytest.raises(MappingError, match=r"several leaves named 'a\.b'"):
        mxfp4.quantize_params({"a.b": normal(3, 32), "a": {"b": normal(2, 32)}}, "a")


def test_bad_choices_are_refused() -> None:
    with pytest.raises(ValueError, match=r"where: found the pattern '\('"):
        mxfp4.quantize_params(tree(), "(")
    with pytest.raises(TypeError, match="where: found list"):
        mxfp4.quantize_params(tree(), ["embed"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rounding: found 'up'"):
        mxfp4.quantize_params(tree(), "embed", rounding="up")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="key: found a key with rounding='nearest'"):
        mxfp4.quantize_params(tree(), "embed", key=jax.random.key(0))


def test_a_key_makes_a_tensor_the_same_whatever_else_is_quantized() -> None:
    key = jax.random.key(7)
    options: dict[str, Any] = {"rounding": "stochastic", "scale_rule": "ceil", "key": key}
    same = {"a": normal(5, 64), "b": normal(5, 64)}
    both, report = mxfp4.quantize_params(same, "", **options)
    alone, _ = mxfp4.quantize_params({"b": same["b"]}, "", **options)
    assert np.array_equal(both["b"].blocks, alone["b"].blocks)
    assert not np.array_equal(both["a"].blocks, both["b"].blocks)
    assert report.tensors["b"] == mxfp4.error_between(same["b"], both["b"])


def test_it_quantizes_jax_arrays_equinox_modules_and_states_of_flax() -> None:
    module = eqx.nn.MLP(64, 7, 96, 2, key=jax.random.key(0))
    after, report = mxfp4.quantize_params(module, r"layers\.\d+\.weight")
    assert list(report.tensors) == [f"layers.{i}.weight" for i in range(3)]
    assert isinstance(after, eqx.nn.MLP)
    weight = after.layers[2].weight
    assert isinstance(weight, mxfp4.MXFP4Array)
    assert isinstance(weight.blocks, jax.Array)
    assert weight.shape == (7, 96)

    state = nnx.state(nnx.Linear(7, 64, rngs=nnx.Rngs(0)))
    after, report = mxfp4.quantize_params(state, "kernel")
    assert list(report.tensors) == ["kernel"]
    assert isinstance(after["kernel"].get_value(), mxfp4.MXFP4Array)
    after, report = mxfp4.quantize_params(nnx.to_pure_dict(state), "kernel")
    assert isinstance(after["kernel"], mxfp4.MXFP4Array)


# Reports.

HOSTILE = "<script>alert(1)</script>\x1b[31m$x_1$"


def report(**more: np.ndarray[Any, Any]) -> mxfp4.QuantizationReport:
    arrays = {"good": normal(3, 64), "bad": block(7.5), HOSTILE: normal(5, 2, 32, dtype=np.float16), **more}
    return mxfp4.QuantizationReport({name: mxfp4.quantization_error(x) for name, x in arrays.items()}, ("mind this",))


def test_a_report_is_a_table_with_the_worst_first() -> None:
    lines = repr(report(none=block(math.nan), lossless=block(6))).splitlines()
    assert lines[0] == "QuantizationReport"
    assert lines[1] == "  quantized: 5 tensors, 1.79 kB -> 323 B, 5.55x smaller"
    assert lines[2:4] == ["  NaN or infinite: none: 1 values", "  warning: mind this"]
    assert lines[4].split() == ["tensor", "shape", "dtype", "SQNR", "dB", "MSE", "max", "error", "size", "smaller"]
    assert [line.split()[0] for line in lines[5:]] == [
        "bad",
        "good",
        HOSTILE.replace("\x1b", "\\u001b"),
        "lossless",
        "none",
    ]
    assert lines[5].split()[1:] == ["[32]", "float32", "13.98", "7.03e-02", "1.50e+00", "17", "B", "7.53x"]
    assert len({len(line) for line in lines[4:]}) == 1


def test_a_report_adds_up() -> None:
    found = report()
    assert (found.source_bytes, found.quantized_bytes) == (768 + 128 + 640, 102 + 17 + 170)
    assert found.compression == 1536 / 289
    assert [name for name, _ in found.worst_first()] == ["bad", "good", HOSTILE]
    assert list(found.tensors) == ["good", "bad", HOSTILE]
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.tensors = {}  # type: ignore[misc]
    nothing = mxfp4.QuantizationReport({})
    assert "0 tensors" in repr(nothing)
    assert nothing.compression == 1


def test_a_report_in_html_shows_hostile_names_as_text() -> None:
    html = report()._repr_html_()
    assert html.startswith("<table>")
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert "<th>SQNR dB</th>" in html
    assert "<td>13.98</td>" in html


def test_a_long_report_shows_the_worst() -> None:
    errors = {f"w{i}": mxfp4.quantization_error(normal(1, 32, seed=i)) for i in range(60)}
    found = mxfp4.QuantizationReport(errors)
    assert repr(found).endswith("\n  ... 10 better ones are not shown")
    assert "... 10 better ones" in found._repr_html_()
    assert len(repr(found).splitlines()) == 2 + 1 + 50 + 1
    assert len(json.loads(found.to_json())["tensors"]) == 60


def test_a_report_as_json() -> None:
    found = report(lossless=block(6))
    fields = json.loads(found.to_json())
    assert list(fields) == ["tensors", "warnings", "source_bytes", "quantized_bytes", "compression"]
    assert fields["tensors"]["good"] == json.loads(found.tensors["good"].to_json())
    assert fields["tensors"]["lossless"]["sqnr_db"] is None
    assert fields["warnings"] == ["mind this"]


def test_a_plot_has_a_bar_for_every_tensor_the_worst_on_top() -> None:
    found = report(none=block(math.nan), lossless=block(6))
    ax: Any = found.plot()
    ax.figure.canvas.draw()
    errors = [error for _, error in found.worst_first()]
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names == ["bad", "good", HOSTILE.replace("\x1b", "\\u001b").replace("$", r"\$"), "lossless", "none"]
    widths = [bar.get_width() for bar in ax.patches]
    assert widths[:3] == [error.sqnr_db for error in errors[:3]]
    assert widths[3:] == [errors[2].sqnr_db, 0]
    assert ax.yaxis_inverted()
    texts = [text.get_text() for text in ax.texts]
    assert texts[0] == "14.0 dB, 17 B"
    assert texts[3:] == ["lossless, 17 B", "nothing to compare, 17 B"]
    assert ax.get_xlabel() == "SQNR (dB)"
    assert ax.get_title() == "MXFP4: 1.79 kB -> 323 B, 5.55x smaller"
    plt.close(ax.figure)


def test_a_plot_goes_where_it_is_told_to(ax: Any) -> None:
    assert report().plot(ax=ax) is ax
    assert len(ax.patches) == 3
    assert len(plt.get_fignums()) == 1
    assert mxfp4.QuantizationReport({}).plot(ax) is ax


def test_without_matplotlib_a_plot_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'tensorport\[notebook\]'"):
        report().plot()
