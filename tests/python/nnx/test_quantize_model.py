"""quantize_model: layers of a dense model replaced in place."""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorport
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tensorport import mxfp4
from tensorport.nnx import MXFP4MLP, MXFP4Embed, MXFP4Linear, MXFP4MoE, quantize_model

WIDTH, WIDE, WORDS = 64, 96, 37


class Pair(NamedTuple):
    """A pytree that cannot be written in place."""

    left: nnx.Linear
    right: tuple[nnx.Linear, str]


class Block(nnx.Module):
    """A residual block."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, WIDE, bias_init=nnx.initializers.normal(1.0), rngs=rngs)
        self.down = nnx.Linear(WIDE, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.down(nnx.relu(self.up(self.norm(x))))


class Model(nnx.Module):
    """Layers in every kind of place; `again` is a layer that stands elsewhere too."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        def linear() -> nnx.Linear:
            return nnx.Linear(WIDTH, WIDTH, rngs=rngs)

        self.embed = nnx.Embed(WORDS, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs=rngs) for _ in range(3)])
        self.head = nnx.Sequential(linear(), nnx.relu, linear())
        self.named = nnx.Dict({"first": linear(), "second": linear()})
        self.plain = nnx.data({"list": [linear(), linear()], "pair": Pair(linear(), (linear(), "text"))})
        self.again = self.blocks[1].up

    def layers(self) -> list[Any]:
        pair: Any = self.plain["pair"]
        return [*self.head.layers, *self.named.values(), *self.plain["list"], pair.left, pair.right[0]]

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        for layer in self.layers():
            x = layer(x)
        return self.embed.attend(x + self.again(x)[..., :WIDTH])


IDS = jnp.array([[3, 0, 36, 7], [11, 11, 20, 8]])


@pytest.fixture
def model() -> Any:
    return Model(rngs=nnx.Rngs(0))


def paths(model: nnx.Module, kind: type[nnx.Module]) -> set[str]:
    return {".".join(map(str, path)) for path, node in nnx.iter_graph(model) if isinstance(node, kind)}


PLACES = {
    *(f"blocks.{index}.{name}" for index in range(3) for name in ("up", "down")),
    *("head.layers.0", "head.layers.2", "named.first", "named.second"),
    *("plain.list.0", "plain.list.1", "plain.pair.left", "plain.pair.right.0"),
}


def test_every_layer_is_found_wherever_it_stands(model: Any) -> None:
    dense = nnx.clone(model)
    report = quantize_model(model, "")
    assert set(report.tensors) == {"embed", *PLACES}
    assert not paths(model, nnx.Linear)
    assert not paths(model, nnx.Embed)
    assert model.again is model.blocks[1].up
    assert model.plain["pair"].right[1] == "text"
    assert isinstance(model.plain["pair"], Pair)
    assert model(IDS).shape == dense(IDS).shape
    sources = {".".join(map(str, path)): node for path, node in nnx.iter_graph(dense)}
    for path, layer in nnx.iter_graph(model):
        if isinstance(layer, MXFP4Linear):
            # iter_graph comes upon the shared layer under its other name.
            kernel = sources[".".join(map(str, path))].kernel[...]
            np.testing.assert_array_equal(layer.kernel[...].blocks, mxfp4.quantize(kernel.T).blocks)


def test_the_model_computes_what_its_decoded_layers_compute(model: Any) -> None:
    dense = nnx.clone(model)
    quantize_model(model, "")
    decoded: Any = {path: node for path, node in nnx.iter_graph(model) if isinstance(node, MXFP4Linear | MXFP4Embed)}
    for path, node in nnx.iter_graph(dense):
        if isinstance(node, nnx.Linear):
            node.kernel.set_value(decoded[path].kernel[...].dequantize(jnp.float32).T)
        elif isinstance(node, nnx.Embed):
            node.embedding.set_value(decoded[path].embedding[...].dequantize(jnp.float32))
    expected = dense(IDS)
    np.testing.assert_allclose(model(IDS), expected, rtol=0, atol=1e-5 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (r"blocks\.\d\.up$", {f"blocks.{index}.up" for index in range(3)}),
        (re.compile("FIRST", re.IGNORECASE), {"named.first"}),
        (lambda _, layer: getattr(layer, "in_features", 0) == WIDE, {f"blocks.{index}.down" for index in range(3)}),
        (lambda path, _: path.startswith("plain.pair"), {"plain.pair.left", "plain.pair.right.0"}),
        ("^again$", {"blocks.1.up"}),
    ],
    ids=str,
)
def test_only_chosen_layers_are_replaced(model: Any, where: Any, expected: set[str]) -> None:
    embed, norm = model.embed, model.blocks[0].norm
    report = quantize_model(model, where)
    assert set(report.tensors) == expected
    places = {"blocks.1.up": "again"}  # as iter_graph names it
    assert paths(model, MXFP4Linear) == {places.get(path, path) for path in expected}
    assert model.embed is embed
    assert model.blocks[0].norm is norm
    assert model(IDS).shape == (2, 4, WORDS)


def test_the_report_has_size_and_error_of_each_layer(model: Any) -> None:
    kernel, embedding = model.blocks[0].up.kernel[...], model.embed.embedding[...]
    report = quantize_model(model, r"^embed|blocks\.0\.up", scale_rule="ceil")
    assert list(report.tensors) == ["embed", "blocks.0.up"]
    assert report.tensors["blocks.0.up"] == mxfp4.quantization_error(kernel.T, scale_rule="ceil")
    assert report.tensors["embed"] == mxfp4.quantization_error(embedding, scale_rule="ceil")
    assert report.tensors["blocks.0.up"].shape == (WIDE, WIDTH)
    assert report.source_bytes == 4 * (WIDTH * WIDE + WORDS * WIDTH)
    assert report.quantized_bytes == (WIDTH * WIDE + WORDS * WIDTH) // 32 * 17
    assert "blocks.0.up" in repr(report)


def test_options_go_to_the_new_layers(model: Any) -> None:
    quantize_model(model, "embed|named", implementation="xla")
    assert model.embed.implementation == model.named["first"].implementation == "xla"


def test_biases_stay_the_same_variables(model: Any) -> None:
    biases = [block.up.bias for block in model.blocks]
    quantize_model(model, "blocks")
    for block, bias in zip(model.blocks, biases, strict=True):
        assert block.up.bias is bias
        assert block.down.bias is None


def test_shared_weights_are_shared_afterwards() -> None:
    class Tied(nnx.Module):
        def __init__(self) -> None:
            self.one = nnx.Linear(WIDTH, WIDE, rngs=nnx.Rngs(0))
            self.other = nnx.Linear(WIDTH, WIDE, rngs=nnx.Rngs(1))
            self.other.kernel = self.one.kernel

    model: Any = Tied()
    report = quantize_model(model, "")
    assert model.one is not model.other
    assert model.one.kernel is model.other.kernel
    assert report.tensors["one"] == report.tensors["other"]
    assert model.one.bias is not model.other.bias


def test_codes_that_layers_share_stay_where_only_one_is_chosen() -> None:
    model: Any = nnx.Dict({"one": nnx.Linear(WIDTH, WIDE, rngs=nnx.Rngs(0))})
    model["other"] = nnx.Linear(WIDTH, WIDE, rngs=nnx.Rngs(1))
    model["other"].kernel = model["one"].kernel
    quantize_model(model, "one")
    assert isinstance(model["one"], MXFP4Linear)
    assert type(model["other"]) is nnx.Linear
    assert model["other"](jnp.ones((3, WIDTH))).shape == (3, WIDE)


class Doubled(nnx.Linear):
    """A subclass."""


def test_layers_that_cannot_be_quantized_are_all_named_and_the_model_stays(model: Any) -> None:
    model.narrow = nnx.Linear(33, 5, rngs=nnx.Rngs(0))
    model.doubled = Doubled(WIDTH, WIDE, rngs=nnx.Rngs(0))
    before = {path: id(node) for path, node in nnx.iter_graph(model) if isinstance(node, nnx.Module)}
    with pytest.raises(tensorport.MappingError) as caught:
        quantize_model(model, "")
    for part in (
        f"2 of {len(PLACES) + 3} chosen layers cannot be quantized",
        "narrow: found kernel [33, 5], expected a multiple of 32 in place of 33",
        "doubled: found a Doubled, expected nnx.Linear itself",
    ):
        assert part in str(caught.value)
    assert {path: id(node) for path, node in nnx.iter_graph(model) if isinstance(node, nnx.Module)} == before
    quantize_model(model, lambda path, _: path not in ("narrow", "doubled"))
    assert paths(model, nnx.Linear) == {"narrow", "doubled"}


def test_no_chosen_layer_is_an_error_that_names_those_there_are(model: Any) -> None:
    with pytest.raises(
        tensorport.MappingError, match=r"found 15 dense layers, none of them chosen by 'block\\\\d'"
    ) as caught:
        quantize_model(model, r"block\d")
    assert "\n  blocks.1.up\n" in str(caught.value)


def test_traced_models_are_refused() -> None:
    def quantize(model: nnx.Module) -> None:
        quantize_model(model, "")

    with pytest.raises(tensorport.MappingError, match="layer: found traced weights, expected values"):
        nnx.jit(quantize)(nnx.Dict({"layer": nnx.Linear(WIDTH, WIDE, rngs=nnx.Rngs(0))}))


def test_bad_arguments_are_refused(model: Any) -> None:
    wrong: Any = {"a": nnx.Linear(WIDTH, WIDE, rngs=nnx.Rngs(0))}
    with pytest.raises(TypeError, match=r"model: found dict, expected an nnx\.Module"):
        quantize_model(wrong, "")
    with pytest.raises(ValueError, match=r"model: found an nnx\.Linear itself.*from_linear"):
        quantize_model(wrong["a"], "")
    with pytest.raises(ValueError, match=r"where: found the pattern '\('"):
        quantize_model(model, "(")
    number: Any = 3
    with pytest.raises(TypeError, match="where: found int"):
        quantize_model(model, number)


def test_what_is_within_mxfp4_layers_stays() -> None:
    model: Any = nnx.Dict(
        {
            "moe": MXFP4MoE(WIDTH, WIDE, 5, 2, rngs=nnx.Rngs(0)),
            "mlp": MXFP4MLP(WIDTH, WIDE, rngs=nnx.Rngs(0)),
            "out": nnx.Linear(WIDTH, WIDE, rngs=nnx.Rngs(0)),
        }
    )
    assert list(quantize_model(model, "").tensors) == ["out"]
    assert type(model["moe"].router) is nnx.Linear


@pytest.mark.parametrize("wrapper", [nnx.WeightNorm, nnx.SpectralNorm])
def test_layers_whose_dense_weights_a_wrapper_computes_with_are_refused(wrapper: Any) -> None:
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(WIDTH, WIDTH, rngs=rngs), wrapper(nnx.Linear(WIDTH, WIDE, rngs=rngs), rngs=rngs))
    with pytest.raises(tensorport.MappingError, match=rf"(?s)1 of 2 .*within an nnx\.{wrapper.__name__}"):
        quantize_model(model, "")
    assert isinstance(model.layers[0], nnx.Linear)
    quantize_model(model, r"^layers\.0$")
    assert isinstance(model.layers[0], MXFP4Linear)


def test_a_base_under_an_adapter_is_found() -> None:
    base = nnx.Linear(WIDTH, WIDE, rngs=nnx.Rngs(0))
    model = nnx.Dict({"adapted": nnx.LoRA(WIDTH, 3, WIDE, base_module=base, rngs=nnx.Rngs(1))})
    quantize_model(model, "base_module")
    assert isinstance(model["adapted"].base_module, MXFP4Linear)
    assert model["adapted"](jnp.ones((2, WIDTH))).shape == (2, WIDE)


def test_a_stack_of_layers_stays_a_stack() -> None:
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def create(rngs: nnx.Rngs) -> Block:
        return Block(rngs=rngs)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def forward(x: jax.Array, block: Block) -> jax.Array:
        return block(x)

    model: Any = nnx.Dict({"blocks": create(nnx.Rngs(0))})
    x = jnp.asarray(np.random.default_rng(0).standard_normal((5, WIDTH)), jnp.float32)
    expected = forward(x, model["blocks"])
    report = quantize_model(model, "")
    assert report.tensors["blocks.up"].shape == (3, WIDE, WIDTH)
    found = forward(x, model["blocks"])
    relative = float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected))
    assert 0 < relative < 0.2


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_shardings_go_over_to_codes(model: Any, kind: AxisType) -> None:
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind, kind))
    up = model.blocks[0].up
    up.kernel.set_value(jax.device_put(up.kernel[...], NamedSharding(mesh, PartitionSpec("data", "model"))))
    report = quantize_model(model, r"blocks\.0\.up")
    w = model.blocks[0].up.kernel[...]
    assert w.scales.sharding.spec == PartitionSpec("model", "data")
    assert report.tensors["blocks.0.up"].sqnr_db > 10


def test_a_model_that_holds_itself_is_walked_once() -> None:
    model: Any = nnx.Dict({"layer": nnx.Linear(WIDTH, WIDE, rngs=nnx.Rngs(0))})
    model["itself"] = model
    assert list(quantize_model(model, "").tensors) == ["layer"]
