"""gpt-oss as generation sees it: the pure functions with their configuration bound."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int32

from tensorport.kernels.registry import ImplementationName
from tensorport.models.gpt_oss.cache import Cache, empty_cache
from tensorport.models.gpt_oss.config import Config
from tensorport.models.gpt_oss.experts import dense_implementation
from tensorport.models.gpt_oss.layers import LayerOutput, layer_outputs
from tensorport.models.gpt_oss.model import forward, hidden_states, logits_of
from tensorport.models.gpt_oss.sharding import cache_sharding

__all__ = ["GptOss"]


@dataclasses.dataclass(frozen=True, slots=True)
class GptOss:
    """A :class:`tensorport.text.decoder.Decoder`: hashable, so that jitted functions take it as static.

    Attributes:
        config: of the model.
        mesh: devices that parameters are spread over; None for one device.
        implementation: of the products.
    """

    config: Config
    mesh: Mesh | None = None
    implementation: ImplementationName = "auto"

    @property
    def vocab_size(self) -> int:
        """Tokens."""
        return self.config.vocab_size

    @property
    def max_positions(self) -> int:
        """Positions that the model is made for."""
        return self.config.max_position_embeddings

    def forward(self, params: Any, tokens: Int32[Array, "b t"]) -> Float[Array, "b t v"]:
        """Logits of the token after each, without a cache."""
        logits, _ = forward(params, self.config, tokens, mesh=self.mesh, implementation=self.implementation)
        return logits

    def hidden(
        self, params: Any, tokens: Int32[Array, "b t"], cache: Cache, positions: Int32[Array, "b t"]
    ) -> tuple[Float[Array, "b t h"], Cache]:
        """What the model makes of tokens, and the cache with them in it."""
        x, after = hidden_states(
            params, self.config, tokens, cache, positions, mesh=self.mesh, implementation=self.implementation
        )
        assert after is not None, "there was a cache"
        return x, after

    def logits(self, params: Any, x: Float[Array, "*batch h"]) -> Float[Array, "*batch v"]:
        """Logits of the token after each of those."""
        return logits_of(params, x, implementation=dense_implementation(self.implementation, self.mesh))

    def layers(self, params: Any, tokens: Int32[Array, "b t"]) -> Iterator[LayerOutput]:
        """What comes out of each layer, without a cache; of the last one :meth:`logits` makes logits."""
        if self.mesh is not None:
            raise NotImplementedError("layer by layer on a mesh")
        return layer_outputs(params, self.config, tokens, implementation=self.implementation)

    def empty_cache(self, params: Any, batch: int, max_length: int) -> Cache:
        """Room for `max_length` tokens of each row, in the dtype of the parameters."""
        dtype = params["model"]["embed_tokens"]["weight"].dtype
        if self.mesh is None:
            return empty_cache(self.config, batch, max_length, dtype=dtype)
        cache = empty_cache(self.config, batch, max_length, dtype=dtype, sharding=cache_sharding(self.mesh, batch))
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        return cache._replace(lengths=jax.device_put(cache.lengths, everywhere))

    def bytes_per_token(self, params: Any, batch: int = 1) -> int:
        """Bytes of weights that a step reads, which makes one token in each of `batch` rows.

        All weights, but of the embeddings a row for each token, and of the experts those in use: of several rows at
        most so many, for they may share experts.
        """
        config = self.config
        chosen = min(batch * config.num_experts_per_tok, config.num_local_experts)
        embeddings = params["model"]["embed_tokens"]["weight"]
        experts = [layer["mlp"]["experts"] for layer in params["model"]["layers"].values()]
        everything, spread = _nbytes(params), _nbytes(experts)
        dense = everything - spread - _nbytes(embeddings)
        return dense + spread * chosen // config.num_local_experts + batch * _nbytes(embeddings) // config.vocab_size


def _nbytes(tree: Any) -> int:
    return sum(int(leaf.size) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))
