"""Writes docs/api.md: the public names of the package with their signatures and docstrings.

Reads the sources and imports nothing of them, so that it needs no extension and no JAX. Public is what stands in the
`__all__` of the modules below; where a name comes from, their imports say.
"""

import ast
import functools
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "python"
PAGE = ROOT / "docs" / "api.md"
MODULES = (
    "tensorport",
    "tensorport.mxfp4",
    "tensorport.nnx",
    "tensorport.kernels",
    "tensorport.models",
    "tensorport.models.gpt_oss",
    "tensorport.text",
)
WIDTH = 110

# A section of a docstring in Google's style.
SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Yields|Source):(?: (.*))?")
Definition = ast.FunctionDef | ast.ClassDef


def file_of(module: str) -> Path:
    """The source of a module; of the extension its stub."""
    path = SOURCES.joinpath(*module.split("."))
    candidates = path / "__init__.py", path.with_suffix(".py"), path.with_suffix(".pyi")
    return next(file for file in candidates if file.is_file())


@functools.cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(file_of(module).read_text("utf-8"))


def is_module(name: str) -> bool:
    path = SOURCES.joinpath(*name.split("."))
    return (path / "__init__.py").is_file()


def public_names(module: str) -> list[str]:
    """The module's `__all__`, without the modules in it, which have sections of their own."""
    for statement in tree_of(module).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__":
            names: list[str] = ast.literal_eval(statement.value)
            return sorted((name for name in names if not is_module(f"{module}.{name}")), key=str.lower)
    raise ValueError(f"{module}: found no __all__")


def home_of(module: str, name: str) -> str:
    """The module that defines a name, along the imports."""
    for statement in ast.walk(tree_of(module)):
        if isinstance(statement, ast.ImportFrom) and statement.module and statement.module.startswith("tensorport"):
            for alias in statement.names:
                if (alias.asname or alias.name) == name:
                    return home_of(statement.module, alias.name)
    return module


def definition_of(module: str, name: str) -> Iterator[str]:
    """The Markdown of one name."""
    home = home_of(module, name)
    earlier = next(other for other in MODULES if name in public_names(other) and home_of(other, name) == home)
    if earlier != module:
        yield f"### `{module}.{name}`"
        yield f"The same as [`{earlier}.{name}`](#{anchor(f'{earlier}.{name}')})."
        return
    body = tree_of(home).body
    for statement, following in zip(body, [*body[1:], None], strict=True):
        if isinstance(statement, ast.FunctionDef) and statement.name == name and not is_overload(statement):
            yield from function(f"{module}.{name}", statement, level=3)
            return
        if isinstance(statement, ast.ClassDef) and statement.name == name:
            yield from class_(f"{module}.{name}", statement)
            return
        if isinstance(statement, ast.AnnAssign | ast.Assign):
            target = statement.target if isinstance(statement, ast.AnnAssign) else statement.targets[0]
            if ast.unparse(target) == name:
                yield from constant(f"{module}.{name}", statement, following)
                return
    raise ValueError(f"{module}.{name}: found no definition in {home}")


def is_overload(node: ast.FunctionDef) -> bool:
    return any(ast.unparse(decorator).endswith("overload") for decorator in node.decorator_list)


def anchor(heading: str) -> str:
    """As GitHub makes it of a heading."""
    return heading.replace(".", "").lower()


def constant(name: str, statement: ast.stmt, following: ast.stmt | None) -> Iterator[str]:
    yield f"### `{name}`"
    yield code(ast.unparse(statement))
    if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
        yield from prose(str(following.value.value))


def function(name: str, node: ast.FunctionDef, level: int) -> Iterator[str]:
    yield f"{'#' * level} `{name}`"
    decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
    is_property = bool(decorators & {"property", "functools.cached_property"})
    if is_property:
        yield code(f"{node.name}: {ast.unparse(node.returns) if node.returns else 'Any'}  # a property")
    else:
        kind = "@classmethod\n" if "classmethod" in decorators else ""
        yield code(kind + signature(node))
    yield from prose(ast.get_docstring(node) or "")


def class_(name: str, node: ast.ClassDef) -> Iterator[str]:
    yield f"### `{name}`"
    methods = [statement for statement in node.body if isinstance(statement, ast.FunctionDef)]
    made_by = next((method for method in methods if method.name == "__init__"), None)
    bases = [base for base in map(ast.unparse, node.bases) if not base.startswith(("Mapping", "Iterator", "object"))]
    head = f"class {node.name}" + (f"({', '.join(bases)})" if bases else "")
    lines = [head]
    if made_by is not None:
        call = signature(made_by).removeprefix("def __init__").removesuffix(" -> None")
        lines.append(node.name + call)
    yield code("\n\n".join(lines))
    yield from prose(ast.get_docstring(node) or "")
    if made_by is not None and (text := ast.get_docstring(made_by)):
        yield from prose(text)
    for method in methods:
        is_shown = not method.name.startswith("_") or method.name == "__call__"
        if is_shown and not is_overload(method) and ast.get_docstring(method):
            yield from function(f"{node.name}.{method.name}", method, level=4)


def signature(node: ast.FunctionDef) -> str:
    """One line, or a line for each argument."""
    returns = f" -> {unquoted(ast.unparse(node.returns))}" if node.returns else ""
    args = node.args
    positional = args.posonlyargs + args.args
    parts = [plain(argument, default) for argument, default in with_defaults(positional, args.defaults)]
    if args.vararg:
        parts.append(f"*{plain(args.vararg, None)}")
    elif args.kwonlyargs:
        parts.append("*")
    parts += [plain(argument, default) for argument, default in zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    if args.kwarg:
        parts.append(f"**{plain(args.kwarg, None)}")
    parts = [part for part in parts if part not in ("self", "cls")]
    line = f"def {node.name}({', '.join(parts)}){returns}"
    if len(line) <= WIDTH:
        return line
    return f"def {node.name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){returns}"


def with_defaults(arguments: list[ast.arg], defaults: list[ast.expr]) -> Iterator[tuple[ast.arg, ast.expr | None]]:
    missing = [None] * (len(arguments) - len(defaults))
    return zip(arguments, [*missing, *defaults], strict=True)


def plain(argument: ast.arg, default: ast.expr | None) -> str:
    text = argument.arg
    if argument.annotation:
        text += f": {unquoted(ast.unparse(argument.annotation))}"
    if default is not None:
        text += f"{' = ' if argument.annotation else '='}{ast.unparse(default)}"
    return text


def unquoted(annotation: str) -> str:
    """Without the quotes of a forward reference."""
    return annotation[1:-1] if re.fullmatch(r"'[^']*'", annotation) else annotation


def code(text: str) -> str:
    # Text, not Python: signatures are not to be run.
    return f"```text\n{text}\n```"


def prose(docstring: str) -> Iterator[str]:
    """A docstring as Markdown: its paragraphs, and of its sections a list each."""
    kept: list[str] = []
    lines = iter(docstring.splitlines())
    section: list[str] | None = None
    for line in lines:
        match = SECTION.fullmatch(line)
        if match:
            yield from paragraphs(kept if section is None else section)
            kept, section = [], [f"**{match[1]}:** {match[2] or ''}".rstrip(), ""]
            continue
        if section is not None and line and not line.startswith(" "):
            yield from paragraphs(section)
            section = None
        (kept if section is None else section).append(line)
    yield from paragraphs(kept if section is None else section)


def paragraphs(lines: list[str]) -> Iterator[str]:
    """What stands in a docstring or in one of its sections."""
    if lines and lines[0].startswith("**"):
        yield marked(lines[0])
        text = textwrap.dedent("\n".join(lines[2:])).strip()
        if text and not re.match(r"[\w, *`]+: ", text):
            yield marked(text)
        elif text:
            yield "\n".join(marked(item) for item in items(text))
        return
    for paragraph in re.split(r"\n\s*\n", "\n".join(lines).strip()):
        if paragraph.startswith(">>>"):
            yield f"```text\n{paragraph}\n```"
        elif paragraph:
            yield marked(paragraph)


def items(text: str) -> Iterator[str]:
    """`name: meaning`, each with its indented lines."""
    item: list[str] = []
    for line in text.splitlines():
        if line and not line.startswith(" ") and item:
            yield bullet(item)
            item = []
        item.append(line.strip())
    yield bullet(item)


def bullet(lines: list[str]) -> str:
    text = " ".join(line for line in lines if line)
    name, colon, meaning = text.partition(": ")
    return f"- `{name.replace('`', '')}`: {meaning}" if colon else f"- {text}"


def marked(text: str) -> str:
    """Roles of Sphinx as plain code, and no HTML."""
    return re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text)


def render() -> str:
    """The whole page."""
    blocks = [
        "# API reference",
        "Every public name, from the docstrings; written by `python tools/api_reference.py`, and compared with the "
        "sources by the tests. Guides: [README](../README.md#read-on).",
        "\n".join(
            f"- [{module}](#{anchor(module)}): " + ", ".join(f"`{name}`" for name in public_names(module))
            for module in MODULES
        ),
    ]
    for module in MODULES:
        blocks.append(f"## {module}")
        blocks += prose(ast.get_docstring(tree_of(module)) or "")
        for name in public_names(module):
            blocks += definition_of(module, name)
    return "\n\n".join(blocks) + "\n"


if __name__ == "__main__":
    PAGE.write_text(render(), "utf-8")
