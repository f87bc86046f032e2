"""The Python blocks of the documentation run as they stand, and print what the text blocks behind them say.

The blocks of a page run from top to bottom in one namespace, in a process of their own, in a temporary folder with the
checkpoints that the pages name, on disk and on a hub on 127.0.0.1, with warnings as errors. A block behind
`<!-- not run: reason -->` is skipped.
"""

import dataclasses
import doctest
import functools
import itertools
import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_hub import serving

ROOT = Path(__file__).parents[2]

# Pages, and the devices that JAX has there.
PAGES = {
    "README.md": 2,
    "docs/conversion.md": 1,
    "docs/extending.md": 1,
    "docs/formats.md": 1,
    "docs/getting-started.md": 1,
    "docs/gpt-oss.md": 1,
    "docs/hardware.md": 1,
    "docs/hub.md": 1,
    "docs/loading.md": 8,
    "docs/mxfp4.md": 1,
    "docs/mxfp4-training.md": 1,
    "docs/nnx.md": 8,
    "docs/security.md": 1,
    "docs/text.md": 1,
}

# Pages that run the model: fewer layers compile faster.
RUNNING = {"README.md", "docs/gpt-oss.md"}

Results = list[dict[str, str]]
"""What each block of a page printed, and how it failed; none for blocks that were not reached."""

TIMEOUT_S = 300
"""For pages that take some ten seconds."""

# Arguments: a file with blocks as JSON, a file for what came of each: what it printed and, if it failed, its traceback.
# Blocks behind one that failed are not run.
RUNNER = """
import contextlib, io, json, sys, traceback
from pathlib import Path
results, namespace = [], {"__name__": "__main__"}
for block in json.loads(Path(sys.argv[1]).read_text("utf-8")):
    printed, fault = io.StringIO(), None
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(block["code"], block["file"], "exec"), namespace)
    except Exception:
        fault = traceback.format_exc()
    results.append({"printed": printed.getvalue(), "fault": fault})
    if fault:
        break
Path(sys.argv[2]).write_text(json.dumps(results), "utf-8")
"""

FENCED = re.compile(
    r"(?:<!-- not run: (?P<skip>[^\n]*?) -->\n)?```python\n(?P<code>.*?)```\n(?:\n```text\n(?P<printed>.*?)```\n)?",
    re.DOTALL,
)


@dataclasses.dataclass(frozen=True)
class Block:
    """A Python block of a page; `printed` is what the page says that it prints."""

    page: str
    line: int
    code: str
    printed: str | None
    skip: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: str) -> list[Block]:
    text = (ROOT / page).read_text("utf-8")
    return [
        Block(page, text.count("\n", 0, match.start("code")), match["code"], match["printed"], match["skip"])
        for match in FENCED.finditer(text)
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


@pytest.fixture(scope="module")
def results_of(
    tiny: Path, two_layers: Path, golden_original: Path, minilm: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Results]]:
    """Runs a page when it is first asked for."""
    with serving() as hub:
        files = {path.name: path.read_bytes() for path in tiny.iterdir()}
        original = {f"original/{path.name}": path.read_bytes() for path in golden_original.iterdir() if path.is_file()}
        hub.add("openai/gpt-oss-20b", files | original)

        @functools.cache
        def of(page: str) -> Results:
            model = two_layers if page in RUNNING else tiny
            return run(page, model, minilm, hub.endpoint, tmp_path_factory.mktemp("page"))

        yield of


def run(page: str, tiny: Path, minilm: Path, hub: str, folder: Path) -> Results:
    for name, source in {"gpt-oss-20b": tiny, "gpt-oss-tiny": tiny, "all-MiniLM-L6-v2": minilm}.items():
        (folder / name).symlink_to(source, target_is_directory=True)
    to_run = [
        {"file": str(ROOT / page), "code": "\n" * block.line + block.code}
        for block in blocks_of(page)
        if block.skip is None
    ]
    (folder / "blocks.json").write_text(json.dumps(to_run), "utf-8")
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(PAGES[page]),
        "HF_ENDPOINT": hub,
        "HF_HOME": str(folder / "hf-home"),
    }
    command = [sys.executable, "-W", "error", "-c", RUNNER, "blocks.json", "results.json"]
    job = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert job.returncode == 0, job.stderr
    results: Results = json.loads((folder / "results.json").read_text("utf-8"))
    return results


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_the_block_runs_and_prints_what_the_page_says(block: Block, results_of: Callable[[str], Results]) -> None:
    if block.skip is not None:
        pytest.skip(block.skip)
    before = [other for other in BLOCKS if other.page == block.page and other.line < block.line and other.skip is None]
    results = results_of(block.page)
    assert len(results) > len(before), "a block before it failed"
    result = results[len(before)]
    assert result["fault"] is None, result["fault"]
    if block.printed is not None:
        options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        is_same = doctest.OutputChecker().check_output(block.printed, result["printed"], options)
        assert is_same, f"printed:\n{result['printed']}expected:\n{block.printed}"


def test_every_python_block_of_the_pages_is_found() -> None:
    for page in PAGES:
        assert (
            len(blocks_of(page)) == len(re.findall(r"^```python$", (ROOT / page).read_text("utf-8"), re.MULTILINE)) > 0
        )


def pages_with_links() -> list[Path]:
    return [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "notebooks").rglob("*.md")]


def anchors_of(page: Path) -> set[str]:
    """What GitHub makes of headings: words with hyphens, and a number from the second of the same on."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    anchors: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        name = re.sub(r"[^\w -]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)).lower().replace(" ", "-")
        numbered = (f"{name}-{number}" for number in itertools.count(1))
        anchors.add(name if name not in anchors else next(other for other in numbered if other not in anchors))
    return anchors


@pytest.mark.parametrize("page", pages_with_links(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    text = page.read_text("utf-8")
    links = re.findall(r"\]\(([^)#: ]*)(?:#([^) ]*))?\)", text)
    links += [(target, "") for target in re.findall(r"(?:src|srcset|href)=\"([^\":]+)\"", text)]
    for target, anchor in links:
        linked = page.parent / target if target else page
        assert linked.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors_of(linked), f"{page.name}: {target}#{anchor}"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_picture_is_what_its_script_draws(theme: str) -> None:
    script = runpy.run_path(str(ROOT / "tools" / "pipeline_picture.py"))
    drawn = (ROOT / "docs" / "pictures" / f"pipeline-{theme}.svg").read_text("utf-8")
    assert drawn == script["picture"](script["THEMES"][theme]), "run `python tools/pipeline_picture.py`"


def test_files_that_contributors_are_told_of_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8").replace("NAME/", "gpt_oss/").replace("OP/", "linear/")
    # Rules of what is there, in the words of the page: a name in capitals is one that is to be made.
    paths = {path for path in re.findall(r"`([\w./]+/[\w./]*)`", text) if not re.search(r"[A-Z]{4}", path)}
    roots = [ROOT, ROOT / "python" / "tensorport"]
    assert len(paths) > 20
    assert not {path for path in paths if not any((root / path).exists() for root in roots)}


def test_the_readme_leads_to_every_page() -> None:
    text = "".join((ROOT / page).read_text("utf-8") for page in ("README.md", "CONTRIBUTING.md", "SECURITY.md"))
    missing = [page.name for page in (ROOT / "docs").glob("*.md") if f"(docs/{page.name}" not in text]
    assert not missing
