"""Whether a model is right: its tensors, what it computes, and what others compute of it.

>>> report = tensorport.validate("gpt-oss-20b", reference="transformers")
>>> report.ok, report.failures
(True, ())
"""

try:
    import jax as _jax  # noqa: F401
except ImportError as fault:
    raise ImportError("validate needs JAX: pip install 'tensorport[jax]'") from fault

from tensorport.validation.api import validate
from tensorport.validation.report import LayerActivations, ValidationCheck, ValidationReport

__all__ = ["LayerActivations", "ValidationCheck", "ValidationReport", "validate"]
