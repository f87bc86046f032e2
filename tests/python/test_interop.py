"""load_params() beside the libraries of its users: what docs/loading.md does not show."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorport
from flax import nnx
from jax import export
from safetensors.numpy import save_file


def split_linear() -> nnx.Linear:
    by_model = nnx.with_partitioning(nnx.initializers.zeros, (None, "model"))
    return nnx.Linear(3, 5, use_bias=False, kernel_init=by_model, rngs=nnx.Rngs(0))


@pytest.fixture
def linear(tmp_path: Path) -> Path:
    save_file({"kernel": np.arange(15, dtype=np.float32).reshape(3, 5)}, tmp_path / "linear.safetensors")
    return tmp_path / "linear.safetensors"


def test_a_state_whose_shardings_have_a_mesh_of_devices_is_filled_there(linear: Path) -> None:
    graphdef, state = nnx.get_abstract_model(split_linear, jax.make_mesh((1,), ("model",)))
    model = nnx.merge(graphdef, tensorport.load_params(linear, target=state))
    assert model.kernel.sharding.spec == jax.P(None, "model")
    np.testing.assert_array_equal(model(jnp.ones(3)), [15, 18, 21, 24, 27])


def test_a_state_whose_shardings_have_an_abstract_mesh_is_filled_on_the_mesh_in_force(linear: Path) -> None:
    with jax.set_mesh(jax.make_mesh((1,), ("model",))):
        graphdef, state = nnx.split(nnx.eval_shape(split_linear))
        model = nnx.merge(graphdef, tensorport.load_params(linear, target=state))
    assert model.kernel.sharding.spec == jax.P(None, "model")
    np.testing.assert_array_equal(model(jnp.ones(3)), [15, 18, 21, 24, 27])


def test_an_exported_function_takes_mxfp4_weights(tiny: Path) -> None:
    @jax.jit
    def first_scale(params: dict[str, tensorport.mxfp4.MXFP4Array]) -> Any:
        return next(iter(params.values())).scales[0, 0, 0]

    options: dict[str, Any] = {"include": "*.0.*.gate_up_proj", "nested": False}
    blob = export.export(first_scale)(tensorport.load_params_shapes(tiny, **options)).serialize()
    found = export.deserialize(blob).call(tensorport.load_params(tiny, **options))
    assert found == tensorport.open(tiny)["model.layers.0.mlp.experts.gate_up_proj_scales"][0, 0, 0]


def test_weights_that_share_a_file_are_trained_and_the_file_stays(linear: Path, tmp_path: Path) -> None:
    tensorport.convert(linear, tmp_path / "tree", progress=False)
    (file,) = (tmp_path / "tree").rglob("*.npy")
    content = file.read_bytes()
    params, report = tensorport.load_params(tmp_path / "tree", return_report=True)
    assert report.shared_bytes == params["kernel"].nbytes

    halve = jax.jit(lambda params: jax.tree.map(lambda leaf: leaf / 2, params), donate_argnums=0)
    for _ in range(3):
        params = halve(params)
    np.testing.assert_array_equal(params["kernel"], np.arange(15).reshape(3, 5) / 8)
    assert file.read_bytes() == content
