"""Arrays of a mixture of experts, and its formula: what its tests share."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import mxfp4_oracle as oracle
import numpy as np
from mxfp4_cases import float64, random_array, random_weights
from numpy.typing import NDArray

E, H, WIDTH, CHOICES = 6, 96, 160, 3  # experts, stream, width between the layers, experts of a token


class Sizes(NamedTuple):
    """Those of a mixture, and its scales: codes under them keep the stream's size."""

    experts: int = E
    hidden: int = H
    width: int = WIDTH
    choices: int = CHOICES
    gate_up_scales: tuple[int, int] = (119, 126)
    down_scales: tuple[int, int] = (117, 124)


def inputs(tokens: int, dtype: Any = jnp.float32, seed: int = 0, sizes: Sizes = Sizes()) -> tuple[Any, ...]:  # noqa: B008 - frozen
    """All arguments; gates and ups reach beyond the limit now and then."""
    rng = np.random.default_rng(seed)
    experts, hidden, width, choices, gate_up_scales, down_scales = sizes
    chosen = np.stack([rng.permutation(experts)[:choices] for _ in range(tokens)]).reshape(tokens, choices)
    return (
        random_array(tokens, hidden, dtype=dtype, seed=seed),
        jnp.asarray(chosen, jnp.int32),
        jnp.asarray(rng.random((tokens, choices)), dtype),
        random_weights(experts, 2 * width, hidden, seed=seed + 1, scales=gate_up_scales),
        random_array(experts, 2 * width, dtype=dtype, seed=seed + 2),
        random_weights(experts, hidden, width, seed=seed + 3, scales=down_scales),
        random_array(experts, hidden, dtype=dtype, seed=seed + 4),
    )


def expected(args: tuple[Any, ...], limit: float = 7.0, alpha: float = 1.702) -> NDArray[np.float64]:
    """The formula in float64, token by token."""
    x, chosen, weights, gate_up, gate_up_bias, down, down_bias = args
    gate_up, down = (oracle.decode(np.asarray(w.blocks), np.asarray(w.scales)) for w in (gate_up, down))
    out = np.zeros(x.shape)
    for token, row in enumerate(float64(x)):
        for expert, weight in zip(np.asarray(chosen)[token], float64(weights)[token], strict=True):
            h = gate_up[expert] @ row + float64(gate_up_bias)[expert]
            gate, up = np.minimum(h[::2], limit), h[1::2].clip(-limit, limit)
            a = gate / (1 + np.exp(-alpha * gate)) * (up + 1)
            out[token] += weight * (down[expert] @ a + float64(down_bias)[expert])
    return out
