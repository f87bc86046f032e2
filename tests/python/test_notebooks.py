"""The notebooks are stored clean, use public names alone, and compute what they say; here on tiny checkpoints.

Each is executed by a Jupyter kernel in a temporary folder, with a cell behind its parameters that changes them, as
papermill does it, and with warnings as errors. Repositories come from a hub on 127.0.0.1.
"""

import ast
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorport
from fake_hub import FakeHub, serving

nbformat = pytest.importorskip("nbformat")
inputtransformer2 = pytest.importorskip("IPython.core.inputtransformer2")
for package in ("ipykernel", "ipywidgets", "matplotlib", "nbclient"):
    pytest.importorskip(package)

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted([*(ROOT / "notebooks").glob("*.ipynb"), *(ROOT / "notebooks").glob("*/*.ipynb")])

CLEAN = "tools/clean_notebooks.py"

REPO = "openai/gpt-oss-20b"

TIMEOUT_S = 300
"""For notebooks that take some ten seconds."""

# Argument: a notebook, which gets its outputs. A process of its own, for sockets and event loops of Jupyter are closed
# late, and their warnings are not ours.
RUNNER = """
import sys
import nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(notebook, kernel_name="here", timeout=None).execute()
nbformat.write(notebook, sys.argv[1])
"""

Facts = Mapping[str, Any]


class NotebookError(Exception):
    """A cell failed; the message has its traceback."""


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def nodes_of(notebook: Any) -> list[ast.AST]:
    """The syntax of all code cells, and of scripts that stand in them as strings; magics become calls of IPython."""
    transform = inputtransformer2.TransformerManager().transform_cell
    code = ast.parse("\n".join(transform(cell.source) for cell in notebook.cells if cell.cell_type == "code"))
    nodes = list(ast.walk(code))
    strings = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    scripts = [ast.parse(string) for string in strings if string.startswith("\nimport ")]
    return nodes + [node for script in scripts for node in ast.walk(script)]


def executed(
    name: str, folder: Path, hub: FakeHub, *, facts: Mapping[str, str] | None = None, **parameters: Any
) -> Facts:
    """Executes a notebook in a folder; returns the values of expressions behind its last cell, and the `notebook`.

    Args:
        name: the file's in notebooks/, without its ending.
        folder: where it runs, and where all it writes goes.
        hub: where ids of repositories are looked for.
        facts: by name an expression that the notebook's variables give a JSON value.
        parameters: in place of the notebook's own.

    Raises:
        NotebookError: a cell failed.
    """
    notebook = read(ROOT / "notebooks" / f"{name}.ipynb")
    (place,) = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    overrides = [f"{parameter} = {value!r}" for parameter, value in parameters.items()]
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell("\n".join(overrides)))
    notebook.cells.insert(0, nbformat.v4.new_code_cell('import warnings\nwarnings.simplefilter("error")'))
    told = ", ".join(f"{fact!r}: {expression}" for fact, expression in (facts or {}).items())
    tell = f"import json, pathlib\n_ = pathlib.Path('facts.json').write_text(json.dumps({{{told}}}))"
    notebook.cells.append(nbformat.v4.new_code_cell(tell))

    # A kernel of this interpreter, whatever kernels the machine's user has set up.
    kernel = folder / "jupyter" / "kernels" / "here"
    kernel.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "here", "language": "python"}))
    environment = os.environ | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(folder / "hf-home"),
        "IPYTHONDIR": str(folder / "ipython"),
        "JAX_PLATFORMS": "cpu",
        "JUPYTER_PATH": str(folder / "jupyter"),
    }
    # Figures are drawn into the notebook, as for its readers: that needs no display.
    environment.pop("MPLBACKEND", None)
    file = folder / "executed.ipynb"
    nbformat.write(notebook, file)
    command = [sys.executable, "-c", RUNNER, str(file)]
    job = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    if job.returncode:
        raise NotebookError(re.sub("\x1b\\[[0-9;]*m", "", job.stderr))  # without colours
    found: dict[str, Any] = json.loads((folder / "facts.json").read_text("utf-8"))
    return found | {"notebook": read(file)}


def figures(facts: Facts) -> int:
    """How many figures were shown."""
    cells = [cell for cell in facts["notebook"].cells if cell.cell_type == "code"]
    return sum("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)


@pytest.fixture(scope="module")
def hub(tiny: Path) -> Iterator[FakeHub]:
    """A hub that has a tiny gpt-oss under the name of the large one."""
    with serving() as hub:
        hub.add(REPO, {path.name: path.read_bytes() for path in tiny.iterdir()})
        yield hub


@pytest.fixture(scope="module")
def download(hub: FakeHub, tmp_path_factory: pytest.TempPathFactory) -> Facts:
    facts = {
        "found": "found",
        "total_parameters": "parameters",
        "pairs": "sorted(pairs)",
        "part_bytes": "part_bytes",
        "codes": "code_counts.tolist()",
        "scales": "scale_counts.tolist()",
    }
    # With its own parameters: the id is that of the large one.
    return executed("01_download_gpt_oss_20b", tmp_path_factory.mktemp("download"), hub, facts=facts)


@pytest.fixture(scope="module")
def convert(hub: FakeHub, tmp_path_factory: pytest.TempPathFactory) -> Facts:
    facts = {
        "verified": "[report.verified, verification.ok, verification.compared_with_source]",
        "failures": "[[failure.file, failure.tensor] for failure in found.failures]",
        "loaded": "[loaded.nbytes, loaded.mapped_bytes, loaded.shared_bytes, loaded.bytes_read]",
        "divided": "divided",
        "whole": "whole",
        "similarity": "similarity.tolist()",
        "runs": "runs",
        "tree": "str(tree.resolve())",
    }
    folder = tmp_path_factory.mktemp("convert")
    return executed("02_convert_and_test_gpt_oss_20b", folder, hub, facts=facts, OUTPUT="tree", NUM_DEVICES=3, ROUNDS=1)


@pytest.fixture(scope="module")
def generate(two_layers: Path, hub: FakeHub, tmp_path_factory: pytest.TempPathFactory) -> Facts:
    facts = {
        "text": "text",
        "pieces": "pieces",
        "result": "[result.ids, result.logprobs]",
        "most_likely": "int(ranking[0])",
        "probabilities": "[p.tolist() for p in probabilities.values()]",
        "kept": "list(kept.values())",
        "reply": "[reply.text, reply.message, reply.stats.new_tokens]",
        "answer": "[answer.reply.text, answer.reply.stats.prompt_tokens, reply.stats.prompt_tokens]",
        "texts": "texts",
        "stopped": "[stopped.ids, stopped.finish_reason, stop]",
        "speeds": "{batch: [stats.new_tokens, stats.tokens_per_s] for batch, stats in speeds.items()}",
    }
    parameters: dict[str, Any] = {"SOURCE": str(two_layers), "NEW_TOKENS": 24, "CHAT_TOKENS": 17, "BATCHES": [1, 3]}
    return executed("03_generate", tmp_path_factory.mktemp("generate"), hub, facts=facts, **parameters)


@pytest.fixture(scope="module")
def modal(two_layers: Path, tmp_path_factory: pytest.TempPathFactory) -> Facts:
    facts = {
        "paths": "[str(checkpoint.path), str(tree)]",
        "implementation": "explanation.implementation",
        "pieces": "pieces",
        "records": "records",
        "folder": "FOLDER",
    }
    folder = tmp_path_factory.mktemp("modal")
    parameters: dict[str, Any] = {"FOLDER": str(folder / "volume"), "NEW_TOKENS": 24, "BATCHES": [1, 3]}
    parameters |= {"PROMPT_TOKENS": 7, "IMPLEMENTATION": "xla"}
    with serving() as hub:
        hub.add(REPO, {path.name: path.read_bytes() for path in two_layers.iterdir()})
        return executed("modal/tensorport_modal", folder, hub, facts=facts, **parameters)


@pytest.fixture(scope="module")
def mxfp4(hub: FakeHub, tmp_path_factory: pytest.TempPathFactory) -> Facts:
    facts = {
        "values": "values.tolist()",
        "decoded": "decoded.tolist()",
        "relative_error": "relative_error",
        "sqnr_db": "{f'{rule}, {name}': error.sqnr_db for (rule, name), error in errors.items()}",
        "times_ms": "times_ms",
        "explanation": "[explanation.implementation, list(explanation.reasons)]",
        "measured": "measured",
        "losses": "losses",
    }
    parameters: dict[str, Any] = {"SHAPE": (320, 96), "ROWS": [1, 3, 5], "STEPS": 60}
    return executed("04_mxfp4", tmp_path_factory.mktemp("mxfp4"), hub, facts=facts, **parameters)


@pytest.fixture(scope="module")
def compare(two_layers: Path, hub: FakeHub, tmp_path_factory: pytest.TempPathFactory) -> Facts:
    facts = {
        "lengths": "{name: len(counts) for name, counts in lengths.items()}",
        "measured": "[[series.side, len(series.per_prompt()), list(series.batches())] for series in groups[0].series]",
        "absent": "[record.note for record in absent]",
        "agreement": "groups[0].agreement is not None",
    }
    # Few warm-ups and short prompts: what is measured means nothing here.
    sizes = ["--prompts=5", "--max-prompt-tokens=12", "--new=4", "--batch=3", "--batch-tokens=7", "--repeats=2"]
    parameters: dict[str, Any] = {
        "SOURCE": str(two_layers),
        "BENCHMARKS": str(ROOT / "benchmarks"),
        "OPTIONS": [*sizes, "--rounds=1", "--warmups-jax=2", "--warmups-pytorch=1"],
    }
    folder = tmp_path_factory.mktemp("compare")
    return executed("05_jax_vs_pytorch", folder, hub, facts=facts, **parameters)


# How notebooks are stored.


def test_every_notebook_is_executed_here() -> None:
    tests = Path(__file__).read_text("utf-8")
    assert NOTEBOOKS
    for path in NOTEBOOKS:
        name = path.relative_to(ROOT / "notebooks").with_suffix("")
        assert f'executed("{name}"' in tests, path.name


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_valid_has_no_outputs_and_one_spelling(path: Path) -> None:
    text = path.read_text("utf-8")
    stored = json.loads(text)
    nbformat.validate(stored)
    assert (stored["nbformat"], stored["nbformat_minor"]) == (4, 5)
    for cell in stored["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [], cell["id"]
            assert cell["execution_count"] is None, cell["id"]
        assert set(cell["metadata"]) <= {"tags"}, cell["id"]
    assert set(stored["metadata"]) == {"kernelspec", "language_info"}
    assert text == json.dumps(stored, indent=1, sort_keys=True, ensure_ascii=False) + "\n", CLEAN


def test_an_executed_notebook_is_cleaned_to_what_is_stored(mxfp4: Facts, tmp_path: Path) -> None:
    """But for the cells that `executed` put in."""
    file = tmp_path / "executed.ipynb"
    nbformat.write(mxfp4["notebook"], file)
    assert "image/png" in file.read_text("utf-8")
    job = subprocess.run([sys.executable, ROOT / CLEAN, file], capture_output=True, text=True, check=True)
    assert job.stdout == f"{file}\n"
    stored = (ROOT / "notebooks" / "04_mxfp4.ipynb").read_text("utf-8")
    cells = [cell for cell in json.loads(file.read_text("utf-8"))["cells"] if cell["id"] in json_ids(stored)]
    assert json.loads(file.read_text("utf-8")) | {"cells": cells} == json.loads(stored)
    assert subprocess.run([sys.executable, ROOT / CLEAN, file], capture_output=True, text=True, check=True).stdout == ""


def json_ids(notebook: str) -> set[str]:
    return {cell["id"] for cell in json.loads(notebook)["cells"]}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_opens_with_what_it_needs_and_how_long_it_takes(path: Path) -> None:
    notebook = read(path)
    opening = notebook.cells[0]
    assert opening.cell_type == "markdown"
    assert opening.source.startswith("# ")
    (needs,) = re.findall(r"^\*\*What you need\.\*\*(.*?)\n\n", opening.source, re.MULTILINE | re.DOTALL)
    assert re.search(r"^\*\*How long it takes\.\*\*", opening.source, re.MULTILINE)
    for word in ("Python", "GPU", "GB", "Extras"):
        assert word in needs, word

    # The extras that it names are those that it installs, and there are such.
    (installs,) = re.findall(r"^ *%pip install --quiet '\{PACKAGE\}\[(.*)\]'", all_code(notebook), re.MULTILINE)
    known = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    assert set(installs.split(",")) <= set(known)
    assert set(installs.split(",")) <= set(re.findall(r"`(\w+)`", needs))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_first_code_of_a_notebook_is_its_parameters(path: Path) -> None:
    cells = [cell for cell in read(path).cells if cell.cell_type == "code"]
    assert [i for i, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", [])] == [0]
    assert all(isinstance(statement, ast.Assign) for statement in ast.parse(cells[0].source).body)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_uses_public_names_alone(path: Path) -> None:
    modules: dict[str, str] = {}
    nodes = nodes_of(read(path))
    for node in nodes:
        if isinstance(node, ast.Import):
            modules |= {alias.asname or alias.name: alias.name for alias in node.names if is_ours(alias.name)}
        if isinstance(node, ast.ImportFrom) and is_ours(node.module or ""):
            public = importlib.import_module(str(node.module)).__all__
            for alias in node.names:
                assert alias.name in public, f"{node.module}.{alias.name}"
                modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    assert "tensorport" in modules
    for node in nodes:
        if isinstance(node, ast.Attribute):
            assert not re.match(r"_(?!_\w+__$)", node.attr), node.attr
            if isinstance(node.value, ast.Name) and node.value.id in modules:
                module = sys.modules.get(modules[node.value.id])
                assert module is None or node.attr in module.__all__, f"{modules[node.value.id]}.{node.attr}"


@pytest.mark.parametrize("path", [*NOTEBOOKS, ROOT / "notebooks" / "README.md"], ids=lambda path: path.stem)
def test_links_of_notebooks_lead_somewhere(path: Path) -> None:
    if path.suffix == ".md":
        text = path.read_text("utf-8")
    else:
        text = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    targets = re.findall(r"\]\(([^)#:]+)\)", text)
    assert targets
    for target in targets:
        assert (path.parent / target).exists(), target


def test_the_guide_has_every_notebook() -> None:
    guide = (ROOT / "notebooks" / "README.md").read_text("utf-8")
    for path in NOTEBOOKS:
        assert f"]({path.relative_to(ROOT / 'notebooks')})" in guide, path.name


def is_ours(module: str) -> bool:
    return module.partition(".")[0] == "tensorport"


def all_code(notebook: Any) -> str:
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")


# What they compute.


def test_download_finds_every_tensor_where_the_configuration_puts_it(download: Facts, tiny: Path) -> None:
    checkpoint = tensorport.open(tiny)
    assert download["found"] == {name: [spec.dtype.name, [*spec.shape]] for name, spec in checkpoint.specs.items()}
    assert download["total_parameters"] == checkpoint.total_parameters
    assert len(download["pairs"]) == 8  # two in each of four layers
    assert sum(download["part_bytes"].values()) == checkpoint.nbytes
    assert figures(download) == 4


def test_download_counts_every_scale_and_the_codes_of_an_expert(download: Facts, tiny: Path) -> None:
    checkpoint = tensorport.open(tiny)
    scales = np.concatenate([checkpoint[name].ravel() for name in checkpoint if name.endswith("_scales")])
    assert download["scales"] == np.bincount(scales, minlength=256).tolist()
    codes = np.zeros(16, int)
    for name in checkpoint:
        if name.endswith("_blocks"):
            for byte, count in enumerate(np.bincount(checkpoint[name][0].ravel(), minlength=256)):
                codes[byte % 16] += count
                codes[byte // 16] += count
    assert download["codes"] == codes.tolist()


def test_download_brings_nothing_that_is_not_of_the_checkpoint(download: Facts, hub: FakeHub, tiny: Path) -> None:
    assert download
    assert set(hub.downloads()) <= {path.name for path in tiny.iterdir()}
    assert "model.safetensors" in hub.downloads()


def with_another_width(files: dict[str, bytes]) -> str:
    files["config.json"] = files["config.json"].replace(b'"intermediate_size": 160', b'"intermediate_size": 192')
    return r"mlp\.experts\.down_proj_scales: found .*\(6, 96, 5\).*, expected .*\(6, 96, 6\)"


def with_a_scale_of_nan(files: dict[str, bytes]) -> str:
    content = bytearray(files["model.safetensors"])
    header_bytes = 8 + int.from_bytes(content[:8], "little")
    start, _ = json.loads(content[8:header_bytes])["model.layers.2.mlp.experts.down_proj_scales"]["data_offsets"]
    content[header_bytes + start] = 255
    files["model.safetensors"] = bytes(content)
    return r"assert scale_counts\[255\] == 0"


@pytest.mark.parametrize("damage", [with_another_width, with_a_scale_of_nan], ids=lambda damage: damage.__name__)
def test_download_stops_at_what_is_no_gpt_oss(
    damage: Callable[[dict[str, bytes]], str], tiny: Path, tmp_path: Path
) -> None:
    files = {path.name: path.read_bytes() for path in tiny.iterdir()}
    message = damage(files)
    with serving() as hub:
        hub.add(REPO, files)
        with pytest.raises(NotebookError, match=message):
            executed("01_download_gpt_oss_20b", tmp_path, hub)


def test_convert_writes_the_tensors_of_the_source(convert: Facts, tiny: Path) -> None:
    assert convert["verified"] == [True, True, True]
    source, tree = tensorport.open(tiny), tensorport.open(convert["tree"])
    assert set(tree) == set(source)
    for name, array in source.items():
        assert tree[name].tobytes() == array.tobytes(), name
    assert figures(convert) == 4


def test_convert_finds_the_bit_that_it_flips_and_puts_it_back(convert: Facts) -> None:
    assert convert["failures"] == [["shard_000/model_norm_weight.npy", "model.norm.weight"]]
    assert not list(Path(convert["tree"]).rglob("*.spare"))
    assert tensorport.verify(convert["tree"], progress=False).ok


def test_convert_loads_without_a_copy(convert: Facts, tiny: Path) -> None:
    nbytes = tensorport.open(tiny).nbytes
    assert convert["loaded"] == [nbytes, nbytes, nbytes, 0]


def test_convert_divides_experts_and_nothing_else(convert: Facts, tiny: Path) -> None:
    layer = [spec for name, spec in tensorport.open(tiny).specs.items() if name.startswith("model.layers.0.")]
    experts = sum(spec.nbytes for spec in layer if ".experts." in spec.name)
    assert convert["divided"] == [experts / 3] * 3
    assert convert["whole"] == [sum(spec.nbytes for spec in layer) - experts] * 3


def test_convert_compares_words_by_their_embeddings(convert: Facts) -> None:
    similarity = np.array(convert["similarity"])
    assert similarity.shape == (10, 10)
    np.testing.assert_allclose(np.diag(similarity), 1, atol=1e-5)
    np.testing.assert_allclose(similarity, similarity.T, atol=1e-5)
    assert abs(similarity[np.triu_indices(10, 1)]).max() < 0.999


def test_convert_measures_three_loaders_on_the_same_tensors(convert: Facts, tiny: Path) -> None:
    checkpoint = tensorport.open(tiny)
    assert list(convert["runs"]) == ["safetensors.flax", "tensorport, same file", "tensorport, tree"]
    for runs in convert["runs"].values():
        for run in runs:
            assert (run["tensors"], run["nbytes"]) == (len(checkpoint), checkpoint.nbytes)
            assert run["arrays_s"] > 0
            assert run["touch_s"] > 0


def test_generate_streams_the_text_that_comes_at_once(generate: Facts) -> None:
    assert len(generate["pieces"]) > 1
    assert "".join(generate["pieces"]) == generate["text"]
    assert figures(generate) == 3


def test_generate_draws_what_the_logits_say(generate: Facts) -> None:
    ids, logprobs = generate["result"]
    assert ids[0] == generate["most_likely"]
    at_half, at_one, at_two = generate["probabilities"]
    assert np.exp(logprobs[0]) == pytest.approx(at_one[0], rel=0.05)  # a step through a cache in bfloat16
    assert at_half[0] > at_one[0] > at_two[0]
    kept = generate["kept"]
    assert kept == sorted(set(kept))
    for count, p in zip(kept, generate["probabilities"], strict=True):
        assert sum(p[: count - 1]) < 0.9 <= sum(p[:count])


def test_generate_holds_a_chat(generate: Facts) -> None:
    text, message, new_tokens = generate["reply"]
    assert message["role"] == "assistant"
    assert message["content"] == text
    assert 0 < new_tokens <= 17
    _, later_prompt_tokens, first_prompt_tokens = generate["answer"]
    assert later_prompt_tokens > first_prompt_tokens


def test_generate_differs_by_seed_and_ends_at_a_stop(generate: Facts) -> None:
    assert len(set(generate["texts"].values())) == 3
    ids, reason, stop = generate["stopped"]
    assert reason == "stop"
    assert ids.index(stop) == len(ids) - 1 <= 4


def test_generate_measures_every_batch(generate: Facts) -> None:
    assert {batch: tokens for batch, (tokens, _) in generate["speeds"].items()} == {"1": 24, "3": 72}
    assert all(tokens_per_s > 0 for _, tokens_per_s in generate["speeds"].values())


def test_mxfp4_draws_the_values_of_the_standard(mxfp4: Facts) -> None:
    # OCP Microscaling Formats (MX) v1.0, table of FP4 (E2M1).
    positive = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert mxfp4["values"] == [*positive, *(-value for value in positive)]
    assert len(mxfp4["decoded"]) == 32
    assert figures(mxfp4) == 7


def test_mxfp4_ranks_the_rules(mxfp4: Facts) -> None:
    sqnr_db = mxfp4["sqnr_db"]
    for name in ("normal", "uniform"):
        assert sqnr_db[f"nearest, {name}"] >= max(sqnr_db[f"floor, {name}"], sqnr_db[f"ceil, {name}"])
        assert sqnr_db[f"ceil, stochastic, {name}"] < sqnr_db[f"ceil, {name}"]
    assert sqnr_db["ceil, uniform"] > sqnr_db["floor, uniform"] + 3
    assert len(sqnr_db) == 12


def test_mxfp4_multiplies_as_the_dense_matrix_does(mxfp4: Facts) -> None:
    assert mxfp4["relative_error"] < 1e-5
    assert all(len(series) == 3 and min(series) > 0 for series in mxfp4["times_ms"].values())


def test_mxfp4_says_which_kernel_ran_and_compares_it_with_the_others(mxfp4: Facts) -> None:
    chosen, names = mxfp4["explanation"]
    assert chosen == "native"
    assert list(mxfp4["measured"]) == ["native", "native_int8", "xla"]
    assert set(mxfp4["measured"]) < set(names)
    errors = {name: error for name, (_, error) in mxfp4["measured"].items()}
    # Rounding to bfloat16 errs by half of 2 ** -8 at most.
    assert max(errors["native"], errors["xla"]) < 2**-9 < errors["native_int8"] < 0.02


def test_mxfp4_trains_an_adapter(mxfp4: Facts) -> None:
    losses = mxfp4["losses"]
    assert len(losses) == 60
    assert losses[-1] < losses[0] / 100


def test_modal_keeps_all_in_the_volume_and_verifies_the_tree(modal: Facts, two_layers: Path) -> None:
    hub_cache, tree = map(Path, modal["paths"])
    assert hub_cache.is_relative_to(Path(modal["folder"], "hub"))
    assert tree == Path(modal["folder"], "trees", "openai--gpt-oss-20b")
    assert tensorport.verify(tree, two_layers, progress=False).ok


def test_modal_runs_the_kernels_that_it_names_and_measures_every_batch(modal: Facts, two_layers: Path) -> None:
    assert modal["implementation"] == "xla"
    model = tensorport.load_model(two_layers, implementation="xla")
    assert "".join(modal["pieces"]) == model.generate("The capital of France is", max_new_tokens=24, temperature=0)
    assert [record["batch"] for record in modal["records"]] == [1, 3]
    assert all(record["tokens_per_s"] > 0 < record["first_token_s"] for record in modal["records"])
    assert figures(modal) == 1


def test_compare_measures_each_side_that_there_is_and_says_which_is_not(compare: Facts) -> None:
    assert list(compare["lengths"].values()) == [20] * 5
    told = "".join(
        output.get("text", "")
        for cell in compare["notebook"].cells
        if cell.cell_type == "code"
        for output in cell.outputs
    )
    has_torch = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
    sides = ["jax", "pytorch"] if has_torch else ["jax"]
    assert compare["measured"] == [[side, 5, [3]] for side in sides]
    assert compare["agreement"] == has_torch
    assert ("PyTorch is not installed" in told) == (not has_torch) == bool(compare["absent"])
    # Tokens can be compared where both have made some.
    assert figures(compare) == (4 if has_torch else 3)
