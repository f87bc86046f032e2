r"""Flax NNX layers whose weights are MXFP4: codes of 4 bits that stay as they are, and computation on them.

>>> from tensorport import nnx as tnnx
>>> layer = tnnx.MXFP4Linear(64, 128, rngs=nnx.Rngs(0))       # as nnx.Linear, a quarter of bfloat16's size
>>> layer = tnnx.MXFP4Linear.from_linear(dense)               # from a dense layer, or from_array: from a checkpoint
>>> report = tnnx.quantize_model(model, r"mlp\.(up|down)$")    # layers of a whole model, in place

Codes and scales stand in variables of the type `MXFP4Param`, which is no `nnx.Param`: optimizers and gradients that ask
for `nnx.Param` see biases, routers and adapters, and never the codes.
"""

try:
    import flax.nnx as _nnx  # noqa: F401
except ImportError as fault:
    raise ImportError("tensorport.nnx needs Flax: pip install 'tensorport[flax]'") from fault

from tensorport.nnx.attention import AttentionCache, MXFP4Attention
from tensorport.nnx.embed import MXFP4Embed
from tensorport.nnx.linear import MXFP4Linear
from tensorport.nnx.mlp import MXFP4MLP
from tensorport.nnx.moe import MXFP4MoE
from tensorport.nnx.quantize import quantize_model
from tensorport.nnx.variables import MXFP4Param

__all__ = [
    "MXFP4MLP",
    "AttentionCache",
    "MXFP4Attention",
    "MXFP4Embed",
    "MXFP4Linear",
    "MXFP4MoE",
    "MXFP4Param",
    "quantize_model",
]
