"""benchmarks/jax_vs_pytorch.py measures JAX and tells what is missing; analyze.py makes tables and plots of records."""

import dataclasses
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import tensorport

# Children are started from a process in which other tests have started JAX; they run a program of their own at once.
pytestmark = pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CLASSES = ["reasoning", "code", "chat", "long_context", "languages"]
# What is measured means nothing here, and compiling takes most of the time.
FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
SIZES = ["--prompts=6", "--max-prompt-tokens=11", "--new=4", "--batch=1", "--batch=3", "--batch-tokens=7"]
SIZES += ["--repeats=2", "--rounds=1", "--warmups-jax=2", "--warmups-pytorch=1"]
HAS_TORCH = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


@pytest.fixture(scope="module")
def modules() -> Iterator[dict[str, ModuleType]]:
    """The scripts, as modules."""
    names = ["jax_vs_pytorch_records", "jax_vs_pytorch_procedure", "jax_vs_pytorch", "jax_vs_pytorch_job", "analyze"]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield {name: importlib.import_module(name) for name in names}
        for name in (*names, "analyze_plots", "measure"):
            sys.modules.pop(name, None)


def bare_python(folder: Path) -> Path:
    """A Python with the standard library alone."""
    script = folder / "bare-python"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    script.chmod(0o755)
    return script


def run(*options: str | Path) -> Any:
    command = [sys.executable, "-W", "ignore", str(BENCHMARKS / "jax_vs_pytorch.py"), *map(str, options)]
    env = {**os.environ, "XLA_FLAGS": FAST, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def produced(two_layers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The records of a run with JAX alone."""
    folder = tmp_path_factory.mktemp("compare")
    output = folder / "results.jsonl"
    done = run(two_layers, "--output", output, "--pytorch", bare_python(folder), "--allow-missing", *SIZES)
    assert done.returncode == 0, done.stderr
    assert "pytorch: process: missing: not installed in " in done.stderr
    return output


# Prompts.


def test_there_are_a_hundred_prompts_of_five_classes() -> None:
    prompts = json.loads((BENCHMARKS / "prompts.json").read_text("utf-8"))
    assert all(set(prompt) == {"id", "class", "language", "text"} for prompt in prompts)
    assert len({prompt["id"] for prompt in prompts}) == len({prompt["text"] for prompt in prompts}) == 100
    by_class = {name: [prompt for prompt in prompts if prompt["class"] == name] for name in CLASSES}
    assert [len(members) for members in by_class.values()] == [20] * 5
    assert all(len(prompt["text"]) > 20 for prompt in prompts)
    assert min(len(prompt["text"].split()) for prompt in by_class["long_context"]) > 300
    assert len({prompt["language"] for prompt in by_class["languages"]}) == 20
    assert all(prompt["language"] == "en" for name in CLASSES[:-1] for prompt in by_class[name])


def test_prompts_are_taken_of_all_classes_in_turn(modules: dict[str, ModuleType], two_layers: Path) -> None:
    script = modules["jax_vs_pytorch"]
    options = script.parse_options([str(two_layers), "--prompts=7", "--max-prompt-tokens=9"])
    prompts = script.tokenized_prompts(options, two_layers)
    assert [prompt["class"] for prompt in prompts] == [*CLASSES, *CLASSES[:2]]
    assert [len(prompt["ids"]) for prompt in prompts] == [9] * 7
    tokenizer = tensorport.text.Tokenizer.from_directory(two_layers)
    whole = json.loads((BENCHMARKS / "prompts.json").read_text("utf-8"))[0]["text"]
    assert prompts[0]["ids"] == tokenizer.encode(whole)[:9]


def test_rows_of_a_batch_have_one_length_and_other_beginnings(modules: dict[str, ModuleType]) -> None:
    prompts = [{"ids": [1, 2, 3]}, {"ids": [4]}, {"ids": [5, 6, 7, 8, 9, 10]}]
    rows = modules["jax_vs_pytorch"].batch_rows(prompts, 3, 5)
    assert rows == [[1, 2, 3, 4, 5], [4, 5, 6, 7, 8], [5, 6, 7, 8, 9]]


# What is measured.


def test_jax_is_measured_from_end_to_end(modules: dict[str, ModuleType], produced: Path, two_layers: Path) -> None:
    records = modules["jax_vs_pytorch_records"].read_records(produced)
    jax_records = [record for record in records if record.side == "jax"]
    parts = ["load", "prompts", "batch", "batch", "compile", "memory"]
    assert [record.measurement for record in jax_records] == parts
    for record in jax_records:
        assert (record.status, record.device, record.round) == ("measured", "cpu", 0)
        assert record.versions.keys() == {"python", "tensorport", "jax", "jaxlib"}
        assert record.settings["warmups"] == 2
        assert not record.settings["warmups_are_full"]
        assert record.settings["config"]["num_hidden_layers"] == 2
    load, prompts, one, three, compiled, memory = (record.values for record in jax_records)
    assert load["weight_bytes"] == tensorport.open(two_layers).nbytes
    assert [prompt["class"] for prompt in prompts["per_prompt"]] == [*CLASSES, CLASSES[0]]
    assert all(prompt["prompt_tokens"] == 11 for prompt in prompts["per_prompt"])
    assert [one["batch"], three["batch"]] == [1, 3]
    for values in (prompts, one, three):
        assert values["first_token_s"] > 0
        assert values["tokens_per_s"] > 0
        assert values["compiled"] == 0  # or else it would be no time of the model
    assert [len(values["samples"]) for values in (one, three)] == [2, 2]
    assert compiled["programs"] > 3
    assert compiled["seconds"] > compiled["backend_compile_s"] / 2 > 0
    assert memory["peak_rss_bytes"] > memory["anonymous_bytes"] > load["weight_bytes"]
    assert memory["device_peak_bytes"] is None


def test_a_side_that_is_not_installed_is_a_record(modules: dict[str, ModuleType], produced: Path) -> None:
    records = modules["jax_vs_pytorch_records"].read_records(produced)
    missing, agreement = [record for record in records if record.status == "missing"]
    assert (missing.side, missing.measurement) == ("pytorch", "process")
    assert missing.note.endswith(": torch, transformers")
    assert (agreement.side, agreement.measurement, agreement.note) == ("both", "agreement", "tokens of one side only")


@dataclasses.dataclass
class FakeSide:
    """Counts its calls; token i of a row is i."""

    is_compiled: bool
    calls: list[int] = dataclasses.field(default_factory=list)

    def load(self) -> int:
        return 12

    def generate(self, prompts: list[list[int]], new: int) -> Any:
        self.calls.append(len(prompts))
        timed = importlib.import_module("jax_vs_pytorch_procedure").Timed
        return timed(0.25, 0.75, [list(range(new)) for _ in prompts])

    def compiled(self) -> tuple[int, float] | None:
        return (len(set(self.calls)), 1.5) if self.is_compiled else None

    def device_peak_bytes(self) -> int | None:
        return 34

    def facts(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize("is_compiled", [True, False])
def test_every_case_is_warmed_up_before_it_is_measured(modules: dict[str, ModuleType], *, is_compiled: bool) -> None:
    prompts = [{"id": str(i), "class": "chat", "ids": [i]} for i in range(4)]
    settings = {"prompts": prompts, "batches": [[[1], [2]], [[1], [2], [3]]], "new": 5, "warmups": 7, "repeats": 3}
    side = FakeSide(is_compiled)
    rows = list(modules["jax_vs_pytorch_procedure"].measure(side, settings))
    # A first call of what may be compiled, warm-ups, and what is measured.
    first = 4 if is_compiled else 1
    assert side.calls == [1] * (first + 7 + 4) + [2] * (1 + 7 + 3) + [3] * (1 + 7 + 3)
    assert [row["measurement"] for row in rows] == ["load", "prompts", "batch", "batch", "compile", "memory"]
    # Of 5 tokens of each row 4 came in half a second.
    assert [row["values"]["tokens_per_s"] for row in rows[1:4]] == [8, 16, 24]
    assert [row["values"]["compiled"] for row in rows[1:4]] == ([0] * 3 if is_compiled else [None] * 3)
    assert rows[1]["ids"] == [[0, 1, 2, 3, 4]] * 4


def test_a_row_with_too_few_tokens_is_no_time(modules: dict[str, ModuleType]) -> None:
    clock = modules["jax_vs_pytorch_procedure"].Clock()
    clock.tick()
    with pytest.raises(ValueError, match=r"new tokens: found \[3, 2\], expected 3 in each row"):
        clock.stop([[1, 2, 3], [4, 5]], 3)


# A side without weights: it writes what the real ones write, with the ids of its settings' seed.
FAKE_JOB = """
import json, sys
from pathlib import Path
settings = json.loads(Path(sys.argv[1]).read_text())
if "differences" in settings:
    Path(settings["rows"]).write_text(json.dumps([0.001 * (1 + len(d["ids"])) for d in settings["differences"]]))
    sys.exit()
facts = {"device": "cpu", "versions": {"python": "3"}, "settings": {}}
ids = [[1, 2, IDS, 4] for _ in settings["prompts"]]
prompts = [{"id": p["id"], "class": p["class"], "prompt_tokens": 1, "first_token_s": 1, "tokens_per_s": 1}
           for p in settings["prompts"]]
values = {"first_token_s": 1, "tokens_per_s": 1, "per_prompt": prompts, "compiled": None}
with Path(settings["rows"]).open("w") as file:
    print(json.dumps({"measurement": "prompts", "values": values, "ids": ids, "facts": facts}), file=file)
END
"""


@pytest.fixture
def fake(
    modules: dict[str, ModuleType], two_layers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[bool, list[Any]]]:
    """Runs the script with fake sides; returns whether it failed, and the records."""

    def run_it(*options: str, jax: str = "", pytorch: str = "", third: int = 3) -> tuple[bool, list[Any]]:
        script = modules["jax_vs_pytorch"]
        for side, end in (("jax", jax), ("pytorch", pytorch)):
            job = FAKE_JOB.replace("IDS", "3" if side == "jax" else str(third)).replace("END", end)
            (tmp_path / f"{side}.py").write_text(job)
        scripts = {side: tmp_path / f"{side}.py" for side in ("jax", "pytorch")}
        monkeypatch.setattr(script, "SCRIPTS", scripts)
        monkeypatch.setattr(script, "NEEDS", {"jax": ("json",), "pytorch": ("json",)})
        chosen = script.parse_options([str(two_layers), *SIZES, *options])
        with (tmp_path / "records").open("w") as log:
            this = script.Run(chosen, two_layers, tmp_path, log)
            script.measure_all(this)
        return this.failed, modules["jax_vs_pytorch_records"].read_records(tmp_path / "records")

    return run_it


def test_sides_take_turns_and_begin_in_turn(fake: Callable[..., Any]) -> None:
    failed, records = fake("--rounds=3")
    assert not failed
    told = [(record.side, record.round) for record in records[:-1]]
    assert told == [("jax", 0), ("pytorch", 0), ("pytorch", 1), ("jax", 1), ("jax", 2), ("pytorch", 2)]
    agreement = records[-1]
    assert [row["same_tokens"] for row in agreement.values["per_prompt"]] == [4] * 6
    assert all(row["gap"] is row["is_near_tie"] is None for row in agreement.values["per_prompt"])


def test_tokens_that_differ_are_judged_by_the_logits_there(fake: Callable[..., Any]) -> None:
    _, records = fake("--max-prompt-tokens=5", third=9)
    # The fake logits are 0.001 apart for each token of the prompt and what is the same behind it, and one more.
    assert records[-1].values["near_tie"] == 2**-7
    for row in records[-1].values["per_prompt"]:
        assert (row["same_tokens"], row["new_tokens"]) == (2, 4)
        assert row["gap"] == pytest.approx(0.001 * (5 + 2 + 1))
        assert row["is_near_tie"] is False
    _, records = fake("--max-prompt-tokens=4", third=9)
    assert [row["is_near_tie"] for row in records[-1].values["per_prompt"]] == [True] * 6


def test_what_a_side_measured_before_it_fails_is_kept(fake: Callable[..., Any]) -> None:
    failed, records = fake(pytorch="raise RuntimeError('out of paper')")
    assert failed
    told = [(record.side, record.measurement, record.status) for record in records]
    assert told[1:3] == [("pytorch", "prompts", "measured"), ("pytorch", "process", "failed")]
    assert records[2].note == "ended with 1: RuntimeError: out of paper"


def test_drawn_tokens_are_not_compared(fake: Callable[..., Any]) -> None:
    failed, records = fake("--temperature=0.7", third=9)
    assert not failed
    assert records[-1].status == "not comparable"
    assert "different generators" in records[-1].note


@pytest.mark.parametrize("allowed", [True, False])
def test_a_missing_side_fails_unless_that_is_allowed(
    fake: Callable[..., Any], tmp_path: Path, *, allowed: bool
) -> None:
    failed, records = fake("--pytorch", str(tmp_path / "nothing"), *(["--allow-missing"] if allowed else []))
    assert failed == (not allowed)
    assert [(record.side, record.status) for record in records] == [
        ("pytorch", "missing"),
        ("jax", "measured"),
        ("both", "missing"),
    ]
    assert "found no Python that runs" in records[0].note


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "found both or neither of CHECKPOINT and --preset"),
        (["a", "--preset=tiny"], "found both or neither of CHECKPOINT and --preset"),
        (["a", "--new=1"], "--new: found 1, expected at least 2"),
        (["a", "--batch=0"], "argument --batch: invalid"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    modules: dict[str, ModuleType], options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        modules["jax_vs_pytorch"].parse_options(options)
    assert words in capsys.readouterr().err


def test_the_gap_is_that_of_the_models_own_logits(modules: dict[str, ModuleType], two_layers: Path) -> None:
    settings = {"checkpoint": str(two_layers), "dtype": "float32", "temperature": 0.0, "seed": 0}
    side = modules["jax_vs_pytorch_job"].Jax(settings)
    side.load()
    ids = [7, 3, 11, 5, 2]
    logits = np.asarray(side.model(np.array([ids]))[0, -1], np.float64)
    first, second, *_, last = np.argsort(-logits).tolist()
    for other in (second, last):
        expected = (logits[first] - logits[other]) / abs(logits).max()
        # Both are float32 sums over at most 160 products in a few layers, in another order.
        assert side.gap(ids, [other, first]) == pytest.approx(expected, abs=1e-5)
    assert side.generate([ids], 2).ids[0][0] == first


@pytest.mark.skipif(not HAS_TORCH, reason="needs torch and transformers")
def test_both_sides_write_the_same_tokens_in_float32(
    modules: dict[str, ModuleType], two_layers: Path, tmp_path: Path
) -> None:
    output = tmp_path / "results.jsonl"
    done = run(two_layers, "--output", output, "--dtype=float32", *SIZES)
    assert done.returncode == 0, done.stderr
    records = modules["jax_vs_pytorch_records"].read_records(output)
    pytorch = [record for record in records if record.side == "pytorch"]
    parts = ["load", "prompts", "batch", "batch", "compile", "memory"]
    assert [record.measurement for record in pytorch] == parts
    assert pytorch[0].settings["mxfp4"] == "dequantized to float32 when loaded"
    assert pytorch[0].settings["warmups"] == 1
    # A decoded value takes 4 bytes, and a code and its part of a scale half a byte and a 32nd.
    assert pytorch[0].values["weight_bytes"] > 4 * tensorport.open(two_layers).nbytes
    (agreement,) = [record for record in records if record.measurement == "agreement"]
    assert agreement.status == "measured"
    assert len(agreement.values["per_prompt"]) == 6
    for row in agreement.values["per_prompt"]:
        assert row["is_near_tie"] is not False
        assert row["same_tokens"] == 4 or row["is_near_tie"]


# Tables and plots.

SETTINGS = {"model": "demo", "dtype": "bfloat16", "warmups": 30, "warmups_are_full": True, "prompts": 2}
SETTINGS |= {"new_tokens": 8, "batch_tokens": 16, "temperature": 0.0}


def canned(modules: dict[str, ModuleType], side: str, measurement: str, values: Any, **fields: Any) -> Any:
    versions = (
        {"tensorport": "0.1.0", "jax": "0.10.2"} if side == "jax" else {"torch": "2.15.0", "transformers": "5.24.0"}
    )
    usual = {"status": "measured", "round": 0, "date": "2026-11-01T00:00:00+00:00", "machine": "7 cores"}
    usual |= {"device": "cpu", "versions": versions, "settings": SETTINGS, "note": ""}
    return modules["jax_vs_pytorch_records"].Record(
        side=side, measurement=measurement, values=values, **{**usual, **fields}
    )


def batch(rows: int, rate: float) -> dict[str, Any]:
    samples = [{"first_token_s": 0.1, "tokens_per_s": rate + i} for i in (-1, 0, 1)]
    return {"batch": rows, "first_token_s": 0.1, "tokens_per_s": rate, "samples": samples, "compiled": None}


@pytest.fixture(scope="module")
def many(modules: dict[str, ModuleType]) -> list[Any]:
    """Records of two machines, and on one of them of two versions."""
    prompt = {"prompt_tokens": 17, "first_token_s": 0.02, "tokens_per_s": 90.0}
    prompts = [{"id": "a", "class": "chat", **prompt}, {"id": "b", "class": "long_context", **prompt}]
    values = {"first_token_s": 0.02, "tokens_per_s": 90.0, "per_prompt": prompts, "compiled": 0}
    same = {"id": "a", "class": "chat", "new_tokens": 8, "same_tokens": 8, "gap": None, "is_near_tie": None}
    tie = {"id": "b", "class": "long_context", "new_tokens": 8, "same_tokens": 3, "gap": 0.005, "is_near_tie": True}
    far = {"id": "c", "class": "chat", "new_tokens": 8, "same_tokens": 1, "gap": 0.125, "is_near_tie": False}
    newer = {"versions": {"tensorport": "0.2.0", "jax": "0.10.2"}, "date": "2026-11-02T00:00:00+00:00"}
    other = {"machine": "96 cores", "device": "NVIDIA H200"}
    absent: dict[str, Any] = {"device": None, "versions": {}, "status": "missing", "note": "not installed: torch"}
    return [
        canned(modules, "jax", "batch", batch(1, 100.0)),
        canned(modules, "jax", "batch", batch(1, 140.0), round=1),
        canned(modules, "jax", "batch", batch(4, 300.0)),
        canned(modules, "jax", "batch", batch(1, 110.0), **newer),
        canned(modules, "jax", "prompts", values),
        canned(modules, "pytorch", "batch", batch(1, 60.0)),
        canned(modules, "both", "agreement", {"per_prompt": [same, tie, far], "near_tie": 2**-7}),
        canned(modules, "jax", "load", {"seconds": 0.5, "weight_bytes": 83_200_000}, **other),
        canned(modules, "pytorch", "process", {}, **{**other, **absent}),
    ]


def test_machines_make_groups_and_versions_columns(modules: dict[str, ModuleType], many: list[Any]) -> None:
    cpu, gpu = modules["analyze"].grouped(many)
    assert (cpu.name, gpu.name) == ("demo, bfloat16, on 7 cores", "demo, bfloat16, on NVIDIA H200 (96 cores)")
    labels = ["JAX (tensorport 0.1.0, jax 0.10.2)", "JAX (tensorport 0.2.0, jax 0.10.2)", "PyTorch"]
    assert [series.label for series in cpu.series] == labels
    # The median of two rounds.
    assert cpu.series[0].median("batch", "tokens_per_s") == 140.0
    assert [record.note for record in gpu.absent] == ["not installed: torch"]
    text = modules["analyze"].markdown([cpu, gpu])
    assert "| tokens/s, batch of 1 | 120 | 110 | 60 |" in text
    assert "| tokens/s, batch of 4 | 300 | - | - |" in text
    assert "| chat | 2 | 1 | 0 | 1 | 4.5 of 8 | 0.12 |" in text
    assert "| all | 3 | 1 | 1 | 1 | 3 of 8 | 0.12 |" in text
    assert "| PyTorch | process | missing | not installed: torch |" in text
    assert "| load | 500 ms |" in text
    assert "| weights in memory | 83.2 MB |" in text
    assert "not to be compared" not in text


def test_other_work_is_another_group(modules: dict[str, ModuleType], many: list[Any]) -> None:
    shorter = dataclasses.replace(many[0], settings={**SETTINGS, "new_tokens": 5})
    names = [group.name for group in modules["analyze"].grouped([many[0], shorter])]
    assert [re.findall(r"(\d+) new tokens", name) for name in names] == [["8"], ["5"]]


def test_figures_against_the_rules_are_marked(modules: dict[str, ModuleType], many: list[Any]) -> None:
    few = dataclasses.replace(many[0], settings={**SETTINGS, "warmups_are_full": False})
    compiled = dataclasses.replace(many[0], values={**many[0].values, "compiled": 2})
    for record, words in ((few, "Fewer warm-ups than the rules ask for"), (compiled, "Programs were compiled while")):
        assert f"**{words}" in modules["analyze"].markdown(modules["analyze"].grouped([record]))


def analyze(*arguments: str | Path) -> Any:
    command = [sys.executable, str(BENCHMARKS / "analyze.py"), *map(str, arguments)]
    env = {name: value for name, value in os.environ.items() if name != "DISPLAY"}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60)


def test_tables_and_plots_of_what_was_produced(produced: Path, many: list[Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "many.jsonl").write_text("\n".join(record.line() for record in many), "utf-8")
    done = analyze(produced, tmp_path / "many.jsonl", "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    titles = re.findall(r"^## (.*)$", done.stdout, re.MULTILINE)
    assert len(titles) == 3
    assert titles[0].startswith("two_layers, bfloat16, on ")
    assert "**Fewer warm-ups than the rules ask for" in done.stdout
    page = (tmp_path / "out" / "README.md").read_text("utf-8")
    shown = set(re.findall(r'(?:src|srcset)="([^"]*)"', page))
    plots = {path.name for path in (tmp_path / "out").glob("*.*g")}
    assert shown == {name for name in plots if name.endswith("svg")}
    kinds = {"tokens-per-second": 2, "time-to-first-token": 2, "memory": 2, "agreement": 1}
    assert plots == {
        f"{number}-{model}-bfloat16-{kind}-{theme}.{ending}"
        for number, model, has in (
            (1, "two-layers", ("tokens-per-second", "time-to-first-token", "memory")),
            (2, "demo", ("tokens-per-second", "time-to-first-token", "agreement")),
            (3, "demo", ("memory",)),
        )
        for kind in kinds
        if kind in has
        for theme in ("light", "dark")
        for ending in ("png", "svg")
    }
    texts = {name: "".join(ElementTree.parse(tmp_path / "out" / name).getroot().itertext()) for name in shown}
    assert "tokens/s, all prompts together" in texts["2-demo-bfloat16-tokens-per-second-light.svg"]
    assert "JAX (tensorport 0.2.0, jax 0.10.2)" in texts["2-demo-bfloat16-tokens-per-second-dark.svg"]
    assert "time to first token (ms)" in texts["1-two-layers-bfloat16-time-to-first-token-dark.svg"]
    assert "83.2 MB" in texts["3-demo-bfloat16-memory-light.svg"]
    assert "part at a near-tie" in texts["2-demo-bfloat16-agreement-light.svg"]


def without(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda record: record.pop(name)


def with_values(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda record: record["values"].update(values)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (without("side"), "side: found nothing, expected str"),
        (without("kind"), "kind: found None, expected 'jax_vs_pytorch'"),
        (lambda record: record.update(schema=2), "schema: found 2, expected 1"),
        (lambda record: record.update(side="tpu"), "side: found 'tpu', expected one of jax, pytorch, both"),
        (lambda record: record.update(round=True), "round: found True, expected int"),
        (lambda record: record["settings"].pop("dtype"), "settings.dtype: found nothing, expected str"),
        (with_values(tokens_per_s="fast"), "values.tokens_per_s: found 'fast', expected int or float"),
        (with_values(samples=[{"first_token_s": 1}]), "values.samples[0].tokens_per_s: found nothing"),
        (with_values(samples=[3]), "values.samples[0]: found 3, expected an object"),
    ],
)
def test_a_line_that_is_no_record_is_named(
    modules: dict[str, ModuleType], many: list[Any], tmp_path: Path, damage: Callable[[Any], None], words: str
) -> None:
    record = json.loads(many[0].line())
    damage(record)
    file = tmp_path / "results.jsonl"
    file.write_text(f"{many[1].line()}\n\n{json.dumps(record)}\n", "utf-8")
    with pytest.raises(modules["jax_vs_pytorch_records"].RecordError, match=re.escape(f"{file}:3: {words}")):
        modules["analyze"].read_all([file])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{\n", ":1: found '{', expected JSON"),
        ("[1]\n", ":1: found [1], expected an object"),
        ("\n", ": found no records"),
    ],
)
def test_a_file_without_records_writes_nothing(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "results.jsonl"
    file.write_text(text)
    done = analyze(file, "--output", tmp_path / "out")
    assert (done.returncode, done.stdout) == (1, "")
    assert f"analyze.py: {file}{words}" in done.stderr
    assert not (tmp_path / "out").exists()
    assert analyze(tmp_path / "nothing").returncode == 1
