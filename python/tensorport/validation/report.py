"""What a validation found."""

import dataclasses
from pathlib import Path
from typing import Literal

from tensorport.reports import _Report

__all__ = ["LayerActivations", "Status", "ValidationCheck", "ValidationReport"]

Status = Literal["ok", "FAILED", "skipped"]


@dataclasses.dataclass(frozen=True, slots=True)
class ValidationCheck:
    """One question, and its answer.

    Attributes:
        name: what was looked at.
        status: `ok`, `FAILED`, or `skipped` where an earlier failure leaves nothing to look at.
        detail: what was measured, and the tolerance.
    """

    name: str
    status: Status
    detail: str


@dataclasses.dataclass(frozen=True, slots=True)
class LayerActivations:
    """The stream behind a part of the model, over all tokens of the prompt.

    Attributes:
        name: `embeddings`, `layer 0` and so on, `final norm`.
        rms: root of the mean square of the finite values.
        largest: largest magnitude of the finite values.
        nonfinite: NaNs and infinities.
        experts_used: experts that some token went through; None where there are none.
        experts: experts that there are; None where there are none.
    """

    name: str
    rms: float
    largest: float
    nonfinite: int
    experts_used: int | None
    experts: int | None

    def __str__(self) -> str:
        text = f"RMS {self.rms:.4g}, largest {self.largest:.4g}"
        if self.experts:
            text += f", {self.experts_used} of {self.experts} experts ({(self.experts_used or 0) / self.experts:.0%})"
        return text + (f", {self.nonfinite} NaN or infinite" if self.nonfinite else "")


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class ValidationReport(_Report):
    """What a validation found.

    Attributes:
        model: the checkpoint or tree.
        ok: True when there are no failures.
        failures: everything that is wrong.
        checks: what was looked at, in this order.
        layers: the activations of each layer; empty where the tensors do not fit the configuration.
        dtype: of the computation.
        tokens: rows and tokens of the prompt.
        seconds: wall time.
    """

    model: Path
    ok: bool
    failures: tuple[str, ...]
    checks: tuple[ValidationCheck, ...]
    layers: tuple[LayerActivations, ...]
    dtype: str
    tokens: tuple[int, int]
    seconds: float

    def _lines(self) -> list[tuple[str, str]]:
        rows, tokens = self.tokens
        lines = [
            ("model", str(self.model)),
            ("ok", "yes" if self.ok else "NO"),
            ("prompt", f"{rows} x {tokens} tokens, in {self.dtype}"),
        ]
        lines += [(check.name, f"{check.status}: {check.detail}") for check in self.checks]
        lines += [(layer.name, str(layer)) for layer in self.layers]
        lines.append(("seconds", f"{self.seconds:.2f}"))
        return lines + [("failure", failure) for failure in self.failures]
