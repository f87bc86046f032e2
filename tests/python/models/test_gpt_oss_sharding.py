"""gpt-oss on meshes of 8 host devices: results of one device, and what each device holds."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tensorport
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from tensorport import MappingError
from tensorport.models import gpt_oss

MESHES = [{"expert": 4, "tensor": 2}, {"data": 2, "expert": 4}, {"tensor": 2, "data": 2, "expert": 2}, {"data": 8}]


def mesh_of(axes: dict[str, int], kind: AxisType = AxisType.Explicit) -> Mesh:
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(kind,) * len(axes))


@pytest.fixture(scope="module")
def divisible(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose sizes 8 devices divide, each another."""
    return tensorport.synthesize(
        tmp_path_factory.mktemp("divisible") / "tiny",
        "tiny",
        seed=3,
        progress=False,
        hidden_size=128,
        intermediate_size=192,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=3,
        num_hidden_layers=2,
        sliding_window=5,
        vocab_size=560,
    )


@pytest.fixture(scope="module")
def on_one_device(divisible: Path) -> tuple[np.ndarray[Any, Any], list[list[int]]]:
    model = tensorport.load_model(divisible, dtype="float32")
    return np.asarray(model(IDS)), model.generate(PROMPTS, **GREEDY)


IDS = np.random.default_rng(5).integers(0, 560, (2, 11))
PROMPTS = [[5, 9, 2, 7, 1, 3, 8], [17, 4]]
GREEDY: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0, "ignore_eos": True}


@pytest.mark.parametrize("axes", MESHES, ids=str)
@pytest.mark.parametrize("experts", ["mxfp4", "dense"])
def test_results_are_those_of_one_device(
    tmp_path: Path,
    divisible: Path,
    on_one_device: tuple[np.ndarray[Any, Any], list[list[int]]],
    axes: dict[str, int],
    experts: str,
) -> None:
    if experts == "dense":
        tensorport.convert(divisible, tmp_path / "tree", mxfp4="dequantize", progress=False)
        divisible = tmp_path / "tree"
    mesh = mesh_of(axes)
    model = gpt_oss.load(divisible, dtype="float32", sharding=gpt_oss.sharding_rules(mesh), mesh=mesh)
    logits, tokens = on_one_device
    # float32 sums in another order.
    np.testing.assert_allclose(model(IDS), logits, rtol=0, atol=1e-4)
    if experts == "mxfp4":
        assert model.generate(PROMPTS, **GREEDY) == tokens


def test_each_device_holds_its_part(divisible: Path) -> None:
    mesh = mesh_of({"expert": 4, "tensor": 2})
    model = tensorport.load_model(divisible, mesh=mesh)
    layer = model.params["model"]["layers"]["1"]

    def local(array: Any) -> tuple[int, ...]:
        shapes = {shard.data.shape for shard in array.addressable_shards}
        assert len(shapes) == 1
        shape: tuple[int, ...] = shapes.pop()
        return shape

    assert local(model.params["model"]["embed_tokens"]["weight"]) == (560, 128 // 8)
    assert local(model.params["lm_head"]["weight"]) == (560 // 8, 128)
    assert local(layer["self_attn"]["q_proj"]["weight"]) == (24 * 16 // 8, 128)
    assert local(layer["self_attn"]["k_proj"]["bias"]) == (8 * 16 // 8,)
    assert local(layer["self_attn"]["o_proj"]["weight"]) == (128, 24 * 16 // 8)
    experts = layer["mlp"]["experts"]
    assert local(experts["gate_up_proj"].blocks) == (4 // 4, 2 * 192 // 2, 128 // 32, 16)
    assert local(experts["down_proj"].scales) == (4 // 4, 128, 192 // 32 // 2)
    cache = model.decoder.empty_cache(model.params, 1, 32)
    assert local(cache.layers[1].keys) == (1, 32, 8 // 8, 16)
    assert local(cache.layers[0].keys) == (1, 5, 8 // 8, 16)


def test_experts_are_not_gathered(divisible: Path) -> None:
    mesh = mesh_of({"expert": 4, "tensor": 2}, AxisType.Auto)
    shapes = tensorport.load_params_shapes(divisible, sharding=gpt_oss.sharding_rules(mesh), mesh=mesh)
    decoder = gpt_oss.GptOss(gpt_oss.load_config(divisible), mesh)
    replicated = NamedSharding(mesh, PartitionSpec())
    ids = jax.ShapeDtypeStruct((1, 3), np.int32, sharding=replicated)
    compiled = jax.jit(decoder.forward).lower(shapes, ids).compile()
    gathers = [line for line in str(compiled.as_text()).splitlines() if " all-gather(" in line]
    assert "all-reduce" in str(compiled.as_text())
    assert not [line for line in gathers if "u8[" in line]


def test_the_rules_cover_every_parameter_of_a_checkpoint(tiny: Path) -> None:
    mesh = mesh_of({"data": 8})
    tensorport.load_params_shapes(tiny, sharding=gpt_oss.sharding_rules(mesh), mesh=mesh)


def test_bytes_of_each_device_for_120b_are_known_from_shapes_alone() -> None:
    mesh = mesh_of({"expert": 8})
    shares = gpt_oss.memory_per_device(gpt_oss_120b(), mesh, batch=1, max_length=256)
    parameters = 65_248_815_744
    # All but norms, routers and biases is divided by 8.
    assert parameters / 8 < shares.parameters < 1.02 * parameters / 8
    assert shares.cache == 2 * 2 * 64 * (18 * 256 + 18 * 128) + 4  # one of 8 heads, and the length
    assert shares.parameters + shares.cache < shares.peak < 1.1 * shares.parameters


def gpt_oss_120b() -> gpt_oss.Config:
    fields = tensorport.synthesize.__globals__["_config"]("gpt-oss-120b", {})
    return gpt_oss.Config.from_json(fields)


def test_a_mesh_that_does_not_divide_the_model_is_refused_with_all_reasons(tiny: Path) -> None:
    mesh = mesh_of({"expert": 4, "tensor": 2})
    with pytest.raises(
        MappingError, match=r"(?s)num_key_value_heads: found 2, .*of 8 .*num_local_experts: found 6.*32"
    ):
        tensorport.load_model(tiny, mesh=mesh)
    with pytest.raises(ValueError, match="mesh: found the axes 'model', expected some of data, expert, tensor"):
        gpt_oss.sharding_rules(mesh_of({"model": 8}))
