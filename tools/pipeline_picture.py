"""Draws docs/pictures/pipeline-light.svg and pipeline-dark.svg: what goes in, what comes out."""

from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

FOLDER = Path(__file__).parents[1] / "docs" / "pictures"
WIDTH, HEIGHT = 960, 400
FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"
MONO = "ui-monospace, 'SF Mono', Menlo, 'DejaVu Sans Mono', monospace"


class Colours(NamedTuple):
    """One theme; backgrounds are those of the page."""

    text: str
    quiet: str
    line: str
    box: str
    core: str
    core_line: str


# Text stands out from its box by at least 4.5 to 1, as WCAG 2 asks for (level AA).
THEMES = {
    "light": Colours("#1f2328", "#57606a", "#8c959f", "#f6f8fa", "#ddf4ff", "#0969da"),
    "dark": Colours("#e6edf3", "#9aa4af", "#6e7681", "#161b22", "#0c2d4d", "#58a6ff"),
}


class Box(NamedTuple):
    """A box with a title, in code or in words, and lines below it."""

    x: int
    y: int
    width: int
    height: int
    title: str
    lines: tuple[str, ...]
    is_code: bool = False
    is_core: bool = False


SOURCES = (
    Box(12, 24, 248, 92, "safetensors", ("a file, or shards and an index,", "of all 22 dtypes")),
    Box(12, 154, 248, 92, "a repository of a hub", ("openai/gpt-oss-20b,", "converted while it comes")),
    Box(12, 284, 248, 92, "files of others", ("Flax msgpack, pickle, Orbax,", "and converted trees")),
)
CORE = Box(
    350,
    84,
    210,
    232,
    "Rust core",
    (
        "strict about every header",
        "a plan, the same each time",
        "all cores, bounded memory",
        "every byte hashed",
        "goes on after a kill",
    ),
    is_core=True,
)
RESULTS = (
    Box(
        668,
        24,
        280,
        92,
        "convert()",
        ("npy, safetensors, msgpack, pickle,", "Orbax; with a manifest, verified"),
        is_code=True,
    ),
    Box(
        668,
        154,
        280,
        92,
        "load_params()",
        ("sharded jax.Arrays in your tree,", "MXFP4 weights still at 4 bits"),
        is_code=True,
    ),
    Box(
        668,
        284,
        280,
        92,
        "load_model()",
        ("gpt-oss from prompt to text, by", "native, XLA and Pallas kernels"),
        is_code=True,
    ),
)


def text(
    x: float,
    y: float,
    content: str,
    fill: str,
    *,
    size: int = 14,
    weight: int = 400,
    anchor: str = "middle",
    font: str = FONT,
) -> str:
    """A line of text."""
    return (
        f'<text x="{x:g}" y="{y:g}" fill="{fill}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" '
        f'font-family="{font}">{escape(content)}</text>'
    )


def drawn(box: Box, colours: Colours) -> list[str]:
    """A box and what is in it, centred."""
    fill, line = (colours.core, colours.core_line) if box.is_core else (colours.box, colours.line)
    middle = box.x + box.width / 2
    step = 30 if box.is_core else 20
    # Half the height of a letter below the middle of all lines.
    first = box.y + (box.height - 24 - (len(box.lines) - 1) * step) / 2 + 6
    parts = [
        f'<rect x="{box.x}" y="{box.y}" width="{box.width}" height="{box.height}" rx="10" '
        f'fill="{fill}" stroke="{line}" stroke-width="1.5"/>',
        text(middle, first, box.title, colours.text, size=16, weight=600, font=MONO if box.is_code else FONT),
    ]
    for number, content in enumerate(box.lines):
        parts.append(text(middle, first + 24 + number * step, content, colours.quiet, size=13))
    return parts


def arrow(points: str, colours: Colours) -> str:
    """A line through points that ends in a head."""
    return f'<path d="{points}" fill="none" stroke="{colours.core_line}" stroke-width="2" marker-end="url(#head)"/>'


def picture(colours: Colours) -> str:
    """The whole picture."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'role="img" aria-labelledby="title">',
        '<title id="title">Checkpoints go through the Rust core, and become files, arrays in JAX, and text</title>',
        '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 L10 5 L0 10 z" fill="{colours.core_line}"/></marker></defs>',
    ]
    left, right = CORE.x, CORE.x + CORE.width
    centre = CORE.y + CORE.height / 2
    for box, entry in zip(SOURCES, (centre - 50, centre, centre + 50), strict=True):
        begin, y = box.x + box.width, box.y + box.height / 2
        parts.append(arrow(f"M{begin} {y:g} C{begin + 50} {y:g} {left - 50} {entry:g} {left - 3} {entry:g}", colours))
    for box, leave in zip(RESULTS[:2], (centre - 50, centre), strict=True):
        y = box.y + box.height / 2
        parts.append(arrow(f"M{right} {leave:g} C{right + 50} {leave:g} {box.x - 50} {y:g} {box.x - 3} {y:g}", colours))
    # Files are mapped by load_params, and arrays are what a model runs on.
    middle = RESULTS[0].x + 56
    for above, below, words in zip(
        RESULTS, RESULTS[1:], ("mapped, without a copy", "computed with as they are"), strict=False
    ):
        bottom = above.y + above.height
        parts.append(arrow(f"M{middle:g} {bottom} L{middle:g} {below.y - 3}", colours))
        parts.append(text(middle + 10, (bottom + below.y) / 2 + 4, words, colours.quiet, size=12, anchor="start"))
    for box in (*SOURCES, CORE, *RESULTS):
        parts += drawn(box, colours)
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    for name, colours in THEMES.items():
        (FOLDER / f"pipeline-{name}.svg").write_text(picture(colours), "utf-8")


if __name__ == "__main__":
    main()
