"""matmul in plain JAX: a tile of rows is decoded and multiplied at a time."""

import math
from collections.abc import Callable

from jaxtyping import Array, Float

from tensorport.kernels.mxfp4_matmul.configs import Config
from tensorport.kernels.registry import Device
from tensorport.kernels.tiles import product, transposed_product
from tensorport.mxfp4.types import MXFP4Array

__all__ = ["matmul", "matmul_transposed"]


def matmul(x: Float[Array, "*batch k"], w: MXFP4Array) -> Float[Array, "*batch n"]:
    """X [..., K] . w [N, K] -> [..., N]."""
    return _over_rows(product, x, w, w.shape[0])


def matmul_transposed(g: Float[Array, "*batch n"], w: MXFP4Array) -> Float[Array, "*batch k"]:
    """G [..., N] . w [N, K] -> [..., K]: the gradient of matmul with respect to x."""
    return _over_rows(transposed_product, g, w, w.shape[1])


def _over_rows(
    function: Callable[..., Array], x: Float[Array, "*batch k"], w: MXFP4Array, columns: int
) -> Float[Array, "*batch columns"]:
    *batch, k = x.shape
    rows = x.reshape(math.prod(batch), k)
    config = Config.choose(Device.of(x, w))
    out = function(rows, MXFP4Array(w.blocks[None], w.scales[None]), 0, block_n=config.block_n)
    return out.astype(x.dtype).reshape(*batch, columns)
