"""Which models there are. The next one is a folder beside gpt_oss and one line in `_MODULES`."""

import dataclasses
import importlib
import os
from collections.abc import Callable, Mapping
from typing import Any, Final

from tensorport.errors import CheckpointError
from tensorport.reports import LoadReport, printable

__all__ = ["Architecture", "Loaded", "architecture_of", "supported"]

_MODULES: Final[Mapping[str, str]] = {"gpt_oss": "tensorport.models.gpt_oss.architecture"}
"""For each `model_type` of config.json the module whose `ARCHITECTURE` runs it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Loaded:
    """A model in memory.

    Attributes:
        decoder: its functions: a :class:`tensorport.text.decoder.Decoder` with `config`, `vocab_size`,
            `max_positions`, `forward`, `bytes_per_token` and `layers`, which has `name`, `stream` and `experts` of
            each part of the model.
        params: its weights.
        report: what reading them took.
    """

    decoder: Any
    params: Any
    report: LoadReport


@dataclasses.dataclass(frozen=True, slots=True)
class Architecture:
    """One kind of model.

    Attributes:
        model_type: as config.json names it.
        load: takes the source, the fields of config.json, where these are from, and what :func:`tensorport.load_model`
            was asked for.
        check: takes the first three of these, and raises what loading would raise before it reads tensors.
        recognises: whether a config.json without `model_type` is of this kind.
    """

    model_type: str
    load: Callable[..., Loaded]
    check: Callable[[str | os.PathLike[str], Mapping[str, Any], str], None]
    recognises: Callable[[Mapping[str, Any]], bool] = lambda _: False


def supported() -> list[str]:
    """The `model_type` of all models that there are."""
    return sorted(_MODULES)


def architecture_of(fields: Mapping[str, Any], where: str) -> Architecture:
    """The kind of model that a config.json describes.

    Args:
        fields: what the file holds.
        where: the file, for messages.

    Raises:
        CheckpointError: none of the kinds that there are; lists them.
    """
    model_type = fields.get("model_type")
    if isinstance(model_type, str) and model_type in _MODULES:
        return _architecture(model_type)
    if model_type is None:
        for name in _MODULES:
            if _architecture(name).recognises(fields):
                return _architecture(name)
    found = "no model_type" if model_type is None else f"model_type {printable(repr(model_type))}"
    raise CheckpointError(f"{where}: found {found}, expected one of {', '.join(map(repr, supported()))}")


def _architecture(model_type: str) -> Architecture:
    found: Architecture = importlib.import_module(_MODULES[model_type]).ARCHITECTURE
    return found
