"""MXFP4Embed: `nnx.Embed` over codes."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, Self

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, BFloat16, Float, Integer, Num

from tensorport.kernels.arguments import mxfp4_array
from tensorport.kernels.registry import ImplementationName
from tensorport.mxfp4.codec import ScaleRule, decode
from tensorport.mxfp4.types import MXFP4Array
from tensorport.nnx.dense import Initializer, assembled, check_blocks, fault_of, initialized, quantized_param
from tensorport.nnx.linear import product
from tensorport.nnx.sharding import OutSharding, on_auto_axes
from tensorport.nnx.variables import MXFP4Param

__all__ = ["MXFP4Embed", "embed_fault"]

_NAN_SCALE: Final = 255  # OCP MX v1.0, 5.4.1


class MXFP4Embed(nnx.Module):
    """An embedding on frozen MXFP4 rows, in the place of `nnx.Embed`.

    Only rows that are looked up are decoded. :meth:`attend` multiplies by the whole matrix, for heads that are tied to
    the embedding.

    Args:
        num_embeddings: number of rows.
        features: size of a row, a multiple of 32.
        dtype: of the result; by default `param_dtype`.
        param_dtype: of the dense matrix before it is quantized.
        embedding_init: initializer of the dense matrix [num_embeddings, features], which is quantized and dropped.
        scale_rule: see :func:`tensorport.mxfp4.quantize`.
        implementation: of :meth:`attend`, see :func:`tensorport.kernels.explain`.
        rngs: its stream `params` is used.
        embedding_metadata: metadata of the embedding's variable.

    Attributes:
        embedding: MXFP4Param [num_embeddings, features].

    Raises:
        ValueError: `features` is not a multiple of 32.
    """

    embedding: MXFP4Param

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        embedding_init: Initializer = nnx.nn.linear.default_embed_init,
        scale_rule: ScaleRule = "floor",
        implementation: ImplementationName = "auto",
        rngs: nnx.Rngs,
        embedding_metadata: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        check_blocks("features", features)
        dense = embedding_init(rngs.params(), (num_embeddings, features), param_dtype)
        self.embedding = initialized(dense, scale_rule, embedding_metadata, transpose=False)
        self.num_embeddings = num_embeddings
        self.features = features
        self.dtype = jnp.dtype(param_dtype if dtype is None else dtype)
        self.param_dtype = param_dtype
        self.implementation = implementation

    @classmethod
    def from_embed(
        cls, embed: nnx.Embed, *, scale_rule: ScaleRule = "floor", implementation: ImplementationName = "auto"
    ) -> Self:
        """Quantizes a dense embedding; its sharding and metadata go over to the codes.

        Args:
            embed: the layer, or a stack of such, made by `nnx.vmap`.
            scale_rule: see :func:`tensorport.mxfp4.quantize`.
            implementation: of :meth:`attend`, see :func:`tensorport.kernels.explain`.

        Raises:
            ValueError: the layer cannot be quantized without a change of its meaning: `features` is not a multiple of
                32, it is of a subclass of `nnx.Embed`, or it has a `promote_dtype` of its own.
            TypeError: it is no `nnx.Embed`.
        """
        if not isinstance(embed, nnx.Embed):
            raise TypeError(f"embed: found {type(embed).__name__}, expected an nnx.Embed")
        fault = embed_fault(embed)
        if fault is not None:
            raise ValueError(f"embed: {fault}")
        return cls._around(
            quantized_param(embed.embedding, scale_rule, transpose=False),
            (embed.num_embeddings, embed.features),
            dtype=embed.dtype,
            param_dtype=embed.embedding[...].dtype,
            implementation=implementation,
        )

    @classmethod
    def from_array(
        cls,
        embedding: BFloat16[MXFP4Array, "num_embeddings features"],
        *,
        dtype: DTypeLike = jnp.bfloat16,
        implementation: ImplementationName = "auto",
    ) -> Self:
        """An embedding on codes that exist already, such as those of a checkpoint.

        Args:
            embedding: [num_embeddings, features], kept as it is.
            dtype: of the result.
            implementation: of :meth:`attend`, see :func:`tensorport.kernels.explain`.

        Raises:
            TypeError: `embedding` is no MXFP4Array.
            ValueError: it is no matrix.
        """
        num_embeddings, features = mxfp4_array("embedding", embedding, 2).shape
        return cls._around(
            MXFP4Param(embedding),
            (num_embeddings, features),
            dtype=dtype,
            param_dtype=jnp.bfloat16,
            implementation=implementation,
        )

    @classmethod
    def _around(cls, embedding: MXFP4Param, sizes: tuple[int, int], **options: Any) -> Self:
        return assembled(cls, *sizes, variables={"embedding": embedding}, **options)

    def __call__(
        self, inputs: Integer[ArrayLike, "*batch"], out_sharding: OutSharding = None
    ) -> Float[Array, "*batch features"]:
        """Looks rows up.

        Args:
            inputs: indices of any shape, integers. Negative ones count from the end; the rows of those that are out of
                range are NaN, and with one row alone every index means that row: both as in `nnx.Embed`.
            out_sharding: of the result, on a mesh with explicit axes.

        Returns:
            [..., features] in `dtype`, of the shape of the indices.

        Raises:
            ValueError: the indices are not integers.
        """
        inputs = jnp.asarray(inputs)
        if not jnp.issubdtype(inputs.dtype, jnp.integer):
            raise ValueError(f"inputs: found an array of {inputs.dtype}, expected integers")
        if self.num_embeddings == 1:
            inputs = jnp.zeros_like(inputs)

        def look_up(w: MXFP4Array, rows: Array) -> Array:
            blocks = jnp.take(w.blocks, rows, axis=0, mode="fill", fill_value=0)
            return decode(blocks, jnp.take(w.scales, rows, axis=0, mode="fill", fill_value=_NAN_SCALE), self.dtype)

        return on_auto_axes(look_up, out_sharding)(self.embedding[...], inputs)

    def attend(
        self, query: Num[ArrayLike, "*batch features"], out_sharding: OutSharding = None
    ) -> Float[Array, "*batch num_embeddings"]:
        """Products of a query with every row, as logits of a tied head.

        Args:
            query: [..., features].
            out_sharding: of the result, on a mesh with explicit axes.

        Returns:
            [..., num_embeddings] in `dtype`.

        Raises:
            NotImplementedError: the implementation that was named cannot run here.
            TypeError, ValueError: the query does not fit.
        """
        return product(jnp.asarray(query, self.dtype), self.embedding[...], self.implementation, out_sharding)


_ATTRIBUTES: Final = frozenset(["embedding", "num_embeddings", "features", "dtype", "param_dtype", "promote_dtype"])


def embed_fault(embed: nnx.Embed) -> str | None:
    """Why a layer has no counterpart that means the same; None if it has."""
    fault = fault_of(embed, nnx.Embed, "embedding", axis=-1, attributes=_ATTRIBUTES)
    if fault is None and embed.promote_dtype is not dtypes.promote_dtype:
        return "found a promote_dtype of its own, expected that of Flax"
    return fault
