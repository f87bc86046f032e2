"""The rows of benchmarks/gpu_model.py, and how its jobs run the cases they come from. Needs Python alone."""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

# Seconds of a case with all it compiles: guesses, by which cases are left out that would end too late.
ESTIMATED_S = {"load": 10.0, "context": 45.0, "compile": 45.0, "decode": 12.0, "prefill": 8.0}


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        part: what it belongs to, such as `decode`.
        case: what of it.
        implementation: by which.
        status: `measured`, `skipped` or `failed`.
        seconds: of one of what the case names: a load, a step of all rows, a prompt.
        spread: of the rounds' rates, from the largest to the smallest, over their median.
        tokens_per_s: of all rows together.
        experts: of a layer that a step goes through, of all rows together; the mean over layers and steps.
        nbytes: what is loaded, or of weights what a step reads.
        is_of_read: whether its bytes per second are to be compared with the device's ceiling.
        compile_s: what the first run took beside a later one.
        peak_bytes: of the device's memory, of all cases so far.
        estimated_s: what the case was thought to take, with all that it compiles.
        took_s: what it took.
        note: anything else; why it was skipped or failed.
    """

    part: str = ""
    case: str = ""
    implementation: str = ""
    status: str = "measured"
    seconds: float | None = None
    spread: float | None = None
    tokens_per_s: float | None = None
    experts: float | None = None
    nbytes: int = 0
    is_of_read: bool = True
    compile_s: float | None = None
    peak_bytes: int | None = None
    estimated_s: float = 0.0
    took_s: float = 0.0
    note: str = ""


class Skip(Exception):  # noqa: N818 (no error)
    """The case cannot run here; the text says why."""


def run_cases(cases: Iterable[tuple[str, str, Callable[[], Row]]], settings: dict[str, Any]) -> Iterator[Row]:
    """Runs cases, of which each is a row: measured, failed, or skipped where too little time is left.

    Prints what comes next, for gpu_model.py to hand on.

    Args:
        cases: of each its part, what of it, and what measures it.
        settings: `ends_at`, in seconds of `time.time`; `label`, what rows call the implementation; `is_quick`.
    """
    for part, case, call in cases:
        estimated_s = 5.0 if settings["is_quick"] else ESTIMATED_S[part]
        left_s = settings["ends_at"] - time.time()
        began = time.perf_counter()
        print(f"{settings['label']}: {part}: {case}: about {estimated_s:.0f} s of {left_s:.0f} s", flush=True)
        try:
            if left_s < estimated_s:
                raise Skip(f"{max(left_s, 0):.0f} s are left, and it may take {estimated_s:.0f} s")
            row = call()
        except Skip as reason:
            row = Row(status="skipped", note=str(reason))
        except Exception as error:  # the other cases are to run
            row = Row(status="failed", note=describe(error))
        took_s = time.perf_counter() - began
        yield dataclasses.replace(
            row, part=part, case=case, implementation=settings["label"], estimated_s=estimated_s, took_s=took_s
        )


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
