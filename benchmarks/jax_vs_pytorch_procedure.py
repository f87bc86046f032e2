"""What jax_vs_pytorch.py does on each side, in the same order and with the same clock. Needs Python alone."""

import dataclasses
import json
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

__all__ = ["Clock", "Side", "Timed", "main", "measure"]


@dataclasses.dataclass(frozen=True)
class Timed:
    """One call that generates.

    Attributes:
        first_token_s: from the call until the first token of every row is on the host.
        total_s: until the last one is.
        ids: new tokens of each row.
    """

    first_token_s: float
    total_s: float
    ids: list[list[int]]

    @property
    def tokens_per_s(self) -> float:
        """Of all rows together, without the first ones."""
        return sum(len(row) - 1 for row in self.ids) / (self.total_s - self.first_token_s)


class Clock:
    """Times one call: from its start, when the first tokens were there, and until its end."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.first_token_s: float | None = None

    def tick(self) -> None:
        """Tokens are on the host; the first call counts."""
        if self.first_token_s is None:
            self.first_token_s = time.perf_counter() - self.began

    def stop(self, ids: list[list[int]], new: int) -> Timed:
        """All tokens are there.

        Raises:
            ValueError: they are not as many as were asked for.
        """
        total_s = time.perf_counter() - self.began
        if self.first_token_s is None or any(len(row) != new for row in ids):
            raise ValueError(f"new tokens: found {[len(row) for row in ids]}, expected {new} in each row")
        return Timed(self.first_token_s, total_s, ids)


class Side(Protocol):
    """One of the two, in a process of its own."""

    def load(self) -> int:
        """Brings the weights to the device; returns their bytes there."""
        ...

    def generate(self, prompts: list[list[int]], new: int) -> Timed:
        """Continues prompts by `new` tokens each, whatever the tokens are."""
        ...

    def compiled(self) -> tuple[int, float] | None:
        """Programs that were compiled so far, and seconds of it; None where nothing compiles."""
        ...

    def device_peak_bytes(self) -> int | None:
        """Peak of the device's memory so far; None where it does not tell."""
        ...

    def facts(self) -> dict[str, Any]:
        """`device`, `versions`, and `settings` that are this side's own."""
        ...


def measure(side: Side, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields measurements with their values; ids of tokens are beside them.

    Every case is warmed up with `warmups` calls, which come after its first one: what that took beyond later ones is
    told apart. Programs are compiled for lengths, so that JAX's first calls are of every prompt, and PyTorch's of one.

    Args:
        side: who generates.
        settings: `prompts` (each with `id`, `class` and `ids`), `batches` (a list of rows for each size), `new`,
            `warmups`, `repeats`.
    """
    prompts, new = settings["prompts"], settings["new"]
    began = time.perf_counter()
    weight_bytes = side.load()
    yield {"measurement": "load", "values": {"seconds": time.perf_counter() - began, "weight_bytes": weight_bytes}}

    compiles = side.compiled() is not None
    first = [side.generate([prompt["ids"]], new).total_s for prompt in (prompts if compiles else prompts[:1])]
    for index in range(settings["warmups"]):
        side.generate([prompts[index % len(prompts)]["ids"]], new)
    before = _programs(side)
    made = [side.generate([prompt["ids"]], new) for prompt in prompts]
    beyond_s = sum(max(once - later.total_s, 0.0) for once, later in zip(first, made, strict=False))
    per_prompt = [
        {
            "id": prompt["id"],
            "class": prompt["class"],
            "prompt_tokens": len(prompt["ids"]),
            "first_token_s": timed.first_token_s,
            "tokens_per_s": timed.tokens_per_s,
        }
        for prompt, timed in zip(prompts, made, strict=True)
    ]
    values = {**_medians(made), "per_prompt": per_prompt, "compiled": _since(side, before)}
    yield {"measurement": "prompts", "values": values, "ids": [timed.ids[0] for timed in made]}

    for rows in settings["batches"]:
        once = side.generate(rows, new)
        for _ in range(settings["warmups"]):
            side.generate(rows, new)
        before = _programs(side)
        made = [side.generate(rows, new) for _ in range(settings["repeats"])]
        beyond_s += max(once.total_s - statistics.median(timed.total_s for timed in made), 0.0)
        samples = [{"first_token_s": timed.first_token_s, "tokens_per_s": timed.tokens_per_s} for timed in made]
        values = {"batch": len(rows), **_medians(made), "samples": samples, "compiled": _since(side, before)}
        yield {"measurement": "batch", "values": values}

    programs, compile_s = side.compiled() or (None, None)
    values = {"seconds": beyond_s, "programs": programs, "backend_compile_s": compile_s}
    note = "" if compiles else "nothing is compiled: what first calls took beyond later ones"
    yield {"measurement": "compile", "values": values, "note": note}
    peak_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
    yield {
        "measurement": "memory",
        "values": {"peak_rss_bytes": peak_rss, "device_peak_bytes": side.device_peak_bytes()},
    }


def _medians(made: list[Timed]) -> dict[str, float]:
    return {
        "first_token_s": statistics.median(timed.first_token_s for timed in made),
        "tokens_per_s": statistics.median(timed.tokens_per_s for timed in made),
    }


def _programs(side: Side) -> int | None:
    compiled = side.compiled()
    return None if compiled is None else compiled[0]


def _since(side: Side, before: int | None) -> int | None:
    """Programs that were compiled since: none, or what was measured is no time of the model."""
    return None if before is None else (_programs(side) or 0) - before


def main(side: Side, settings: dict[str, Any]) -> None:
    """Measures, and writes a line of JSON for each measurement as it ends: what came before a fault is kept."""
    with Path(settings["rows"]).open("w", encoding="utf-8") as file:
        for row in measure(side, settings):
            print(json.dumps({**row, "facts": side.facts()}), file=file, flush=True)
            print(f"{settings['side']}: {row['measurement']}", file=sys.stderr, flush=True)
