"""The exceptions that tensorport raises beside ValueError, TypeError, KeyError and OSError."""

from tensorport._core import (
    CheckpointError,
    ConversionError,
    MappingError,
    TensorportError,
    VerificationError,
)

__all__ = ["CheckpointError", "ConversionError", "MappingError", "TensorportError", "VerificationError"]
