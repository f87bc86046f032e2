"""MXFP4Array: one logical array to its user, two leaves to JAX."""

import copy
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tensorport.mxfp4 import MX_BLOCK_SIZE, MXFP4Array

# Placement needs devices; said before the first test starts a backend.
jax.config.update("jax_num_cpu_devices", 8)

LEADING = (6, 10)
GROUPS = 4
SHAPE = (*LEADING, GROUPS * MX_BLOCK_SIZE)


def make(*leading: int, groups: int = GROUPS, seed: int = 0) -> MXFP4Array:
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (*leading, groups, 16), dtype=np.uint8)
    return MXFP4Array(blocks, rng.integers(0, 256, (*leading, groups), dtype=np.uint8))


def assert_same(found: MXFP4Array, expected: MXFP4Array) -> None:
    assert isinstance(found, MXFP4Array)
    np.testing.assert_array_equal(np.asarray(found.blocks), np.asarray(expected.blocks))
    np.testing.assert_array_equal(np.asarray(found.scales), np.asarray(expected.scales))


@pytest.fixture(params=["numpy", "jax"])
def w(request: pytest.FixtureRequest) -> MXFP4Array:
    array = make(*LEADING)
    return array if request.param == "numpy" else jax.device_put(array)


def test_it_has_the_attributes_of_the_logical_array(w: MXFP4Array) -> None:
    assert w.shape == SHAPE
    assert (w.ndim, w.size, len(w)) == (3, 6 * 10 * 128, 6)
    assert w.dtype == ml_dtypes.bfloat16
    assert w.nbytes == 6 * 10 * 4 * 17 == w.blocks.nbytes + w.scales.nbytes


@pytest.mark.parametrize("leading", [(), (5,), (0,), (3, 5, 7)])
@pytest.mark.parametrize("groups", [0, 1, 9])
def test_any_number_of_leading_axes_and_groups(leading: tuple[int, ...], groups: int) -> None:
    w = make(*leading, groups=groups)
    assert w.shape == (*leading, 32 * groups)
    assert len(w) == w.shape[0]
    assert w.size == np.prod(w.shape)


def test_leaves_are_kept_without_a_copy() -> None:
    w = make(*LEADING)
    again = MXFP4Array(w.blocks, w.scales)
    assert again.blocks is w.blocks
    assert again.scales is w.scales
    assert np.shares_memory(w[2:].blocks, w.blocks)


U8 = np.uint8
WRONG_LEAVES: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "list": ([[0] * 16], np.zeros(1, U8), TypeError, "blocks: found list, expected an array of uint8"),
    "no scales": (np.zeros((1, 16), U8), None, TypeError, "scales: found NoneType"),
    "signed blocks": (np.zeros((3, 16), np.int8), np.zeros(3, U8), TypeError, "blocks: found an array of int8"),
    "float scales": (np.zeros((3, 16), U8), np.zeros(3, np.float32), TypeError, "scales: found an array of float32"),
    "e8m0 scales": (np.zeros((3, 16), U8), np.zeros(3, ml_dtypes.float8_e8m0fnu), TypeError, "expected uint8"),
    "8 wide": (np.zeros((3, 8), U8), np.zeros(3, U8), ValueError, r"blocks: found shape \(3, 8\), expected"),
    "flat blocks": (np.zeros(16, U8), np.zeros((), U8), ValueError, r"blocks: found shape \(16,\)"),
    "fewer scales": (
        np.zeros((3, 5, 16), U8),
        np.zeros((3, 4), U8),
        ValueError,
        r"scales: found shape \(3, 4\), expected \(3, 5\)",
    ),
    "transposed scales": (np.zeros((3, 5, 16), U8), np.zeros((5, 3), U8), ValueError, r"expected \(3, 5\)"),
}


@pytest.mark.parametrize("case", WRONG_LEAVES)
def test_wrong_leaves_are_named(case: str) -> None:
    blocks, scales, kind, message = WRONG_LEAVES[case]
    with pytest.raises(kind, match=message):
        MXFP4Array(blocks, scales)


def test_the_constructor_checks_tracers_too() -> None:
    with pytest.raises(ValueError, match=r"scales: found shape \(10, 6, 4\)"):
        jax.jit(lambda w: MXFP4Array(w.blocks, w.scales.swapaxes(0, 1)))(make(*LEADING))


INDICES: list[Any] = [
    2,
    -1,
    np.int64(4),
    slice(1, 5, 2),
    slice(None),
    ...,
    None,
    (),
    (3, 7),
    (3, 7, slice(None)),
    (3, ..., slice(None)),
    (..., 7, slice(None)),
    (slice(None), 7),
    (slice(1, 4), slice(None, None, -3), ...),
    (slice(None), None, 4),
    (..., None, slice(None)),
    np.array([5, 0, 3]),
    [5, 0, 3],
    ([5, 0, 3], [1, 1, 9]),
    (slice(None), np.array([[5, 0, 3], [1, 1, 9]])),
    (np.array([5, 0]), None, 3),
    np.arange(6) % 2 == 1,
    np.arange(60).reshape(6, 10) % 7 == 0,
    (slice(None), [True, False] * 5),
]


@pytest.mark.parametrize("index", INDICES, ids=repr)
def test_an_index_takes_what_it_takes_of_the_logical_array(w: MXFP4Array, index: Any) -> None:
    # Each group has a number of its own in all of its bytes: what the index does to logical values is plain to see.
    numbers = np.arange(6 * 10 * 4, dtype=U8).reshape(6, 10, 4)
    numbered = MXFP4Array(np.repeat(numbers[..., None], 16, axis=-1), numbers)
    if isinstance(w.blocks, jax.Array):
        numbered = jax.device_put(numbered)
    expected = np.repeat(numbers, 32, axis=-1)[index]
    found = numbered[index]
    assert isinstance(found, MXFP4Array)
    assert found.shape == expected.shape
    np.testing.assert_array_equal(np.repeat(np.asarray(found.scales), 32, axis=-1), expected)
    np.testing.assert_array_equal(np.repeat(np.asarray(found.blocks), 2, axis=-1).reshape(expected.shape), expected)
    assert type(found.blocks) is type(w.blocks)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ((0, 0, 0), "last axis"),
        ((0, 0, slice(0, 32)), "last axis"),
        ((..., 0), "last axis"),
        ((..., slice(1, None)), "last axis"),
        ((..., None), "last axis"),
        ((slice(None), slice(None), slice(None), None), "last axis"),
        (np.ones(SHAPE, np.bool_), "last axis"),
        ((0, 0, 0, 0), "too many indices"),
        ((..., 0, ...), "two Ellipsis"),
    ],
    ids=repr,
)
def test_an_index_into_the_last_axis_is_refused(w: MXFP4Array, index: Any, message: str) -> None:
    with pytest.raises(IndexError, match=message):
        w[index]


def test_the_only_axis_cannot_be_indexed_or_iterated() -> None:
    w = make()
    assert w.shape == (128,)
    assert_same(w[:], w)
    assert_same(w[...], w)
    with pytest.raises(IndexError, match="last axis"):
        w[0]
    with pytest.raises(TypeError, match="cannot be iterated"):
        iter(w)


def test_iteration_gives_each_row_once(w: MXFP4Array) -> None:
    rows = list(w)
    assert len(rows) == 6
    for i, row in enumerate(rows):
        assert_same(row, w[i])


def test_it_does_not_become_a_dense_array_unasked(w: MXFP4Array) -> None:
    for convert in (np.asarray, jnp.asarray):
        with pytest.raises(TypeError, match="dequantize"):
            convert(w)
    operand: Any = w
    for attempt in (lambda: np.float32(2) * operand, lambda: jnp.ones(3) + operand, lambda: jnp.sum(operand)):
        with pytest.raises(TypeError):
            attempt()


def test_it_is_equal_to_itself_alone_and_frozen(w: MXFP4Array) -> None:
    again = MXFP4Array(w.blocks, w.scales)
    assert w == w  # noqa: PLR0124
    assert w != again
    assert len({w, again}) == 2
    with pytest.raises(AttributeError):
        w.blocks = again.blocks  # type: ignore[misc]
    with pytest.raises((AttributeError, TypeError)):
        w.other = 1  # type: ignore[attr-defined]


def test_the_repr_says_what_it_is() -> None:
    w = make(*LEADING)
    text = "MXFP4Array(shape=(6, 10, 128), dtype=bfloat16, nbytes=4.08 kB (3.76x smaller), leaves=numpy.ndarray)"
    assert repr(w) == text
    assert re.search(r"leaves=jax\.Array, sharding=.*cpu", repr(jax.device_put(w)), re.IGNORECASE)
    assert "leaves=ShapeDtypeStruct)" in repr(jax.eval_shape(lambda: w))
    seen = []
    jax.jit(lambda w: seen.append(repr(w)))(w)
    assert seen == [text.replace("numpy.ndarray", "tracer")]
    specs = jax.tree.map(lambda _: PartitionSpec("row"), w)
    assert repr(specs) == f"MXFP4Array(blocks={PartitionSpec('row')!r}, scales={PartitionSpec('row')!r})"


def test_leaves_have_the_keys_blocks_and_scales() -> None:
    w = make(*LEADING)
    (blocks_path, blocks), (scales_path, scales) = jax.tree_util.tree_leaves_with_path({"up": w})
    assert (jax.tree_util.keystr(blocks_path), jax.tree_util.keystr(scales_path)) == ("['up'].blocks", "['up'].scales")
    assert blocks_path[1:] == (jax.tree_util.GetAttrKey("blocks"),)
    assert blocks is w.blocks
    assert scales is w.scales


@pytest.mark.parametrize("leaf", [None, object(), PartitionSpec("row"), 3, np.zeros((7,), np.float32)], ids=repr)
def test_unflatten_takes_leaves_of_any_kind(leaf: Any) -> None:
    leaves, structure = jax.tree.flatten(make(*LEADING))
    assert len(leaves) == 2
    array = jax.tree.unflatten(structure, [leaf, leaf])
    assert isinstance(array, MXFP4Array)
    assert array.blocks is leaf
    assert array.scales is leaf
    assert repr(array).startswith("MXFP4Array(")


def test_structures_of_equal_arrays_are_equal() -> None:
    structures = {jax.tree.structure(make(*LEADING)), jax.tree.structure(make(7, groups=3))}
    assert len(structures) == 1


def test_shapes_without_data() -> None:
    w = MXFP4Array(jax.ShapeDtypeStruct((6, 10, 4, 16), U8), jax.ShapeDtypeStruct((6, 10, 4), U8))
    assert (w.shape, w.dtype, w.nbytes) == (SHAPE, ml_dtypes.bfloat16, 4080)
    row = jax.eval_shape(lambda w: w[3, 2:9], w)
    assert isinstance(row, MXFP4Array)
    assert isinstance(row.blocks, jax.ShapeDtypeStruct)
    assert (row.blocks.shape, row.shape) == ((7, 4, 16), (7, 128))


def test_jit_compiles_once_for_equal_shapes_and_indexes_by_a_traced_number() -> None:
    traces = []

    @jax.jit
    def take(w: MXFP4Array, expert: jax.Array) -> MXFP4Array:
        traces.append(w.shape)
        return w[expert]

    for seed in range(3):
        w = make(*LEADING, seed=seed)
        assert_same(take(w, jnp.int32(2 * seed)), w[2 * seed])
    assert traces == [SHAPE]


def test_vmap_takes_one_leading_axis() -> None:
    w = make(*LEADING)
    seen = []

    def body(w: MXFP4Array, row: jax.Array) -> MXFP4Array:
        seen.append(w.shape)
        return w[row]

    rows = jnp.array([1, 8, 0, 9, 3, 3])
    assert_same(jax.vmap(body)(w, rows), w[np.arange(6), rows])
    assert seen == [(10, 128)]
    shared = jax.vmap(lambda w, row: w[row], in_axes=(None, 0))(w[0], rows)
    assert_same(shared, w[0, rows])


def test_scan_runs_over_the_stacked_axis() -> None:
    w = make(*LEADING)

    def body(carry: jax.Array, layer: MXFP4Array) -> tuple[jax.Array, MXFP4Array]:
        assert layer.shape == (10, 128)
        return carry + layer.scales.sum(), layer[::-1]

    total, reverse = jax.lax.scan(body, jnp.uint32(0), w)
    assert int(total) == int(np.asarray(w.scales, np.uint32).sum())
    assert_same(reverse, w[:, ::-1])


@pytest.mark.parametrize(
    ("spec", "shard"),
    [
        (PartitionSpec("expert"), (3, 10, 128)),
        (PartitionSpec("expert", "row"), (3, 5, 128)),
        (PartitionSpec(None, "row"), (6, 5, 128)),
        (PartitionSpec(None, None, ("expert", "row")), (6, 10, 32)),
        (PartitionSpec("row", None, "expert"), (3, 10, 64)),
        (PartitionSpec(), (6, 10, 128)),
    ],
    ids=str,
)
def test_a_sharding_of_the_logical_shape_fits_both_leaves(spec: PartitionSpec, shard: tuple[int, ...]) -> None:
    w = make(*LEADING)
    mesh = jax.make_mesh((2, 2), ("expert", "row"))
    sharding = NamedSharding(mesh, spec)
    placed = jax.device_put(w, sharding)
    assert_same(placed, w)
    assert placed.sharding == sharding
    assert placed.sharding.shard_shape(placed.shape) == shard
    assert str(sharding) in repr(placed)
    for blocks, scales in zip(placed.blocks.addressable_shards, placed.scales.addressable_shards, strict=True):
        assert blocks.device == scales.device
        local = MXFP4Array(blocks.data, scales.data)
        assert local.shape == shard
    moved = jax.jit(lambda w: w, out_shardings=NamedSharding(mesh, PartitionSpec()))(placed)
    assert_same(moved, w)
    assert moved.sharding.is_fully_replicated


def test_shard_map_sees_the_local_part() -> None:
    w = make(*LEADING)
    mesh = jax.make_mesh((2,), ("expert",))
    seen = []

    def body(local: MXFP4Array) -> MXFP4Array:
        seen.append(local.shape)
        return local[:, 3:]

    spec = PartitionSpec("expert")
    placed = jax.device_put(w, NamedSharding(mesh, spec))
    assert_same(jax.jit(jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec))(placed), w[:, 3:])
    assert set(seen) == {(3, 10, 128)}


def test_it_pickles_and_copies(w: MXFP4Array) -> None:
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        again = pickle.loads(pickle.dumps(w, protocol))
        assert type(again.blocks) is type(w.blocks)
        assert_same(again, w)
    assert_same(copy.deepcopy(w), w)
    assert copy.copy(w).blocks is w.blocks


def test_it_round_trips_through_orbax(w: MXFP4Array, tmp_path: Path) -> None:
    tree = {"layers": [{"up": w}], "bias": jnp.arange(5.0)}
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", tree)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "checkpoint", jax.eval_shape(lambda: tree))
        assert_same(restored["layers"][0]["up"], w)
        mesh = jax.make_mesh((2, 2), ("expert", "row"))
        sharding = NamedSharding(mesh, PartitionSpec("expert", "row"))
        target = jax.eval_shape(lambda: tree)
        target["layers"][0]["up"] = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), target["layers"][0]["up"]
        )
        placed = checkpointer.restore(tmp_path / "checkpoint", target)["layers"][0]["up"]
    assert_same(placed, w)
    assert placed.sharding == sharding


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_without_jax_the_import_names_the_extra() -> None:
    done = run("import sys; sys.modules['jax'] = None\nimport tensorport.mxfp4")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == ("ImportError: tensorport.mxfp4 needs JAX: pip install 'tensorport[jax]'")


def test_importing_it_starts_no_backend() -> None:
    code = "import tensorport.mxfp4, jax._src.xla_bridge as b; print(b.backends_are_initialized())"
    done = run(code)
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr
