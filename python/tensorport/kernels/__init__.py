"""The computations under tensorport: for each op a folder with a reference, its implementations and their settings.

>>> from tensorport import kernels, mxfp4
>>> kernels.explain(mxfp4.matmul, x, w)          # which implementation runs, and why no other

Users call the ops where they belong, such as :func:`tensorport.mxfp4.matmul`.
"""

try:
    import jax as _jax  # noqa: F401
except ImportError as fault:
    raise ImportError("tensorport.kernels needs JAX: pip install 'tensorport[jax]'") from fault

# First: ops are made of its types, and it exports the ops on MXFP4.
import tensorport.mxfp4  # isort: skip
import tensorport.kernels.attention.api
import tensorport.kernels.dense_moe.api
import tensorport.kernels.linear.api
import tensorport.kernels.write_slots.api  # noqa: F401
from tensorport.kernels.registry import Device, Explanation, ImplementationName, explain

__all__ = ["Device", "Explanation", "ImplementationName", "explain"]
