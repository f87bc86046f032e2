"""The records of benchmarks/jax_vs_pytorch.py: lines of JSON, and how they are checked. Needs Python alone."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

__all__ = ["KIND", "SCHEMA", "SIDES", "STATUSES", "VALUES", "Record", "RecordError", "read_records"]

KIND: Final = "jax_vs_pytorch"
SCHEMA: Final = 1
"""Raised where fields change their meaning."""

SIDES: Final = ("jax", "pytorch", "both")
STATUSES: Final = ("measured", "missing", "failed", "not comparable")

_NUMBER: Final = (int, float)
_OR_NONE: Final = (int, float, type(None))

VALUES: Final[dict[str, dict[str, tuple[type, ...]]]] = {
    "load": {"seconds": _NUMBER, "weight_bytes": _NUMBER},
    "compile": {"seconds": _NUMBER, "programs": _OR_NONE, "backend_compile_s": _OR_NONE},
    "prompts": {"first_token_s": _NUMBER, "tokens_per_s": _NUMBER, "per_prompt": (list,), "compiled": _OR_NONE},
    "batch": {
        "batch": (int,),
        "first_token_s": _NUMBER,
        "tokens_per_s": _NUMBER,
        "samples": (list,),
        "compiled": _OR_NONE,
    },
    "memory": {"anonymous_bytes": _NUMBER, "peak_rss_bytes": _NUMBER, "device_peak_bytes": _OR_NONE},
    "agreement": {"per_prompt": (list,), "near_tie": _NUMBER},
    "process": {},
}
"""By measurement what its `values` hold where it was measured, and of which types.

load: until all weights are on the device, imports not counted; what they take there.
compile: what first calls took beyond later ones, and of it what XLA compiled; None where nothing compiles.
prompts: one at a time; medians, and for each its id, class, prompt_tokens, first_token_s and tokens_per_s.
batch: so many rows at once; medians, and for each repeat its first_token_s and tokens_per_s.
memory: the peak of the process in all this, and of the device where it tells.
agreement: for each prompt its id, class, new_tokens, same_tokens before the first difference, and there the gap of the
two tokens' logits on the JAX side, of the largest logit, and is_near_tie; both None without a difference.
process: a side that did not end, or did not begin.
"""

_PER_PROMPT: Final[dict[str, dict[str, tuple[type, ...]]]] = {
    "prompts": {
        "id": (str,),
        "class": (str,),
        "prompt_tokens": (int,),
        "first_token_s": _NUMBER,
        "tokens_per_s": _NUMBER,
    },
    "agreement": {
        "id": (str,),
        "class": (str,),
        "new_tokens": (int,),
        "same_tokens": (int,),
        "gap": _OR_NONE,
        "is_near_tie": (bool, type(None)),
    },
}
_SAMPLES: Final[dict[str, tuple[type, ...]]] = {"first_token_s": _NUMBER, "tokens_per_s": _NUMBER}


class RecordError(ValueError):
    """A line that is no record; the message has the file, the line, what was found and what was expected."""


@dataclasses.dataclass(frozen=True)
class Record:
    """One measurement of one side in one round.

    Attributes:
        side: `jax`, `pytorch`, or `both` where they are compared.
        measurement: a name of :data:`VALUES`.
        status: `measured`; `missing`: the side is not installed; `failed`; or `not comparable`.
        round: from 0.
        date: when the run began: ISO 8601, UTC.
        machine: cores, processor, memory and system.
        device: where the model was: `cpu` or a GPU's name; None where nobody got to know.
        versions: of Python and of what computes.
        settings: what was measured, and how; `warmups` are those of this side.
        values: as :data:`VALUES` has them; empty where nothing was measured.
        note: anything else; why there is nothing.
    """

    side: str
    measurement: str
    status: str
    round: int
    date: str
    machine: str
    device: str | None
    versions: dict[str, str]
    settings: dict[str, Any]
    values: dict[str, Any]
    note: str = ""

    def line(self) -> str:
        """The record as a line of JSON."""
        return json.dumps({"kind": KIND, "schema": SCHEMA, **dataclasses.asdict(self)}, ensure_ascii=False)


_FIELDS: Final[dict[str, tuple[type, ...]]] = {
    "side": (str,),
    "measurement": (str,),
    "status": (str,),
    "round": (int,),
    "date": (str,),
    "machine": (str,),
    "device": (str, type(None)),
    "versions": (dict,),
    "settings": (dict,),
    "values": (dict,),
    "note": (str,),
}
_SETTINGS: Final[dict[str, tuple[type, ...]]] = {"model": (str,), "dtype": (str,), "warmups_are_full": (bool,)}


def read_records(path: Path) -> list[Record]:
    """All records of a file.

    Raises:
        RecordError: a line is no record, or there is none.
        OSError: the system refused.
    """
    records = list(_records(path))
    if not records:
        raise RecordError(f"{path}: found no records, expected at least one")
    return records


def _records(path: Path) -> Iterator[Record]:
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as fault:
            raise RecordError(
                f"{where}: found {_shown(line.decode(errors='replace'))}, expected JSON: {fault}"
            ) from fault
        yield _checked(where, fields)


def _checked(where: str, fields: Any) -> Record:
    if not isinstance(fields, dict):
        raise RecordError(f"{where}: found {_shown(fields)}, expected an object")
    for name, expected in (("kind", KIND), ("schema", SCHEMA)):
        if fields.get(name) != expected:
            raise RecordError(f"{where}: {name}: found {_shown(fields.get(name))}, expected {expected!r}")
    _check_types(where, "", fields, _FIELDS)
    for name, known in (("side", SIDES), ("measurement", tuple(VALUES)), ("status", STATUSES)):
        if fields[name] not in known:
            raise RecordError(f"{where}: {name}: found {fields[name]!r}, expected one of {', '.join(known)}")
    _check_types(where, "settings.", fields["settings"], _SETTINGS)
    if fields["status"] == "measured":
        measurement, values = fields["measurement"], fields["values"]
        _check_types(where, "values.", values, VALUES[measurement])
        for index, prompt in enumerate(values.get("per_prompt", [])):
            _check_types(where, f"values.per_prompt[{index}].", prompt, _PER_PROMPT[measurement])
        for index, sample in enumerate(values.get("samples", [])):
            _check_types(where, f"values.samples[{index}].", sample, _SAMPLES)
    return Record(**{name: fields[name] for name in _FIELDS})


def _check_types(where: str, prefix: str, fields: Any, types: dict[str, tuple[type, ...]]) -> None:
    if not isinstance(fields, dict):
        raise RecordError(f"{where}: {prefix.rstrip('.')}: found {_shown(fields)}, expected an object")
    for name, wanted in types.items():
        if name not in fields:
            raise RecordError(f"{where}: {prefix}{name}: found nothing, expected {_names(wanted)}")
        value = fields[name]
        # In Python True is an integer.
        if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
            raise RecordError(f"{where}: {prefix}{name}: found {_shown(value)}, expected {_names(wanted)}")


def _names(types: tuple[type, ...]) -> str:
    return " or ".join("null" if kind is type(None) else kind.__name__ for kind in types)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
