"""What a mixture of experts is made of."""

from typing import Final, NamedTuple

from jaxtyping import Array, Float

from tensorport.mxfp4.types import MXFP4Array

__all__ = ["ELSEWHERE", "Activation", "DenseExperts", "Experts", "TransposedExperts"]

ELSEWHERE: Final = -(2**30)
"""An index for an expert that another device has, or for none: the pair adds nothing here."""


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


class DenseExperts(NamedTuple):
    """As :class:`Experts`, with matrices that are not MXFP4: the same loop multiplies them."""

    gate_up: Float[Array, "e i2 h"]
    gate_up_bias: Float[Array, "e i2"]
    down: Float[Array, "e h i"]
    down_bias: Float[Array, "e h"]


class TransposedExperts(NamedTuple):
    """As :class:`DenseExperts`, with matrices [in, out]: transformers holds decoded ones so."""

    gate_up: Float[Array, "e h i2"]
    gate_up_bias: Float[Array, "e i2"]
    down: Float[Array, "e i h"]
    down_bias: Float[Array, "e h"]


class Activation(NamedTuple):
    """Constants of the activation between the two layers: see :mod:`tensorport.kernels.swiglu`."""

    limit: float
    alpha: float

    @classmethod
    def checked(cls, limit: float, alpha: float) -> "Activation":
        """Those of a caller; refuses a limit between whose signs there is nothing."""
        if not limit >= 0:
            raise ValueError(f"limit: found {limit}, expected at least 0")
        return cls(float(limit), float(alpha))
