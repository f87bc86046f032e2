"""Brings notebooks into the form in which they are stored: no outputs, no traces of an editor, one spelling of JSON.

python tools/clean_notebooks.py                    # those in notebooks/ and its folders
python tools/clean_notebooks.py notebooks/a.ipynb
"""

import json
import sys
from pathlib import Path
from typing import Any

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"

METADATA: dict[str, Any] = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
"""Of every notebook: no version of Python, no state of widgets."""


def stored() -> list[Path]:
    """All notebooks, but for the copies that an editor keeps."""
    return sorted(path for path in NOTEBOOKS.rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)


def clean(text: str) -> str:
    """A notebook as it is stored."""
    notebook = json.loads(text)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell |= {"outputs": [], "execution_count": None}
        cell.pop("attachments", None)
        tags = cell["metadata"].get("tags")
        cell["metadata"] = {"tags": tags} if tags else {}
    notebook |= {"metadata": METADATA, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def main(arguments: list[str]) -> None:
    """Rewrites those that differ, and names them."""
    for path in map(Path, arguments) if arguments else stored():
        text = path.read_text("utf-8")
        if text != clean(text):
            path.write_text(clean(text), encoding="utf-8", newline="\n")
            print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
