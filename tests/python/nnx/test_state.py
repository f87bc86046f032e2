"""What NNX, sharding, Orbax and pickle make of modules with codes in them."""

import copy
import io
import pickle
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint
import pytest
import tensorport
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from tensorport import mxfp4
from tensorport.mxfp4 import MXFP4Array
from tensorport.nnx import MXFP4Embed, MXFP4Linear, MXFP4MoE, MXFP4Param

IN, OUT = 128, 48


def random_codes(*shape: int, seed: int = 0) -> MXFP4Array:
    return mxfp4.quantize(jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32))


class Network(nnx.Module):
    """One layer of each kind."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.embed = MXFP4Embed(37, 64, rngs=rngs)
        self.layers = nnx.List([MXFP4Linear(64, 96, rngs=rngs), MXFP4Linear(96, 64, use_bias=False, rngs=rngs)])
        self.moe = MXFP4MoE(64, 160, 5, 2, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.embed(ids)
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return self.embed.attend(self.moe(x))


IDS = jnp.array([[3, 0, 36], [11, 11, 20]])


def assert_same_state(found: Any, expected: Any) -> None:
    structures: Any = jax.tree.structure(found), jax.tree.structure(expected)
    assert structures[0] == structures[1]
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype, path
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=str(path))


@pytest.fixture
def model() -> Network:
    return Network(rngs=nnx.Rngs(0))


def test_codes_are_no_params(model: Network) -> None:
    assert not issubclass(MXFP4Param, nnx.Param)
    codes, rest = nnx.state(model, MXFP4Param, ...)
    names = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(codes)}
    assert names == {"embed.embedding", "layers.0.kernel", "layers.1.kernel", "moe.gate_up", "moe.down"}
    assert not any(leaf.dtype == jnp.uint8 for leaf in jax.tree.leaves(rest))
    paths = {jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(nnx.state(model.layers[0]))}
    assert paths == {"['bias'].value", "['kernel'].value.blocks", "['kernel'].value.scales"}


def test_split_and_merge(model: Network) -> None:
    graphdef, state = nnx.split(model)
    merged: Any = nnx.merge(graphdef, state)
    assert isinstance(merged.layers[0].kernel, MXFP4Param)
    np.testing.assert_array_equal(merged(IDS), model(IDS))
    graphdef, *params_and_codes = nnx.split(model, nnx.Param, MXFP4Param)
    merged = nnx.merge(graphdef, *params_and_codes)
    np.testing.assert_array_equal(merged(IDS), model(IDS))


def test_update_and_clone(model: Network) -> None:
    other = Network(rngs=nnx.Rngs(1))
    clone = nnx.clone(other)
    assert clone.embed.embedding is not other.embed.embedding
    nnx.update(model, nnx.state(other))
    for found in (model, clone):
        assert_same_state(nnx.state(found), nnx.state(other))
    pure = nnx.as_pure(nnx.state(Network(rngs=nnx.Rngs(2))))
    assert isinstance(pure["embed"]["embedding"], MXFP4Array)
    nnx.update(model, pure)
    assert_same_state(nnx.as_pure(nnx.state(model)), pure)


def test_a_variable_has_the_logical_shape_and_gives_its_codes() -> None:
    w = random_codes(OUT, IN)
    param = MXFP4Param(w)
    assert param.shape == (OUT, IN)
    assert param.dtype == jnp.bfloat16
    assert param[...].blocks is w.blocks
    assert param.get_value().scales is w.scales
    assert param[3].shape == (IN,)
    assert len(param) == OUT


def test_codes_are_replaced_as_a_whole() -> None:
    first, second = random_codes(OUT, IN), random_codes(OUT, IN, seed=1)
    param = MXFP4Param(first)
    param[...] = second
    assert param[...].blocks is second.blocks
    param.set_value(first)
    assert param[...].blocks is first.blocks
    with pytest.raises(IndexError, match="codes are replaced as a whole"):
        param[0] = second[0]


def test_a_variable_refuses_what_is_no_mxfp4_array() -> None:
    dense: Any = jnp.zeros((OUT, IN))
    with pytest.raises(TypeError, match="value: found ArrayImpl, expected an MXFP4Array"):
        MXFP4Param(dense)
    param = MXFP4Param(random_codes(OUT, IN))
    with pytest.raises(TypeError, match="value: found ArrayImpl, expected an MXFP4Array"):
        param[...] = dense
    with pytest.raises(TypeError, match="dequantize"):
        jnp.asarray(param)


def test_variables_made_with_refs_have_none() -> None:
    with nnx.var_defaults(ref=True):
        layer = MXFP4Linear(IN, OUT, rngs=nnx.Rngs(0))
    assert not layer.kernel.ref
    assert layer.bias is not None
    assert layer.bias.ref
    assert layer(jnp.ones((3, IN))).shape == (3, OUT)


def test_what_is_printed_says_what_it_is(model: Network) -> None:
    text = repr(model)
    assert "MXFP4Array(shape=(96, 64), dtype=bfloat16, nbytes=3.26 kB (3.76x smaller))" in text
    assert "ArrayRepr" not in text
    assert "leaves=jax.Array, sharding=" in repr(model.embed.embedding)
    with redirect_stdout(io.StringIO()) as printed:
        nnx.display(model)  # type: ignore[no-untyped-call]
    assert "MXFP4Array" in printed.getvalue()
    assert "MXFP4Param" in nnx.tabulate(model, IDS)


def test_states_take_shapes_and_pure_dicts(model: Network) -> None:
    state = nnx.state(model)
    assert "MXFP4Array(blocks=(37, 2, 16), scales=(37, 2))" in repr(jax.tree.map(jnp.shape, state))
    pure = nnx.to_pure_dict(nnx.state(Network(rngs=nnx.Rngs(1))))
    nnx.replace_by_pure_dict(state, pure)
    assert_same_state(nnx.to_pure_dict(state), pure)


def test_trees_without_graphs() -> None:
    x = jnp.ones((3, IN))
    with nnx.set_graph_mode(False):  # type: ignore[no-untyped-call]
        layer = MXFP4Linear(IN, OUT, rngs=nnx.Rngs(0))
        graphdef, *(params, codes) = nnx.split(layer, nnx.Param, ...)
        found = nnx.jit(lambda layer, x: layer(x))(layer, x)
        gradients = jax.grad(lambda params: nnx.merge(graphdef, params, codes)(x).sum())(params)
    np.testing.assert_allclose(found, layer(x), rtol=1e-5, atol=1e-5)
    assert {".".join(map(str, path)) for path, _ in nnx.to_flat_state(gradients)} == {"bias"}


def test_transforms_of_one_layer() -> None:
    layer, x = MXFP4Linear(IN, OUT, rngs=nnx.Rngs(0)), jnp.ones((3, IN))
    again = copy.deepcopy(layer)
    assert again.kernel is not layer.kernel
    np.testing.assert_array_equal(again(x), layer(x))
    found = nnx.grad(lambda layer: nnx.remat(lambda layer, x: layer(x))(layer, x).sum())(layer)
    np.testing.assert_array_equal(found["bias"][...], jnp.full(OUT, 3.0))
    chosen = nnx.cond(True, lambda layer, x: layer(x), lambda layer, x: -layer(x), layer, x)
    np.testing.assert_allclose(chosen, layer(x), rtol=1e-5, atol=1e-5)


def test_jit_sees_codes_as_arguments(model: Network) -> None:
    graphdef, state = nnx.split(model)
    lowered = jax.jit(lambda state, ids: nnx.merge(graphdef, state)(ids)).lower(state, IDS)
    leaves = jax.tree.leaves(state)
    memory: Any = lowered.compile().memory_analysis()
    assert memory.argument_size_in_bytes >= sum(leaf.nbytes for leaf in leaves)
    np.testing.assert_allclose(nnx.jit(lambda model, ids: model(ids))(model, IDS), model(IDS), rtol=1e-5, atol=1e-5)


def stacked(depth: int) -> MXFP4Linear:
    @nnx.split_rngs(splits=depth)
    @nnx.vmap(in_axes=0, out_axes=0)
    def create(rngs: nnx.Rngs) -> MXFP4Linear:
        return MXFP4Linear(64, 64, rngs=rngs)

    return create(nnx.Rngs(0))


def test_vmap_makes_and_calls_a_stack_of_layers() -> None:
    layers = stacked(3)
    assert layers.kernel.shape == (3, 64, 64)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 5, 64)), jnp.float32)
    found = nnx.vmap(lambda layer, x: layer(x))(layers, x)
    for index in range(3):
        kernel = layers.kernel[index]
        np.testing.assert_allclose(found[index], mxfp4.matmul(x[index], kernel), rtol=1e-5, atol=1e-5)


def test_scan_runs_over_a_stack_of_layers() -> None:
    layers = stacked(3)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 64)), jnp.float32)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def forward(x: jax.Array, layer: MXFP4Linear) -> jax.Array:
        assert layer.kernel.shape == (64, 64)
        return nnx.relu(layer(x))

    expected = x
    for index in range(3):
        expected = nnx.relu(mxfp4.matmul(expected, layers.kernel[index]))
    np.testing.assert_allclose(forward(x, layers), expected, rtol=1e-5, atol=1e-5)


def test_a_stack_of_dense_layers_becomes_a_stack() -> None:
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def create(rngs: nnx.Rngs) -> nnx.Linear:
        return nnx.Linear(64, 96, rngs=rngs)

    dense = create(nnx.Rngs(0))
    layers = MXFP4Linear.from_linear(dense)
    expected = mxfp4.quantize(dense.kernel[...].swapaxes(1, 2))
    assert layers.kernel.shape == (3, 96, 64)
    np.testing.assert_array_equal(layers.kernel[...].blocks, expected.blocks)
    y = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(layers, jnp.ones((5, 64)))
    assert y.shape == (3, 5, 96)


def make_mesh(kind: AxisType = AxisType.Auto, shape: tuple[int, int] = (2, 4)) -> Mesh:
    return jax.make_mesh(shape, ("data", "model"), axis_types=(kind, kind))


def partitioned(names: tuple[str | None, ...] = ("data", "model"), **options: Any) -> MXFP4Linear:
    """A layer of a dense kernel [in, out] whose axes have these names."""
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), names)
    return MXFP4Linear(IN, OUT, kernel_init=init, rngs=nnx.Rngs(0), **options)


def shardings(w: MXFP4Array) -> list[PartitionSpec]:
    return [PartitionSpec(*leaf.sharding.spec[:2]) for leaf in (w.blocks, w.scales)]


KINDS = [AxisType.Auto, AxisType.Explicit]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("is_jitted", [False, True])
def test_names_of_axes_place_codes_and_scales(kind: AxisType, is_jitted: bool) -> None:
    expected = MXFP4Linear(IN, OUT, rngs=nnx.Rngs(0)).kernel[...]
    with jax.set_mesh(make_mesh(kind)):
        layer = nnx.jit(partitioned)() if is_jitted else partitioned()
    w = layer.kernel[...]
    assert layer.kernel.get_metadata("out_sharding") == ("model", "data")
    assert shardings(w) == 2 * [PartitionSpec("model", "data")]
    assert [shard.data.shape for shard in w.scales.addressable_shards] == 8 * [(OUT // 4, IN // 32 // 2)]
    np.testing.assert_array_equal(w.blocks, expected.blocks)
    np.testing.assert_array_equal(w.scales, expected.scales)


def test_logical_names_follow_rules() -> None:
    with jax.set_mesh(make_mesh()), nnx.logical_axis_rules([("embed", "data"), ("mlp", "model")]):
        layer = partitioned(("embed", "mlp"))
        assert nnx.get_partition_spec(nnx.state(layer))["kernel"][...].scales == PartitionSpec("model", "data")
    assert shardings(layer.kernel[...]) == 2 * [PartitionSpec("model", "data")]


def test_partition_specs_and_shardings_are_for_both_leaves() -> None:
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        state: Any = nnx.state(partitioned())
    spec = PartitionSpec("model", "data")
    specs = nnx.get_partition_spec(state)["kernel"].get_value()
    assert (specs.blocks, specs.scales) == (spec, spec)
    named = nnx.get_named_sharding(state, mesh)
    assert named["kernel"].get_value().blocks == NamedSharding(mesh, spec)
    assert shardings(jax.device_put(state, named)["kernel"][...]) == 2 * [spec]


ABSTRACT: dict[str, Callable[[Mesh], Any]] = {
    "eval_shape": lambda _: nnx.state(nnx.eval_shape(partitioned)),
    "as_abstract": lambda _: nnx.state(nnx.as_abstract(nnx.eval_shape(partitioned))),
    "get_abstract_model": lambda mesh: nnx.get_abstract_model(partitioned, mesh)[1],
}


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("way", ABSTRACT)
def test_an_abstract_layer_knows_its_sharding(way: str, kind: AxisType) -> None:
    mesh = make_mesh(kind)
    with jax.set_mesh(mesh):
        kernel = ABSTRACT[way](mesh)["kernel"][...]
    assert isinstance(kernel, MXFP4Array)
    assert kernel.shape == (OUT, IN)
    assert kernel.blocks.shape == (OUT, IN // 32, 16)
    assert kernel.blocks.dtype == jnp.uint8
    assert shardings(kernel) == 2 * [PartitionSpec("model", "data")]


def test_eval_shape_computes_nothing() -> None:
    layer = nnx.eval_shape(lambda: MXFP4MoE(2880, 2880, 128, 4, rngs=nnx.Rngs(0)))
    assert layer.gate_up.shape == (128, 5760, 2880)
    assert isinstance(layer.gate_up[...].blocks, jax.ShapeDtypeStruct)


def test_a_transform_names_the_axis_that_it_adds() -> None:
    metadata = {nnx.PARTITION_NAME: "layers"}

    @nnx.split_rngs(splits=2)
    @nnx.vmap(in_axes=0, out_axes=0, transform_metadata=metadata)
    def create(rngs: nnx.Rngs) -> MXFP4Linear:
        return MXFP4Linear(
            64, 96, kernel_metadata={"out_sharding": (None, "model"), "eager_sharding": False}, rngs=rngs
        )

    layers = create(nnx.Rngs(0))
    assert layers.kernel.get_metadata("out_sharding") == ("layers", "model", None)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry, transform_metadata=metadata)
    def forward(x: jax.Array, layer: MXFP4Linear) -> jax.Array:
        assert layer.kernel.get_metadata("out_sharding") == ("model", None)
        return layer(x)[..., :64]

    assert forward(jnp.ones((5, 64)), layers).shape == (5, 64)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("out_features", [48, 512])
def test_a_sharded_layer_computes_the_same(kind: AxisType, out_features: int) -> None:
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((6, IN)), jnp.float32)
    expected = MXFP4Linear(IN, out_features, rngs=nnx.Rngs(0))(x)
    mesh = make_mesh(kind)
    with jax.set_mesh(mesh):
        layer = MXFP4Linear(IN, out_features, kernel_init=init, rngs=nnx.Rngs(0))
        placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
        found = nnx.jit(lambda layer, x: layer(x))(layer, placed)
        asked = nnx.jit(lambda layer, x: layer(x, out_sharding=PartitionSpec(None, "model")))(layer, placed)
        gradient = nnx.jit(jax.grad(lambda x: layer(x).sum()))(placed)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(asked, expected, rtol=1e-5, atol=1e-5)
    assert gradient.shape == x.shape
    if kind == AxisType.Explicit:
        assert found.sharding.spec == PartitionSpec("data", "model")
        assert asked.sharding.spec == PartitionSpec(None, "model")


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_sharded_experts_and_embeddings_compute_the_same(kind: AxisType) -> None:
    by_expert = {"out_sharding": ("model",)}
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 3, 64)), jnp.float32)
    ids = jnp.array([[5, 0], [7, 31]])
    expected = MXFP4MoE(64, 96, 8, 3, rngs=nnx.Rngs(0))(x)
    rows = MXFP4Embed(32, 64, rngs=nnx.Rngs(0))(ids)
    mesh = make_mesh(kind, (1, 2))
    with jax.set_mesh(mesh):
        moe = MXFP4MoE(64, 96, 8, 3, gate_up_metadata=by_expert, down_metadata=by_expert, rngs=nnx.Rngs(0))
        placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
        assert shardings(moe.gate_up[...]) == 2 * [PartitionSpec("model", None)]
        found = nnx.jit(lambda moe, x: moe(x))(moe, placed)
        embed = MXFP4Embed(32, 64, embedding_metadata={"out_sharding": ("model", None)}, rngs=nnx.Rngs(0))
        looked_up = nnx.jit(lambda embed, ids: embed(ids, out_sharding=PartitionSpec("data")))(embed, ids)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(looked_up, rows)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_sharded_dense_layer_gives_sharded_codes(kind: AxisType) -> None:
    mesh = make_mesh(kind)
    with jax.set_mesh(mesh):
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("data", "model"))
        dense = nnx.Linear(IN, OUT, kernel_init=init, rngs=nnx.Rngs(0))
    layer = MXFP4Linear.from_linear(dense)  # where no mesh is set
    assert layer.kernel.get_metadata("out_sharding") == ("model", "data")
    assert shardings(layer.kernel[...]) == 2 * [PartitionSpec("model", "data")]
    expected = mxfp4.quantize(np.asarray(dense.kernel[...]).T)
    np.testing.assert_array_equal(layer.kernel[...].blocks, expected.blocks)


def test_blocks_are_not_divided_between_devices() -> None:
    mesh = make_mesh()
    dense = nnx.Linear(64, OUT, rngs=nnx.Rngs(0))
    dense.kernel.set_value(jax.device_put(dense.kernel[...], NamedSharding(mesh, PartitionSpec("model"))))
    with pytest.raises(ValueError, match="found 2 blocks of the kernel spread over 4 devices"):
        MXFP4Linear.from_linear(dense)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="is partitioned 4 times, but the dimension size is 2"):
        MXFP4Linear(64, OUT, kernel_metadata={"out_sharding": ("model", None)}, rngs=nnx.Rngs(0))


def test_pickle_keeps_everything(model: Network) -> None:
    again = pickle.loads(pickle.dumps(model))
    assert_same_state(nnx.state(again), nnx.state(model))
    np.testing.assert_array_equal(again(IDS), model(IDS))
    state = nnx.state(model)
    assert_same_state(pickle.loads(pickle.dumps(state)), state)


def test_orbax_saves_and_restores_into_an_abstract_state(model: Network, tmp_path: Path) -> None:
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.state(model))
        checkpointer.wait_until_finished()
        graphdef, abstract = nnx.split(nnx.eval_shape(lambda: Network(rngs=nnx.Rngs(1))))
        restored = checkpointer.restore(tmp_path / "state", abstract)
    assert_same_state(restored, nnx.state(model))
    again: Any = nnx.merge(graphdef, restored)
    np.testing.assert_array_equal(again(IDS), model(IDS))


def test_orbax_restores_into_a_sharded_state(tmp_path: Path) -> None:
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        layer = partitioned()
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.state(layer))
        checkpointer.wait_until_finished()
        graphdef, abstract = nnx.get_abstract_model(lambda: partitioned((None, "data")), mesh)
        restored = checkpointer.restore(tmp_path / "state", abstract)
    assert shardings(restored["kernel"][...]) == 2 * [PartitionSpec("data", None)]
    np.testing.assert_array_equal(restored["kernel"][...].blocks, layer.kernel[...].blocks)
    restored_layer: Any = nnx.merge(graphdef, restored)
    assert restored_layer(jnp.ones((3, IN))).shape == (3, OUT)


def test_load_params_fills_an_abstract_layer(tmp_path: Path, write_safetensors: Callable[..., Path]) -> None:
    w = mxfp4.quantize(np.random.default_rng(0).standard_normal((OUT, IN)).astype(np.float32))
    bias = np.arange(OUT, dtype=np.float32)
    path = write_safetensors(
        tmp_path / "layer.safetensors", {"kernel_blocks": w.blocks, "kernel_scales": w.scales, "bias": bias}
    )
    mesh = make_mesh()
    graphdef, abstract = nnx.get_abstract_model(partitioned, mesh)
    state = tensorport.load_params(path, target=abstract)
    assert shardings(state["kernel"][...]) == 2 * [PartitionSpec("model", "data")]
    layer = nnx.merge(graphdef, state)
    np.testing.assert_array_equal(layer.kernel[...].blocks, w.blocks)
    assert layer(jnp.ones((3, IN))).shape == (3, OUT)
