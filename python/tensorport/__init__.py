"""Brings large checkpoints into JAX: reads safetensors of any dtype, converts and verifies them.

>>> import tensorport
>>> checkpoint = tensorport.open("model/")            # a Mapping of zero-copy NumPy views
>>> tensorport.convert("model/", "model-jax/")        # a verified tree of .npy files
>>> tensorport.verify("model-jax/", "model/")         # every value, compared with the source

Importing this package imports neither JAX nor any other optional dependency.
"""

from tensorport._core import __version__
from tensorport.checkpoint import Checkpoint, TensorSpec, open
from tensorport.convert import convert, verify
from tensorport.errors import CheckpointError, ConversionError, MappingError, TensorportError, VerificationError
from tensorport.progress import ProgressEvent
from tensorport.reports import ConversionReport, VerificationFailure, VerificationReport
from tensorport.synthesize import synthesize

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "ConversionError",
    "ConversionReport",
    "MappingError",
    "ProgressEvent",
    "TensorSpec",
    "TensorportError",
    "VerificationError",
    "VerificationFailure",
    "VerificationReport",
    "__version__",
    "convert",
    "open",
    "synthesize",
    "verify",
]
