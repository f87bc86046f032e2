"""What a mixture of experts is made of."""

from typing import NamedTuple

from jaxtyping import Array, Float

from tensorport.mxfp4.types import MXFP4Array

__all__ = ["Activation", "Experts"]


class Experts(NamedTuple):
    """Weights of E experts: I is the width between their two layers, H that of the stream.

    Attributes:
        gate_up: [E, 2 I, H], gate and up interleaved along the second axis.
        gate_up_bias: [E, 2 I].
        down: [E, H, I].
        down_bias: [E, H].
    """

    gate_up: MXFP4Array
    gate_up_bias: Float[Array, "e i2"]
    down: MXFP4Array
    down_bias: Float[Array, "e h"]


class Activation(NamedTuple):
    """Constants of the activation between the two layers: see :mod:`tensorport.kernels.swiglu`."""

    limit: float
    alpha: float
