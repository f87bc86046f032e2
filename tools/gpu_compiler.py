"""Compiles JAX functions for an H200 on a machine that has no GPU: what ptxas says, what XLA captures in a graph.

Needs an environment of its own, on Python 3.12 or newer:

    pip install jax==0.11.2 jax-cuda13-plugin==0.11.2 jax-cuda13-pjrt==0.11.2 'nvidia-cuda-nvcc==13.0.*'

>>> from gpu_compiler import array, compile_for_gpu   # before anything imports jax
>>> compiled = compile_for_gpu(lambda x: x @ x, array((512, 512), "bfloat16"), xla_dump_to="dump")
>>> compiled.memory_analysis()

Keywords are XLA's options for this one compilation: with `xla_dump_to` and `xla_dump_hlo_as_text=True` the folder gets
PTX and the list of thunks. Pallas kernels of both backends compile too. Numbers, and what autotuning would choose, only
a device gives. h200.textproto describes the chip as XLA wants it; its figures are those of NVIDIA's data sheet.
"""

import importlib.util
import os
from pathlib import Path
from typing import Any

CUDA = importlib.util.find_spec("nvidia.cu13")
if CUDA is None or not CUDA.submodule_search_locations:
    raise ImportError("gpu_compiler needs the packages that its first lines name")
_ROOT = CUDA.submodule_search_locations[0]
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
os.environ["CUDA_HOME"] = _ROOT
os.environ["PATH"] = os.pathsep.join([f"{_ROOT}/bin", os.environ["PATH"]])
os.environ["XLA_FLAGS"] = f"--xla_gpu_cuda_data_dir={_ROOT} {os.environ.get('XLA_FLAGS', '')}"

import jax  # noqa: E402 - reads the environment
from jax.experimental import topologies  # noqa: E402

_TARGET = Path(__file__).with_name("h200.textproto").read_text()
_TOPOLOGY = topologies.get_topology_desc(platform="cuda", topology_name="h200", target_config=_TARGET, topology="1x1x1")
_SHARDING = jax.sharding.SingleDeviceSharding(_TOPOLOGY.devices[0])
# Pallas asks the mesh for the kind of the device.
_MESH = jax.sharding.AbstractMesh(
    (1,),
    ("device",),
    (jax.sharding.AxisType.Auto,),
    abstract_device=jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu"),
)


def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """What stands for an array on the GPU."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=_SHARDING)


def compile_for_gpu(function: Any, *arguments: Any, **options: Any) -> jax.stages.Compiled:
    """The function compiled for an H200; arguments are trees of :func:`array`, besides the static ones of a jit."""
    jitted = function if hasattr(function, "trace") else jax.jit(function)
    with jax.sharding.use_abstract_mesh(_MESH):
        lowered = jitted.trace(*arguments).lower(lowering_platforms=("cuda",))
    return lowered.compile(compiler_options=options)
