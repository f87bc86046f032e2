"""gpt-oss in JAX, from either layout of its checkpoints or a converted tree.

>>> from tensorport.models import gpt_oss
>>> model = gpt_oss.load("gpt-oss-20b")                                  # a LanguageModel
>>> logits, cache = gpt_oss.forward(params, config, tokens, cache)       # the pure function under it
"""

import os
from typing import Any

from tensorport.errors import CheckpointError
from tensorport.models.gpt_oss.cache import Cache, empty_cache
from tensorport.models.gpt_oss.config import Config, Rope
from tensorport.models.gpt_oss.decoder import GptOss
from tensorport.models.gpt_oss.memory import DeviceMemory, memory_per_device
from tensorport.models.gpt_oss.model import forward
from tensorport.models.gpt_oss.params import load_model_params
from tensorport.models.gpt_oss.sharding import sharding_rules
from tensorport.models.language_model import LanguageModel, load_model, read_config
from tensorport.models.registry import architecture_of
from tensorport.source import headers_source, local_path

__all__ = [
    "Cache",
    "Config",
    "DeviceMemory",
    "GptOss",
    "Rope",
    "empty_cache",
    "forward",
    "load",
    "load_config",
    "load_model_params",
    "memory_per_device",
    "sharding_rules",
]


def load(source: str | os.PathLike[str], **options: Any) -> LanguageModel:
    """As :func:`tensorport.load_model`, of a gpt-oss and nothing else.

    Raises:
        CheckpointError: the checkpoint is of another kind; and what `load_model` raises.
    """
    source = local_path(source, options.get("progress", False))
    fields, file = read_config(source)
    found = architecture_of(fields, str(file)).model_type
    if found != "gpt_oss":
        raise CheckpointError(f"{file}: found a {found}, expected a gpt_oss")
    return load_model(source, **options)


def load_config(source: str | os.PathLike[str]) -> Config:
    """The configuration of a checkpoint; reads no tensors, and of an id downloads none.

    Raises:
        CheckpointError: there is no config.json, or it does not describe a gpt-oss that this version runs.
        OSError: the system refused.
    """
    with headers_source(source) as headers:
        fields, file = read_config(headers.path)
        return Config.from_json(fields, str(file))
