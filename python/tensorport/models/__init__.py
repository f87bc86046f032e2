"""Whole models, from checkpoint to text: a folder for each kind, and the list of those that there are.

>>> from tensorport.models import gpt_oss
>>> model = gpt_oss.load("gpt-oss-20b")                # or tensorport.load_model, which finds the kind by itself
"""

try:
    import jax as _jax  # noqa: F401
except ImportError as fault:
    raise ImportError("tensorport.models needs JAX: pip install 'tensorport[jax]'") from fault

from tensorport.models import gpt_oss
from tensorport.models.generation import Generation, GenerationStats
from tensorport.models.language_model import LanguageModel, load_model
from tensorport.models.registry import supported

__all__ = ["Generation", "GenerationStats", "LanguageModel", "gpt_oss", "load_model", "supported"]
