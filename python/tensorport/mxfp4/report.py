"""QuantizationReport: the errors of many tensors as a table, as JSON and as a plot."""

import dataclasses
import html
import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from tensorport.mxfp4.error import QuantizationError
from tensorport.reports import _Report, grouped, human_bytes, printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["QuantizationReport"]

_MAX_ROWS: Final = 50  # of the table; all are in `tensors`, in JSON and in the plot

_COLUMNS: Final = ("tensor", "shape", "dtype", "SQNR dB", "MSE", "max error", "size", "smaller")


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class QuantizationReport(_Report):
    """What quantizing many tensors lost and saved.

    Tables and plots have the worst tensor, that of the lowest SQNR, first; `tensors` has them in the order of the tree.

    Attributes:
        tensors: the quantized tensors by name.
        warnings: what the user should know, such as matrices that stay as they are.
    """

    tensors: Mapping[str, QuantizationError]
    warnings: tuple[str, ...] = ()

    @property
    def source_bytes(self) -> int:
        """Size of the quantized tensors before."""
        return sum(error.source_bytes for error in self.tensors.values())

    @property
    def quantized_bytes(self) -> int:
        """Size of their codes and scales."""
        return sum(error.quantized_bytes for error in self.tensors.values())

    @property
    def compression(self) -> float:
        """How many times smaller they are together."""
        return self.source_bytes / self.quantized_bytes if self.quantized_bytes else 1.0

    def worst_first(self) -> list[tuple[str, QuantizationError]]:
        """Names and errors by ascending SQNR; those without values to compare last."""

        def rank(item: tuple[str, QuantizationError]) -> tuple[bool, float]:
            return math.isnan(item[1].sqnr_db), item[1].sqnr_db

        return sorted(self.tensors.items(), key=rank)

    def to_json(self) -> str:
        """The report as JSON: every attribute, sizes and compression; null in place of NaN and infinities."""
        fields = {
            "tensors": {name: error._plain() for name, error in self.tensors.items()},
            "warnings": list(self.warnings),
            "source_bytes": self.source_bytes,
            "quantized_bytes": self.quantized_bytes,
            "compression": self.compression,
        }
        return json.dumps(fields, indent=2, allow_nan=False)

    def _lines(self) -> list[tuple[str, str]]:
        sizes = f"{human_bytes(self.source_bytes)} -> {human_bytes(self.quantized_bytes)}"
        lines = [("quantized", f"{len(self.tensors)} tensors, {sizes}, {self.compression:.2f}x smaller")]
        nonfinite = {name: error.nonfinite for name, error in self.tensors.items() if error.nonfinite}
        lines += [("NaN or infinite", f"{name}: {grouped(count)} values") for name, count in nonfinite.items()]
        return lines + [("warning", warning) for warning in self.warnings]

    def _rows(self) -> list[tuple[str, ...]]:
        return [
            (
                printable(name),
                str(list(error.shape)),
                error.dtype,
                f"{error.sqnr_db:.2f}",
                f"{error.mse:.2e}",
                f"{error.max_error:.2e}",
                human_bytes(error.quantized_bytes),
                f"{error.compression:.2f}x",
            )
            for name, error in self.worst_first()[:_MAX_ROWS]
        ]

    def _hidden(self) -> str | None:
        more = len(self.tensors) - _MAX_ROWS
        return f"{more} better ones are not shown" if more > 0 else None

    def __repr__(self) -> str:
        lines = [_Report.__repr__(self)]
        rows = [_COLUMNS, *self._rows()] if self.tensors else []
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            texts = (
                text.ljust(n) if i < 3 else text.rjust(n) for i, (text, n) in enumerate(zip(row, widths, strict=True))
            )
            lines.append("  " + "  ".join(texts).rstrip())
        if hidden := self._hidden():
            lines.append(f"  ... {hidden}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        def row(tag: str, texts: tuple[str, ...]) -> str:
            return f"<tr>{''.join(f'<{tag}>{html.escape(text)}</{tag}>' for text in texts)}</tr>"

        table = row("th", _COLUMNS) + "".join(row("td", texts) for texts in self._rows())
        hidden = f"<p>... {self._hidden()}</p>" if self._hidden() else ""
        return f"{_Report._repr_html_(self)}<table>{table}</table>{hidden}"

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draws the SQNR of every tensor as a bar, the worst on top, with the size of codes and scales beside it.

        Args:
            ax: matplotlib's Axes to draw on; a new figure by default, as high as the bars need.

        Returns:
            The Axes.

        Raises:
            ImportError: matplotlib is not installed.
        """
        items = self.worst_first()
        if ax is None:
            try:
                from matplotlib import pyplot as plt  # noqa: PLC0415 - an extra
            except ImportError as fault:
                message = "QuantizationReport.plot needs matplotlib: pip install 'tensorport[notebook]'"
                raise ImportError(message) from fault
            _, ax = plt.subplots(figsize=(9, 1.2 + 0.28 * len(items)), layout="constrained")
        finite = [error.sqnr_db for _, error in items if math.isfinite(error.sqnr_db)]
        longest = max([*finite, 1.0])
        # A tensor that lost nothing has no finite SQNR: its bar is as long as the longest, and says so.
        lengths = [longest if error.sqnr_db == math.inf else _finite(error.sqnr_db) for _, error in items]
        bars = ax.barh(range(len(items)), lengths)
        labels = [_bar_label(error) for _, error in items]
        ax.bar_label(bars, labels, padding=3, fontsize="small")
        # A dollar sign would start a formula.
        ax.set_yticks(range(len(items)), [printable(name).replace("$", r"\$") for name, _ in items])
        ax.invert_yaxis()
        ax.margins(x=0.35)  # for the labels
        ax.set_xlabel("SQNR (dB)")
        sizes = f"{human_bytes(self.source_bytes)} -> {human_bytes(self.quantized_bytes)}"
        ax.set_title(f"MXFP4: {sizes}, {self.compression:.2f}x smaller")
        return ax


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def _bar_label(error: QuantizationError) -> str:
    if math.isnan(error.sqnr_db):
        told = "nothing to compare"
    else:
        told = "lossless" if error.sqnr_db == math.inf else f"{error.sqnr_db:.1f} dB"
    return f"{told}, {human_bytes(error.quantized_bytes)}"
