"""Turns results of benchmarks/jax_vs_pytorch.py into tables in Markdown, and plots.

usage: python benchmarks/analyze.py RESULTS.jsonl... [--output FOLDER] [--format png] [--format svg]

Any number of files: what was measured on the same device, of the same model, with the same settings, makes a group
with tables of its own, over all rounds and files; other versions of a side are columns of their own. A figure is the
median of the rounds' figures.

Prints the tables. --output writes them to FOLDER/README.md, with plots beside it for light and dark pages; that needs
matplotlib. Exit code 1: a file has a line that is no record; nothing is written then.
"""

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parent))
from jax_vs_pytorch_records import Record, RecordError, read_records

__all__ = ["Group", "Series", "grouped", "markdown", "read_all", "slug"]

NAMES: Final = {"jax": "JAX", "pytorch": "PyTorch"}
LEADING: Final = {"jax": ("tensorport", "jax"), "pytorch": ("transformers", "torch")}
"""The versions that tell one column from another, where a side has several."""

WORKLOAD: Final = ("prompts", "max_prompt_tokens", "new_tokens", "batch_tokens", "temperature", "config")
"""Settings whose figures are not to be mixed, besides the model and its dtype."""


@dataclasses.dataclass(frozen=True)
class Series:
    """One side with one set of versions, in one group: a column.

    Attributes:
        side: `jax` or `pytorch`.
        label: its name in tables and plots.
        records: what was measured, of all rounds.
    """

    side: str
    label: str
    records: tuple[Record, ...]

    def of(self, measurement: str) -> list[dict[str, Any]]:
        """The values of each round."""
        return [record.values for record in self.records if record.measurement == measurement]

    def median(self, measurement: str, name: str) -> float | None:
        """Of all rounds; None where none has it."""
        return _median([values.get(name) for values in self.of(measurement)])

    def batches(self) -> dict[int, list[dict[str, Any]]]:
        """By number of rows the values of each round."""
        found: dict[int, list[dict[str, Any]]] = {}
        for values in self.of("batch"):
            found.setdefault(values["batch"], []).append(values)
        return dict(sorted(found.items()))

    def per_prompt(self) -> list[dict[str, Any]]:
        """By prompt, in the order of the first round: medians over rounds."""
        found: dict[str, list[dict[str, Any]]] = {}
        for values in self.of("prompts"):
            for prompt in values["per_prompt"]:
                found.setdefault(prompt["id"], []).append(prompt)
        return [
            {**rows[0], **{name: _median([row[name] for row in rows]) for name in ("first_token_s", "tokens_per_s")}}
            for rows in found.values()
        ]


@dataclasses.dataclass(frozen=True)
class Group:
    """What may be compared: one model with one workload on one device.

    Attributes:
        name: model, dtype, device and, where there are several workloads, what it is.
        series: columns, JAX first.
        agreement: of the tokens of both sides; the latest.
        absent: records of what could not be measured.
        records: all.
    """

    name: str
    series: tuple[Series, ...]
    agreement: Record | None
    absent: tuple[Record, ...]
    records: tuple[Record, ...]


def read_all(paths: Sequence[Path]) -> list[Record]:
    """The records of all files.

    Raises:
        RecordError: a line is no record; the message has the file and its line.
        OSError: the system refused.
    """
    return [record for path in paths for record in read_records(path)]


def grouped(records: Sequence[Record]) -> list[Group]:
    """Groups, as they are met. What has no device, for its side never ran, goes where its run went."""
    homes: dict[tuple[str, ...], tuple[str, ...]] = {}
    for record in records:
        if record.device is not None:
            homes.setdefault(_run_of(record), _key(record, record.device))
    found: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        key = homes.get(_run_of(record)) if record.device is None else _key(record, record.device)
        found.setdefault(key or _key(record, "no device"), []).append(record)
    names = [_name(key) for key in found]
    groups = []
    for name, members in zip(names, found.values(), strict=True):
        full = f"{name}, {_workload(members[0])}" if names.count(name) > 1 else name
        compared = [record for record in members if record.measurement == "agreement" and record.status == "measured"]
        absent = tuple(record for record in members if record.status != "measured")
        agreement = max(compared, key=lambda record: record.date, default=None)
        groups.append(Group(full, tuple(_series(members)), agreement, absent, tuple(members)))
    return groups


def _run_of(record: Record) -> tuple[str, ...]:
    return record.date, record.machine, record.settings["model"], record.settings["dtype"]


def _key(record: Record, device: str) -> tuple[str, ...]:
    settings = record.settings
    workload = [str(settings.get(name)) for name in WORKLOAD]
    return device, record.machine, settings["model"], settings["dtype"], *workload


def _name(key: tuple[str, ...]) -> str:
    device, machine, model, dtype, *_ = key
    return f"{model}, {dtype}, on {machine if device == 'cpu' else f'{device} ({machine})'}"


def _workload(record: Record) -> str:
    settings = record.settings
    longest = settings.get("max_prompt_tokens")
    parts = [
        f"{settings.get('prompts')} prompts" + (f" of {longest} tokens at most" if longest else ""),
        f"{settings.get('new_tokens')} new tokens",
        f"batches after {settings.get('batch_tokens')} tokens",
        "greedy" if not settings.get("temperature") else f"temperature {settings['temperature']:g}",
    ]
    return ", ".join(parts)


def _series(records: Sequence[Record]) -> Iterator[Series]:
    for side, name in NAMES.items():
        by_versions: dict[tuple[tuple[str, str], ...], list[Record]] = {}
        for record in records:
            if record.side == side and record.status == "measured":
                by_versions.setdefault(tuple(sorted(record.versions.items())), []).append(record)
        leading = [", ".join(f"{part} {dict(key).get(part)}" for part in LEADING[side]) for key in by_versions]
        for (key, members), told in zip(by_versions.items(), leading, strict=True):
            label = name
            if len(by_versions) > 1:
                # Where the leading ones are the same, the others differ.
                whole = ", ".join(f"{part} {version}" for part, version in key)
                label = f"{name} ({told if leading.count(told) == 1 else whole})"
            yield Series(side, label, tuple(members))


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def slug(number: int, group: Group) -> str:
    """How names of a group's files begin."""
    model = "".join(letter if letter.isalnum() else "-" for letter in group.records[0].settings["model"].lower())
    return f"{number}-{model}-{group.records[0].settings['dtype']}"


def show_seconds(value: float) -> str:
    """With a unit by which it has one to three digits before the point."""
    return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def show_bytes(value: float) -> str:
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"


def show_rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def markdown(groups: Sequence[Group], plots: dict[str, str] | None = None) -> str:
    """All tables.

    Args:
        groups: of :func:`grouped`.
        plots: by name of a group Markdown that shows its plots.
    """
    return "\n\n".join(_group_text(group, (plots or {}).get(group.name, "")) for group in groups) + "\n"


def _group_text(group: Group, plots: str) -> str:
    parts = [f"## {group.name}", _facts(group)]
    if group.series:
        parts += [_overview(group), "By class, one prompt at a time:", _classes(group)]
    if group.agreement is not None:
        parts += [_agreement_title(group.agreement), _agreement(group.agreement)]
    if group.absent:
        parts += ["Not measured:", _absent(group)]
    return "\n\n".join([*parts, plots] if plots else parts)


def _facts(group: Group) -> str:
    lines = [
        f"Date: {', '.join(sorted({record.date[:10] for record in group.records}))}. {_workload(group.records[0])}."
    ]
    for series in group.series:
        record = series.records[0]
        rounds = len({(member.date, member.round) for member in series.records})
        versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
        settings = record.settings
        counts = {"round": rounds, "warm-up": settings.get("warmups"), "thread": settings.get("threads")}
        how = [f"{count} {name}{'s' * (count != 1)}" for name, count in counts.items() if count is not None]
        how += [f"MXFP4 {settings['mxfp4']}"] if "mxfp4" in settings else []
        lines.append(f"{series.label}: {versions}; {', '.join(how)}.")
    if not all(record.settings["warmups_are_full"] for record in group.records):
        lines.append("**Fewer warm-ups than the rules ask for: the figures are not to be compared.**")
    if any(
        values["compiled"] for series in group.series for part in ("prompts", "batch") for values in series.of(part)
    ):
        lines.append("**Programs were compiled while it was measured: the figures are not to be compared.**")
    return "\n".join(f"- {line}" for line in lines)


def _overview(group: Group) -> str:
    rows: list[tuple[str, Callable[[float], str], list[float | None]]] = []

    def add(label: str, show: Callable[[float], str], measurement: str, name: str) -> None:
        rows.append((label, show, [series.median(measurement, name) for series in group.series]))

    add("load", show_seconds, "load", "seconds")
    add("weights in memory", show_bytes, "load", "weight_bytes")
    add("first calls beyond later ones", show_seconds, "compile", "seconds")
    add("programs compiled", show_rate, "compile", "programs")
    add("time to first token, median of prompts", show_seconds, "prompts", "first_token_s")
    add("tokens/s, one prompt, median", show_rate, "prompts", "tokens_per_s")
    for name, what, show in (("tokens_per_s", "tokens/s", show_rate), ("first_token_s", "first token", show_seconds)):
        for batch in sorted({batch for series in group.series for batch in series.batches()}):
            found = [_median([values[name] for values in series.batches().get(batch, [])]) for series in group.series]
            rows.append((f"{what}, batch of {batch}", show, found))
    add("peak anonymous memory", show_bytes, "memory", "anonymous_bytes")
    add("peak resident memory, mapped files too", show_bytes, "memory", "peak_rss_bytes")
    add("peak device memory", show_bytes, "memory", "device_peak_bytes")

    are_two = [series.side for series in group.series] == list(NAMES)
    header = ["", *(series.label for series in group.series), *(["JAX / PyTorch"] if are_two else [])]
    lines = []
    for label, show, found in rows:
        if all(value is None for value in found):
            continue
        cells = [label, *("-" if value is None else show(value) for value in found)]
        if are_two:
            one, other = found
            # First calls are of every prompt on one side, and of one on the other.
            are_alike = one is not None and other and not label.startswith("first calls")
            cells.append(f"{one / other:.3g}" if are_alike else "-")
        lines.append(cells)
    return _table(header, lines)


def _classes(group: Group) -> str:
    prompts = [series.per_prompt() for series in group.series]
    header = ["class", "prompts", "tokens of a prompt"]
    header += [f"first token, {series.label}" for series in group.series]
    header += [f"tokens/s, {series.label}" for series in group.series]
    lines = []
    for name in dict.fromkeys(prompt["class"] for rows in prompts for prompt in rows):
        members = [[prompt for prompt in rows if prompt["class"] == name] for rows in prompts]
        longest = max(members, key=len)
        lengths = sorted(prompt["prompt_tokens"] for prompt in longest)
        span = str(lengths[0]) if lengths[0] == lengths[-1] else f"{lengths[0]} to {lengths[-1]}"
        line = [name.replace("_", " "), str(len(longest)), span]
        for field, show in (("first_token_s", show_seconds), ("tokens_per_s", show_rate)):
            medians = [_median([prompt[field] for prompt in rows]) for rows in members]
            line += ["-" if value is None else show(value) for value in medians]
        lines.append(line)
    return _table(header, lines)


def agreement_of(prompts: Sequence[dict[str, Any]]) -> tuple[int, int, int]:
    """How many prompts have the same tokens to the end, part at a near-tie, and part elsewhere."""
    near = sum(prompt["is_near_tie"] is True for prompt in prompts)
    far = sum(prompt["is_near_tie"] is False for prompt in prompts)
    return len(prompts) - near - far, near, far


def _agreement_title(record: Record) -> str:
    return (
        "Greedy tokens of both sides. A near-tie: on the JAX side the two tokens' logits are at most "
        f"{record.values['near_tie']:.2g} of the largest logit apart."
    )


def _agreement(record: Record) -> str:
    prompts = record.values["per_prompt"]
    names = list(dict.fromkeys(prompt["class"] for prompt in prompts))
    lines = []
    for name in [*names, "all"]:
        members = [prompt for prompt in prompts if name in {prompt["class"], "all"}]
        same, near, far = agreement_of(members)
        prefix = statistics.median(prompt["same_tokens"] for prompt in members)
        new = max(prompt["new_tokens"] for prompt in members)
        gaps = [prompt["gap"] for prompt in members if prompt["gap"] is not None]
        gap = f"{max(gaps):.2g}" if gaps else "-"
        lines.append(
            [name.replace("_", " "), str(len(members)), str(same), str(near), str(far), f"{prefix:g} of {new}", gap]
        )
    header = ["class", "prompts", "same to the end", "part at a near-tie", "part elsewhere"]
    return _table([*header, "tokens before, median", "largest gap"], lines)


def _absent(group: Group) -> str:
    lines = [
        [NAMES.get(record.side, record.side), record.measurement, record.status, record.note.replace("|", "\\|")]
        for record in group.absent
    ]
    return _table(["side", "measurement", "status", "why"], lines)


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *lines])


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="files of jax_vs_pytorch.py")
    parser.add_argument("--output", type=Path, help="a folder for README.md and the plots")
    parser.add_argument("--format", action="append", choices=("png", "svg"), help="of plots; both by default")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_options(arguments)
    try:
        groups = grouped(read_all(options.results))
    except (RecordError, OSError) as fault:
        print(f"analyze.py: {fault}", file=sys.stderr)
        return 1
    print(markdown(groups), end="")
    if options.output:
        from analyze_plots import write_plots  # noqa: PLC0415 - tables alone need no matplotlib

        options.output.mkdir(parents=True, exist_ok=True)
        plots = {
            group.name: write_plots(group, options.output, slug(number, group), options.format or ["png", "svg"])
            for number, group in enumerate(groups, 1)
        }
        (options.output / "README.md").write_text(markdown(groups, plots), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
