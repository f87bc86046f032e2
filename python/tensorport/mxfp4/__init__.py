"""MXFP4 for JAX: arrays of 4-bit floats in blocks of 32 that share a scale, kept bit for bit as checkpoints hold them.

>>> from tensorport import mxfp4
>>> w = mxfp4.quantize(x)                             # or MXFP4Array(blocks, scales), or what load_params returns
>>> w.shape, w.dtype, w.nbytes                        # the logical array, and the bytes that it takes
>>> y = mxfp4.matmul(x, w)                            # on the codes; jit, vmap, grad and shardings as for any array
>>> w.dequantize()                                    # a dense array, exact

The format is that of OCP Microscaling Formats (MX) v1.0; the order of the nibbles that of the gpt-oss checkpoints.
"""

try:
    import jax as _jax  # noqa: F401
except ImportError as fault:
    raise ImportError("tensorport.mxfp4 needs JAX: pip install 'tensorport[jax]'") from fault

from tensorport.mxfp4.types import MX_BLOCK_SIZE, MXFP4Array  # isort: skip - the ops below are made of these
from tensorport.mxfp4.codec import dequantize, fake_quantize, quantize  # isort: skip
from tensorport.mxfp4.error import QuantizationError, error_between, quantization_error  # isort: skip
from tensorport.mxfp4.params import quantize_params  # isort: skip
from tensorport.mxfp4.report import QuantizationReport  # isort: skip
from tensorport.kernels.mxfp4_expert_matmul.api import expert_matmul
from tensorport.kernels.mxfp4_matmul.api import matmul
from tensorport.kernels.mxfp4_moe.api import moe

__all__ = [
    "MX_BLOCK_SIZE",
    "MXFP4Array",
    "QuantizationError",
    "QuantizationReport",
    "dequantize",
    "error_between",
    "expert_matmul",
    "fake_quantize",
    "matmul",
    "moe",
    "quantization_error",
    "quantize",
    "quantize_params",
]
