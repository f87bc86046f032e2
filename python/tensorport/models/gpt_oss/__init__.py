"""gpt-oss in JAX, from either layout of its checkpoints or a converted tree.

>>> from tensorport.models import gpt_oss
>>> model = gpt_oss.load("gpt-oss-20b")                                  # a LanguageModel
>>> logits, cache = gpt_oss.forward(params, config, tokens, cache)       # the pure function under it
"""

from tensorport.models.gpt_oss.cache import Cache, empty_cache
from tensorport.models.gpt_oss.config import Config
from tensorport.models.gpt_oss.model import forward
from tensorport.models.gpt_oss.params import load_model_params
from tensorport.models.gpt_oss.sharding import sharding_rules

__all__ = ["Cache", "Config", "empty_cache", "forward", "load_model_params", "sharding_rules"]
