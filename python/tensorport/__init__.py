"""Brings large checkpoints into JAX: reads safetensors of any dtype, converts and verifies them.

>>> import tensorport
>>> checkpoint = tensorport.open("model/")            # a Mapping of zero-copy NumPy views
>>> tensorport.convert("model/", "model-jax/")        # a verified tree of .npy files
>>> tensorport.verify("model-jax/", "model/")         # every value, compared with the source
>>> params = tensorport.load_params("model-jax/")     # a pytree of jax.Arrays
>>> model = tensorport.load_model("model-jax/")       # gpt-oss: text in, text out
>>> tensorport.validate("model-jax/", source="model/")  # its tensors and what it computes, as a report

Importing this package imports neither JAX nor any other optional dependency: `load_params`, `load_params_shapes`,
`load_model`, `validate`, `models`, `mxfp4`, `kernels` and `nnx` do, when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from tensorport._core import __version__
from tensorport.checkpoint import Checkpoint, TensorSpec, open
from tensorport.convert import convert, verify
from tensorport.errors import CheckpointError, ConversionError, MappingError, TensorportError, VerificationError
from tensorport.progress import ProgressEvent
from tensorport.reports import ConversionReport, LoadReport, VerificationFailure, VerificationReport
from tensorport.synthesize import synthesize

if TYPE_CHECKING:
    from tensorport import kernels, models, mxfp4, nnx, text
    from tensorport.load import load_params, load_params_shapes
    from tensorport.models.language_model import LanguageModel, load_model
    from tensorport.validation import ValidationReport, validate

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "ConversionError",
    "ConversionReport",
    "LanguageModel",
    "LoadReport",
    "MappingError",
    "ProgressEvent",
    "TensorSpec",
    "TensorportError",
    "ValidationReport",
    "VerificationError",
    "VerificationFailure",
    "VerificationReport",
    "__version__",
    "convert",
    "kernels",
    "load_model",
    "load_params",
    "load_params_shapes",
    "models",
    "mxfp4",
    "nnx",
    "open",
    "synthesize",
    "text",
    "validate",
    "verify",
]

# What needs JAX (and `nnx` Flax), and the module that has it.
_LAZY = {
    "LanguageModel": "tensorport.models.language_model",
    "ValidationReport": "tensorport.validation",
    "kernels": "tensorport.kernels",
    "load_model": "tensorport.models.language_model",
    "load_params": "tensorport.load",
    "load_params_shapes": "tensorport.load",
    "models": "tensorport.models",
    "mxfp4": "tensorport.mxfp4",
    "nnx": "tensorport.nnx",
    "text": "tensorport.text",
    "validate": "tensorport.validation",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'tensorport' has no attribute {name!r}")
    module = importlib.import_module(_LAZY[name])
    return module if _LAZY[name].endswith(f".{name}") else getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
