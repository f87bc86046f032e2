"""The command line: the Python entry point, and beside it the plain binary that has the same flags."""

import ast
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tensorport

Write = Callable[..., Path]

PYTHON = [sys.executable, "-m", "tensorport"]
COMMANDS = ("convert", "verify", "inspect", "synthesize", "generate", "chat", "validate", "demo")
MODEL_COMMANDS = ("generate", "chat", "validate", "demo")
ESCAPES = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f]")
HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\x08\r"


def binary() -> list[str]:
    path = os.environ.get("TENSORPORT_BINARY")
    if not path:
        pytest.skip("needs the plain binary: set TENSORPORT_BINARY to its path")
    return [str(Path(path).absolute())]


@pytest.fixture(params=["python", "binary"])
def command(request: pytest.FixtureRequest) -> list[str]:
    return PYTHON if request.param == "python" else binary()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some tenths of a second of work."""
    fields: dict[str, Any] = {"num_hidden_layers": 30, "vocab_size": 40_000, "num_local_experts": 12}
    return tensorport.synthesize(tmp_path_factory.mktemp("large") / "model", "tiny", progress=False, **fields)


def run(command: list[str], *arguments: object, **options: Any) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run([*command, *map(str, arguments)], capture_output=True, check=False, timeout=120, **options)
    # Decoded here, because text=True would turn carriage returns into newlines.
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_both_programs_print_the_same_results(tiny: Path, tmp_path: Path) -> None:
    programs, outputs = (PYTHON, binary()), []
    for program in programs:
        output = tmp_path / "out"
        converted = run(program, "convert", "--input", tiny, "--output", output, "--json", "--mxfp4", "dequantize")
        report = json.loads(converted.stdout)
        assert report.pop("seconds") > 0
        verified = json.loads(run(program, "verify", "--model", output, "--source", tiny, "--json").stdout)
        assert verified.pop("seconds") > 0
        others = [
            run(program, *arguments)
            for arguments in (
                ("inspect", tiny),
                ("inspect", tiny, "--json"),
                ("inspect", tiny, "--stats"),
                ("inspect", output, "--stats", "--json"),
                ("verify", "--model", output),
                ("verify", "--model", output, "--source", tiny),
                ("--help",),
                ("convert", "--help"),
            )
        ]
        assert all((other.returncode, other.stderr) == (0, "") and other.stdout for other in others)
        outputs.append((report, verified, [other.stdout for other in others], files(output)))
        output.rename(tmp_path / f"out-{len(outputs)}")
    assert outputs[0] == outputs[1]


def test_help_lists_all_commands(command: list[str]) -> None:
    shown = run(command, "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    listed = [line.split()[0] for line in shown.stdout.split("Commands:\n")[1].split("\n\n")[0].splitlines()]
    assert [name for name in listed if name != "help"] == list(COMMANDS)


def test_the_version_tells_the_two_programs_apart() -> None:
    assert run(PYTHON, "--version").stdout == f"tensorport {tensorport.__version__} (Python package)\n"
    assert run(binary(), "-V").stdout == f"tensorport {tensorport.__version__} (Rust binary)\n"


def test_results_go_to_stdout_and_a_bar_only_to_a_terminal_on_stderr(
    command: list[str], large: Path, tmp_path: Path
) -> None:
    arguments = ["convert", "--input", str(large), "--output", str(tmp_path / "out"), "--workers", "1", "--json"]
    reader, writer = pty.openpty()
    job = subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, stderr=writer)
    os.close(writer)
    shown = b""
    try:
        while piece := os.read(reader, 65536):
            shown += piece
    except OSError:  # the terminal's way to say that the other side is closed
        pass
    stdout, _ = job.communicate(timeout=60)
    os.close(reader)
    assert job.returncode == 0
    assert json.loads(stdout)["total_tensors"] == 573
    assert b"convert" in shown
    silent = run(command, *arguments, "--overwrite")
    assert (silent.returncode, silent.stderr) == (0, "")
    assert json.loads(silent.stdout)["verified"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Usage"),
        (["--unknown"], "--unknown"),
        (["unknown"], "unknown"),
        (["inspect"], "PATH"),
        (["inspect", "x", "--unknown"], "--unknown"),
        (["convert", "--input", "x"], "--output"),
        (["convert", "--input", "x", "--output", "y", "--precision", "float64"], "float64"),
        (["convert", "--input", "x", "--output", "y", "--mxfp4", "quantise"], "quantise"),
        (["convert", "--input", "x", "--output", "y", "--mxfp4", "quantize"], "quantize"),
        (["convert", "--input", "x", "--output", "y", "--quantize", "*"], "quantize"),
        (["convert", "--input", "x", "--output", "y", "--mxfp4", "quantize", "--quantize", "a["], "a["),
        (["convert", "--input", "x", "--output", "y", "--scale-rule", "ceil"], "scale_rule"),
        (["convert", "--input", "x", "--output", "y", "--scale-rule", "round"], "round"),
        (["convert", "--input", "x", "--output", "y", "--format", "zarr"], "zarr"),
        (["convert", "--input", "x", "--output", "y", "--max-memory", "1XB"], "1XB"),
        (["convert", "--input", "x", "--output", "y", "--max-memory", "1"], "max_memory"),
        (["convert", "--input", "x", "--output", "y", "--workers", "0"], "workers"),
        (["convert", "--input", "x", "--output", "y", "--workers", "-1"], "-1"),
        (["verify"], "--model"),
        (["verify", "--model", "x", "--workers", "many"], "many"),
    ],
)
def test_a_usage_error_exits_2_and_names_the_word(
    command: list[str], tmp_path: Path, arguments: list[str], words: str
) -> None:
    failed = run(command, *arguments, cwd=tmp_path)
    assert (failed.returncode, failed.stdout) == (2, "")
    assert words in failed.stderr
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("shard_size", ["0", "-1", "nan", "inf", "x"])
def test_an_impossible_shard_size_exits_2(command: list[str], tiny: Path, tmp_path: Path, shard_size: str) -> None:
    failed = run(command, "convert", "--input", tiny, "--output", tmp_path / "out", f"--shard-size={shard_size}")
    assert (failed.returncode, failed.stdout) == (2, "")
    assert "shard" in failed.stderr
    assert not (tmp_path / "out").exists()


def test_a_failed_job_exits_1_and_names_the_file(command: list[str], tiny: Path, tmp_path: Path) -> None:
    for arguments in (
        ["inspect", "missing"],
        ["verify", "--model", "missing"],
        ["convert", "--input", "missing", "--output", "out"],
    ):
        failed = run(command, *arguments, cwd=tmp_path)
        assert (failed.returncode, failed.stdout) == (1, "")
        assert re.fullmatch(r"error: missing: .*\n", failed.stderr)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").touch()
    failed = run(command, "convert", "--input", tiny, "--output", tmp_path / "foreign")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert "notes.txt" in failed.stderr


def test_a_damaged_tree_exits_1_and_is_described_on_stdout(command: list[str], tiny: Path, tmp_path: Path) -> None:
    tree = tmp_path / "out"
    assert run(command, "convert", "--input", tiny, "--output", tree, "--skip-verify").returncode == 0
    whole = run(command, "verify", "--model", tree, "--verbose")
    assert (whole.returncode, whole.stderr) == (0, "")
    assert "79 tensors verified\n1.21 MB read in" in whole.stdout
    (tree / "shard_000" / "lm_head_weight.npy").write_bytes(b"")
    broken = run(command, "verify", "--model", tree)
    assert broken.returncode == 1
    assert "shard_000/lm_head_weight.npy" in broken.stdout
    as_json = run(command, "verify", "--model", tree, "--json")
    assert as_json.returncode == 1
    assert [failure["tensor"] for failure in json.loads(as_json.stdout)["failures"]] == ["lm_head.weight"]


def test_flags_reach_the_conversion(command: list[str], tiny: Path, tmp_path: Path) -> None:
    flags = ["--precision", "float32", "--mxfp4", "dequantize", "--shard-size", "0.0005", "--max-memory", "1GiB"]
    chosen = ["--include", "model.layers.0.*", "--include", "*.weight", "--exclude", "*.bias", "--exclude", "lm_head.*"]
    more = ["--on-overflow", "saturate", "--workers", "2", "--format", "numpy-direct"]
    done = run(command, "convert", "--input", tiny, "--output", tmp_path / "out", *flags, *chosen, *more)
    assert (done.returncode, done.stderr) == (0, "")
    tensorport.convert(
        tiny,
        tmp_path / "same",
        precision="float32",
        mxfp4="dequantize",
        shard_size=0.0005,
        include=["model.layers.0.*", "*.weight"],
        exclude=["*.bias", "lm_head.*"],
        on_overflow="saturate",
        progress=False,
    )
    assert files(tmp_path / "out") == files(tmp_path / "same")


def test_control_c_exits_130_and_the_conversion_resumes(command: list[str], large: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = ["convert", "--input", str(large), "--output", str(output), "--json", "--workers", "1"]
    job = subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    journal = output / "journal.jsonl"
    while job.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > 10):
        time.sleep(0.0005)
    job.send_signal(signal.SIGINT)
    stdout, stderr = job.communicate(timeout=2)
    # The plain binary ends by the signal itself, which shells show as 130.
    assert job.returncode == (130 if command == PYTHON else -signal.SIGINT), stderr.decode()
    assert stdout == b""
    assert b"Traceback" not in stderr
    if command == PYTHON:
        assert b"--resume" in stderr
    finished = journal.read_bytes().count(b"\n") - 1
    resumed = run(command, *arguments, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout)["resumed_tensors"] == finished >= 10
    assert tensorport.verify(output, large, progress=False).ok


# With a pipe that nobody reads in place of stdout, of stderr, or of both.
@pytest.mark.parametrize("closed", ["stdout", "stderr", "both"])
@pytest.mark.parametrize(
    ("arguments", "status"),
    [(["inspect", "SOURCE"], 0), (["--help"], 0), (["inspect", "missing"], 1), (["nonsense"], 2)],
)
def test_a_closed_pipe_is_no_crash(
    command: list[str], tiny: Path, closed: str, arguments: list[str], status: int
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    words = [str(tiny) if word == "SOURCE" else word for word in arguments]
    stdout, stderr = (writer if closed in {name, "both"} else subprocess.PIPE for name in ("stdout", "stderr"))
    job = subprocess.Popen([*command, *words], stdout=stdout, stderr=stderr)
    os.close(writer)
    _, shown = job.communicate(timeout=60)
    assert job.returncode == status
    assert b"panicked" not in (shown or b"")
    assert b"Traceback" not in (shown or b"")


def test_head_ends_inspect_quietly(command: list[str], large: Path) -> None:
    job = subprocess.Popen([*command, "inspect", str(large)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert job.stdout is not None
    assert job.stdout.readline().split()[:2] == [b"name", b"dtype"]
    job.stdout.close()
    assert job.stderr is not None
    assert job.stderr.read() == b""
    job.stderr.close()
    assert job.wait(timeout=60) == 0


def test_no_stdout_at_all_is_no_crash(command: list[str], tiny: Path) -> None:
    shell = ["sh", "-c", '"$@" >&-', "sh"]
    done = run(shell, *command, "inspect", tiny)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_full_disk_behind_stdout_exits_1(command: list[str], tiny: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        job = subprocess.run([*command, "inspect", str(tiny)], stdout=full, stderr=subprocess.PIPE, check=False)
    assert job.returncode == 1
    assert job.stderr.startswith(b"error: standard output: ")


@pytest.fixture
def hostile(tmp_path: Path, write_safetensors: Write) -> Path:
    """A folder of checkpoints and a tree that carry escape sequences wherever there is room for text."""
    model = tmp_path / "model"
    model.mkdir()
    # As float16, the smallest values of float32 become zero, which is reported by tensor.
    tensors = {HOSTILE: ("F32", (2,), b"\1\0\0\0" * 2), "plain": ("U8", (1,), b"\0")}
    write_safetensors(model / "model.safetensors", tensors, {"note": HOSTILE})
    (tmp_path / "beside").mkdir()
    write_safetensors(tmp_path / "beside" / "model.safetensors", {"plain": tensors["plain"]})
    (tmp_path / "beside" / f"{HOSTILE}.txt").touch()
    tensorport.convert(model, tmp_path / "tree", progress=False)
    manifest = tmp_path / "tree" / "manifest.json"
    escaped = json.dumps(HOSTILE)[1:-1]
    manifest.write_text(manifest.read_text().replace("plain.npy", f"{escaped}.npy"))
    headers = {
        "dtype": {"a": {"dtype": HOSTILE, "shape": [1], "data_offsets": [0, 1]}},
        "field": {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1], HOSTILE: 1}},
        "size": {HOSTILE: {"dtype": "F32", "shape": [1], "data_offsets": [0, 1]}},
    }
    for name, content in headers.items():
        text = json.dumps(content).encode()
        (tmp_path / f"{name}.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\0")
    (tmp_path / "index").mkdir()
    index = {"metadata": {}, "weight_map": {"a": HOSTILE}}
    (tmp_path / "index" / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


@pytest.mark.parametrize(
    ("words", "status"),
    [
        ("inspect model", 0),
        ("inspect model --stats", 0),
        ("convert --input model --output out --precision float16", 0),
        ("convert --input beside --output out", 0),
        ("convert --input model --output beside", 1),
        ("verify --model tree --verbose", 1),
        ("inspect tree", 1),
        ("inspect dtype.safetensors", 1),
        ("inspect field.safetensors", 1),
        ("inspect size.safetensors", 1),
        ("inspect index", 1),
    ],
)
def test_escape_sequences_in_files_do_not_reach_the_terminal(
    command: list[str], hostile: Path, words: str, status: int
) -> None:
    done = run(command, *words.split(), cwd=hostile)
    assert done.returncode == status, done.stderr
    assert done.stdout + done.stderr
    assert not ESCAPES.findall(done.stdout + done.stderr), (done.stdout, done.stderr)


@pytest.mark.parametrize(
    ("name", "hint"), [("synthesize", "'tensorport'"), *((name, "'tensorport[jax,text]'") for name in MODEL_COMMANDS)]
)
def test_the_binary_says_which_commands_need_python(name: str, hint: str) -> None:
    for arguments in ([name], [name, "--output", "x", "--set", "a=1"], [name, "--help"]):
        answer = run(binary(), *arguments)
        assert (answer.returncode, answer.stdout) == (2, "")
        assert f"pip install {hint}" in answer.stderr


def test_synthesize_takes_its_flags(tmp_path: Path) -> None:
    flags = ["--preset", "tiny", "--layout", "original", "--seed", "7", "--set", "num_hidden_layers=2"]
    flags += ["--set", "swiglu_limit=5.5"]
    done = run(PYTHON, "synthesize", "--output", tmp_path / "a", *flags)
    assert (done.returncode, done.stderr) == (0, "")
    fields: dict[str, Any] = {"num_hidden_layers": 2, "swiglu_limit": 5.5}
    tensorport.synthesize(tmp_path / "b", "tiny", layout="original", seed=7, progress=False, **fields)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert done.stdout == f"{tensorport.open(tmp_path / 'a')!r}\n"


@pytest.mark.parametrize(
    ("flags", "status", "words"),
    [
        ([], 2, "--output"),
        (["--output", "x", "--preset", "huge"], 2, "huge"),
        (["--output", "x", "--layout", "flat"], 2, "flat"),
        (["--output", "x", "--seed", "-1"], 2, "seed"),
        (["--output", "x", "--set", "vocab_size"], 2, "FIELD=VALUE"),
        (["--output", "x", "--set", "vocab_size=many"], 2, "many"),
        (["--output", "x", "--set", "vocab_size=1.5"], 2, "vocab_size"),
        (["--output", "x", "--set", "unknown_field=1"], 2, "unknown_field"),
        (["--output", "x", "--set", "hidden_size=33"], 2, "hidden_size"),
        (["--output", "full"], 1, "full"),
    ],
)
def test_synthesize_refuses_what_it_cannot_do(tmp_path: Path, flags: list[str], status: int, words: str) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    failed = run(PYTHON, "synthesize", *flags, cwd=tmp_path)
    assert (failed.returncode, failed.stdout) == (status, "")
    assert words in failed.stderr
    assert "Traceback" not in failed.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_python_commands_end_quietly_where_nobody_reads(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [*PYTHON, "synthesize", "--preset", "tiny", "--output", str(tmp_path / "a")]
    job = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (job.returncode, job.stderr) == (0, b"")
    closed = run(["sh", "-c", '"$@" >&-', "sh"], *command[:-1], tmp_path / "b")
    assert (closed.returncode, closed.stderr) == (0, "")
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_python_commands_say_once_that_the_disk_behind_stdout_is_full(tmp_path: Path) -> None:
    command = [*PYTHON, "synthesize", "--preset", "tiny", "--output", str(tmp_path / "a")]
    with Path("/dev/full").open("wb") as full:
        job = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False)
    assert (job.returncode, job.stderr) == (1, b"error: [Errno 28] No space left on device\n")


@pytest.mark.parametrize("name", ["synthesize", *MODEL_COMMANDS])
def test_python_commands_have_help(name: str) -> None:
    shown = run(PYTHON, name, "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert ("--output" if name in {"synthesize", "demo"} else "--model") in shown.stdout


def test_demo_goes_from_a_checkpoint_to_text(tmp_path: Path) -> None:
    shown = run(PYTHON, "demo", "--output", tmp_path / "the demo")
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    steps = [line.split(":")[0] for line in lines if line[:1].isdigit()]
    assert steps == ["1. synthesize", "2. convert", "3. verify", "4. load", "5. generate"]
    assert sum(re.fullmatch(r"   \d+\.\d\d s", line) is not None for line in lines) == len(steps)
    checkpoint, tree = tmp_path / "the demo" / "checkpoint", tmp_path / "the demo" / "converted"
    assert tensorport.verify(tree, checkpoint, progress=False).ok

    # What the demo says last is right: the text comes again, and the commands run.
    begin = lines.index(f"The same in Python ({shlex.quote(sys.executable)}):") + 1
    program = [line.strip() for line in lines[begin : begin + 3]]
    (text,) = [ast.literal_eval(line.strip()) for line in lines if line.startswith("   'The first time")]
    again = run([sys.executable, "-c", "\n".join(program)])
    # The demo goes on behind end tokens, of which random weights make few.
    assert (again.returncode, again.stderr) == (0, "")
    assert text.startswith("The first time that people" + again.stdout.removesuffix("\n"))
    (inspect,) = [line for line in lines if line.startswith("  python -m tensorport inspect ")]
    looked = run([*PYTHON, *shlex.split(inspect)[3:]])
    assert (looked.returncode, looked.stderr) == (0, "")
