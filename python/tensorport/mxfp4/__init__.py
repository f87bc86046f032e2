"""MXFP4 for JAX: arrays of 4-bit floats in blocks of 32 that share a scale, kept bit for bit as checkpoints hold them.

>>> from tensorport import mxfp4
>>> w = mxfp4.MXFP4Array(blocks, scales)              # a pytree: jit, vmap, scan, shard it like any other
>>> w.shape, w.dtype, w.nbytes                        # the logical array, and the bytes that it takes

The format is that of OCP Microscaling Formats (MX) v1.0; the order of the nibbles that of the gpt-oss checkpoints.
"""

try:
    import jax as _jax  # noqa: F401
except ImportError as fault:
    raise ImportError("tensorport.mxfp4 needs JAX: pip install 'tensorport[jax]'") from fault

from tensorport.mxfp4.types import MX_BLOCK_SIZE, MXFP4Array

__all__ = ["MX_BLOCK_SIZE", "MXFP4Array"]
