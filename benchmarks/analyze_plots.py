"""The plots of benchmarks/analyze.py: one figure for each question, for light and for dark pages.

Colours are of Okabe and Ito's palette (https://jfly.uni-koeln.de/color/), which people who are colour-blind tell apart;
markers, lines and hatches differ too, so that nothing hangs on colour.
"""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
import numpy as np
from analyze import NAMES, Group, Series, agreement_of, show_bytes, show_rate
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

__all__ = ["DARK", "LIGHT", "PLOTS", "Theme", "plot", "write_plots"]


@dataclasses.dataclass(frozen=True)
class Theme:
    """Colours of a page and of what is drawn on it."""

    name: str
    page: str
    text: str
    grid: str
    sides: dict[str, tuple[str, ...]]
    same: str
    near: str
    far: str


LIGHT: Final = Theme(
    "light",
    page="#ffffff",
    text="#24292f",
    grid="#d8dee4",
    sides={"jax": ("#0072B2", "#56B4E9", "#003F63"), "pytorch": ("#D55E00", "#E69F00", "#7A3600")},
    same="#009E73",
    near="#E69F00",
    far="#8C2D68",
)
DARK: Final = Theme(
    "dark",
    page="#0d1117",
    text="#e6edf3",
    grid="#30363d",
    sides={"jax": ("#56B4E9", "#0072B2", "#A9D9F5"), "pytorch": ("#E69F00", "#D55E00", "#F5CF80")},
    same="#009E73",
    near="#F0E442",
    far="#CC79A7",
)
MARKERS: Final = {"jax": ("o", "^", "v"), "pytorch": ("s", "D", "P")}
LINES: Final = {"jax": "-", "pytorch": "--"}
TITLE_AT: Final = {"loc": "left", "fontsize": 12, "fontweight": "bold"}


def plot(kind: str, group: Group, theme: Theme = LIGHT) -> Figure | None:
    """A figure, which no window belongs to; None where nothing was measured that it would show.

    Args:
        kind: of :data:`PLOTS`.
        group: what was measured.
        theme: of the page that it is for.
    """
    settings = {
        "figure.facecolor": theme.page,
        "axes.facecolor": theme.page,
        "savefig.facecolor": theme.page,
        "axes.edgecolor": theme.text,
        "axes.labelcolor": theme.text,
        "text.color": theme.text,
        "xtick.color": theme.text,
        "ytick.color": theme.text,
        "grid.color": theme.grid,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "hatch.linewidth": 0.8,
    }
    with mpl.rc_context(settings):
        figure = Figure(figsize=(8, 4.6), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        if not PLOTS[kind](axes, group, theme):
            return None
        figure.supxlabel(group.name, fontsize=8, color=theme.text, alpha=0.8)
        return figure


def _styles(group: Group, theme: Theme) -> list[tuple[Series, str, str]]:
    """Each column with its colour and marker."""
    count: dict[str, int] = {}
    styled = []
    for series in group.series:
        index = count.get(series.side, 0)
        count[series.side] = index + 1
        colors, markers = theme.sides[series.side], MARKERS[series.side]
        styled.append((series, colors[index % len(colors)], markers[index % len(markers)]))
    return styled


def _batches(axes: Any, group: Group, theme: Theme) -> bool:
    """Tokens per second of all rows by their number, with all that was measured between thin lines."""
    sizes: set[int] = set()
    top = 0.0
    for series, color, marker in _styles(group, theme):
        batches = series.batches()
        if not batches:
            continue
        sizes |= set(batches)
        medians = [statistics.median(values["tokens_per_s"] for values in rounds) for rounds in batches.values()]
        samples = [
            [one["tokens_per_s"] for values in rounds for one in values["samples"]] for rounds in batches.values()
        ]
        spread = [[max(m - min(s), 0) for m, s in zip(medians, samples, strict=True)]]
        spread += [[max(max(s) - m, 0) for m, s in zip(medians, samples, strict=True)]]
        top = max(top, *(max(sample) for sample in samples))
        axes.errorbar(
            list(batches),
            medians,
            yerr=spread,
            color=color,
            marker=marker,
            markersize=7,
            linestyle=LINES[series.side],
            linewidth=2,
            elinewidth=1,
            capsize=3,
            label=series.label,
        )
        for size, median, sample in zip(batches, medians, samples, strict=True):
            place = {"textcoords": "offset points", "xytext": (0, 7), "ha": "center", "fontsize": 9}
            axes.annotate(show_rate(median), (size, max(median, *sample)), color=theme.text, **place)
    if not sizes:
        return False
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(sizes), [str(size) for size in sorted(sizes)])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(0, 1.15 * top)
    axes.margins(x=0.08)
    axes.set(xlabel="batch (prompts at once)", ylabel="tokens/s, all prompts together")
    axes.set_title("Tokens per second by batch", **TITLE_AT)
    _legend(axes, "upper left")
    return True


def _first_token(axes: Any, group: Group, theme: Theme) -> bool:
    """Time to first token by length of the prompt, a point for each prompt."""
    is_empty = True
    for series, color, marker in _styles(group, theme):
        prompts = series.per_prompt()
        if prompts:
            is_empty = False
            axes.plot(
                [prompt["prompt_tokens"] for prompt in prompts],
                [1e3 * prompt["first_token_s"] for prompt in prompts],
                linestyle="",
                marker=marker,
                markersize=6,
                color=color,
                markeredgecolor=theme.page,
                markeredgewidth=0.5,
                alpha=0.85,
                label=series.label,
            )
    if is_empty:
        return False
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    # 1, 2 and 5 of each power of ten, written out.
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set(xlabel="tokens of the prompt", ylabel="time to first token (ms)")
    axes.set_title("Time to first token, one prompt at a time", **TITLE_AT)
    _legend(axes, "upper left")
    return True


MEMORY: Final = (
    ("load", "weight_bytes", "weights"),
    ("memory", "anonymous_bytes", "peak, anonymous"),
    ("memory", "peak_rss_bytes", "peak, resident"),
    ("memory", "device_peak_bytes", "peak, device"),
)


def _memory(axes: Any, group: Group, theme: Theme) -> bool:
    """Bytes of the weights and peaks of memory, as bars."""
    kinds = [kind for kind in MEMORY if any(series.median(*kind[:2]) is not None for series in group.series)]
    if not kinds:
        return False
    styles = _styles(group, theme)
    height = 0.8 / len(styles)
    largest = 0.0
    for index, (series, color, _) in enumerate(styles):
        found = [series.median(measurement, name) for measurement, name, _ in kinds]
        places = [row + (index - (len(styles) - 1) / 2) * height for row in range(len(kinds))]
        bars = axes.barh(
            places,
            [(value or 0) / 1e9 for value in found],
            height=0.9 * height,
            color=color,
            hatch="" if series.side == "jax" else "//",
            edgecolor=theme.page,
            linewidth=0,
            label=series.label,
        )
        labels = ["not told" if value is None else show_bytes(value) for value in found]
        axes.bar_label(bars, labels, padding=4, fontsize=9, color=theme.text)
        largest = max(largest, *((value or 0) / 1e9 for value in found))
    axes.set_yticks(range(len(kinds)), [label for *_, label in kinds])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.18 * largest)
    axes.grid(visible=False, axis="y")
    axes.set(xlabel="memory (GB)")
    axes.set_title("Memory", **TITLE_AT)
    _legend(axes, "best")
    return True


def _agreement(axes: Any, group: Group, theme: Theme) -> bool:
    """By class how many prompts have the same tokens to the end, and where the others part."""
    if group.agreement is None:
        return False
    prompts = group.agreement.values["per_prompt"]
    names = list(dict.fromkeys(prompt["class"] for prompt in prompts))
    counts = np.array([agreement_of([prompt for prompt in prompts if prompt["class"] == name]) for name in names])
    labels = ("same to the end", "part at a near-tie", "part elsewhere")
    left = np.zeros(len(names))
    for column, (label, color, hatch) in enumerate(
        zip(labels, (theme.same, theme.near, theme.far), ("", "//", "xx"), strict=True)
    ):
        bars = axes.barh(
            range(len(names)),
            counts[:, column],
            left=left,
            height=0.65,
            color=color,
            hatch=hatch,
            edgecolor=theme.page,
            linewidth=0,
            label=label,
        )
        # On a card, for a number on hatches is hard to read.
        card = {"facecolor": theme.page, "edgecolor": "none", "boxstyle": "round,pad=0.2"}
        shown = [str(count) if count else "" for count in counts[:, column]]
        for text in axes.bar_label(bars, shown, label_type="center", fontsize=9, color=theme.text):
            if text.get_text():
                text.set_bbox(card)
        left += counts[:, column]
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    new = max(prompt["new_tokens"] for prompt in prompts)
    axes.set(xlabel=f"prompts ({new} greedy tokens each)")
    axes.set_title(f"Tokens of {NAMES['jax']} and {NAMES['pytorch']}", **TITLE_AT)
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, -0.3), ncols=3)
    return True


def _legend(axes: Any, place: str) -> None:
    axes.legend(frameon=False, loc=place)


PLOTS: Final[dict[str, Callable[[Any, Group, Theme], bool]]] = {
    "tokens-per-second": _batches,
    "time-to-first-token": _first_token,
    "memory": _memory,
    "agreement": _agreement,
}
"""By name what draws it; false where there is nothing to draw."""


def write_plots(group: Group, folder: Path, stem: str, formats: Sequence[str]) -> str:
    """Writes all plots of a group; returns Markdown that shows them, light or dark as the page is."""
    shown = []
    for kind in PLOTS:
        names = {}
        for theme in (LIGHT, DARK):
            figure = plot(kind, group, theme)
            if figure is None:
                continue
            for ending in formats:
                names[theme.name] = f"{stem}-{kind}-{theme.name}.{ending}"
                # Without a date, so that two runs write the same.
                metadata = {"Date": None} if ending == "svg" else None
                with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": stem}):
                    figure.savefig(folder / names[theme.name], dpi=150, metadata=metadata)
        if names:
            shown.append(
                f'<picture><source media="(prefers-color-scheme: dark)" srcset="{names["dark"]}">'
                f'<img alt="{kind.replace("-", " ")}" src="{names["light"]}"></picture>'
            )
    return "\n\n".join(shown)
