"""The Modal app as far as it goes without an account: it builds, its flags are what the guide says, its jobs run.

The jobs run in a process of their own, as functions in a container do, on a tiny checkpoint from a hub on 127.0.0.1,
with a folder in place of the Volume. Modal's servers are never asked: in their place is a closed port, or a server on
127.0.0.1 that notes what the client asks for.
"""

import importlib.util
import json
import os
import pickle
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any, get_args

import numpy as np
import pytest
import tensorport
from fake_hub import serving
from tensorport.kernels import ImplementationName

click = pytest.importorskip("click")
modal = pytest.importorskip("modal")
fake_modal = pytest.importorskip("fake_modal")  # which needs modal

ROOT = Path(__file__).parents[2]
APP = "notebooks/modal/tensorport_app.py"
GUIDE = ROOT / "docs" / "modal.md"
WHEEL = "tensorport-1.2.3-cp311-abi3-manylinux_2_28_x86_64.whl"
REPO = "openai/gpt-oss-20b"
JOBS = ["download", "convert", "generate", "benchmark"]

TIMEOUT_S = 120
"""For processes that take some ten seconds."""

# Arguments: the app, a folder. Runs its four entrypoints; `remote` is `local` here, and the options that it was asked
# for are noted. A second download and a second conversion find all done.
RUNNER = """
import importlib.util, json, sys, warnings
# That there is no Volume: the folder is in its place.
warnings.filterwarnings("ignore", r"The \\w+ function is executing locally")
spec = importlib.util.spec_from_file_location("tensorport_app", sys.argv[1])
app = importlib.util.module_from_spec(spec)
spec.loader.exec_module(app)
folder, asked, results = sys.argv[2], [], []

class Here:
    def __init__(self, function):
        self.function = function
    def with_options(self, **options):
        asked.append(options)
        return Here(self.function.with_options(**options))
    def remote(self, *arguments, **options):
        results.append(self.function.local(*arguments, **options, folder=folder))
        return results[-1]

for name in ("download_model", "convert_model", "generate_text", "measure"):
    setattr(app, name, Here(getattr(app, name)))
app.download()
app.download()
app.generate(prompt="One", max_new_tokens=5, temperature=0.0, gpu="A10G")
app.convert()
app.convert()
settings = {"batches": "3,3", "prompt_tokens": 7, "new_tokens": 21, "implementation": "xla"}
app.benchmark(gpu="H100", memory_gib=7, output=folder + "/records.jsonl", **settings)
print("FACTS", json.dumps({"asked": asked, "results": results}))
"""


@pytest.fixture(autouse=True)
def closed_port(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No account, and no way to Modal's servers, in this process and in those that it starts."""
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    for name in ("MODAL_TOKEN_ID", "MODAL_TOKEN_SECRET", "MODAL_PROFILE", "TENSORPORT_CUDA"):
        monkeypatch.delenv(name, raising=False)


def environment(folder: Path) -> dict[str, str]:
    wheel = folder / WHEEL
    wheel.touch()
    return {
        "MODAL_CONFIG_PATH": str(folder / "modal.toml"),
        "MODAL_SERVER_URL": "http://127.0.0.1:9",
        "TENSORPORT_WHEEL": str(wheel),
    }


@pytest.fixture
def app() -> Iterator[ModuleType]:
    """The app's module, read anew."""
    spec = importlib.util.spec_from_file_location("tensorport_app", ROOT / APP)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["tensorport_app"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["tensorport_app"]


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny`, with one layer, for every job compiles the model anew. Not to be edited."""
    folder = tmp_path_factory.mktemp("synthesized") / "one_layer"
    return tensorport.synthesize(folder, "tiny", num_hidden_layers=1, progress=False)


@pytest.fixture(scope="module")
def jobs(one_layer: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """What the four jobs were asked for, returned and printed, and what the hub was asked for."""
    folder = tmp_path_factory.mktemp("volume")
    with serving() as hub:
        hub.add(REPO, {path.name: path.read_bytes() for path in one_layer.iterdir()})
        variables = os.environ | environment(tmp_path_factory.mktemp("wheel"))
        variables |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(folder / "home"), "JAX_PLATFORMS": "cpu"}
        variables.pop("HF_HUB_CACHE", None)
        job = subprocess.run(
            [sys.executable, "-W", "error", "-c", RUNNER, str(ROOT / APP), str(folder)],
            env=variables,
            capture_output=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert job.returncode == 0, job.stderr.decode()
        # As bytes: random words have line ends of all kinds.
        printed, facts = job.stdout.decode().split("FACTS ")
        told: dict[str, Any] = json.loads(facts)
        return told | {"folder": folder, "printed": printed, "downloads": hub.downloads()}


def run_modal(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`modal` on the command line, as users run it; wide, for it folds lines."""
    command = [sys.executable, "-m", "modal", *arguments]
    variables = os.environ | {"COLUMNS": "400", "NO_COLOR": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


# It builds.


def test_modal_finds_the_four_jobs() -> None:
    listed = run_modal("run", APP)
    assert listed.returncode != 0
    for job in (*JOBS, "download_model", "convert_model", "generate_text", "measure"):
        assert re.search(rf"- .*\b{job}\b", listed.stderr + listed.stdout), job


def test_a_run_without_an_account_ends_at_once() -> None:
    ended = run_modal("run", f"{APP}::generate", "--gpu", "L4")
    assert ended.returncode != 0
    assert "Token missing" in ended.stderr + ended.stdout


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An account at a server that notes what it is asked for."""
    with fake_modal.serving_modal() as fake:
        monkeypatch.setenv("MODAL_SERVER_URL", fake.url)
        monkeypatch.setenv("MODAL_TOKEN_ID", "ak-of-nobody")
        monkeypatch.setenv("MODAL_TOKEN_SECRET", "as-of-nobody")
        yield fake


def test_modal_gets_an_image_that_installs_the_wheel_and_functions_with_the_volume(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    deployed = run_modal("deploy", APP)
    assert deployed.returncode == 0, deployed.stdout + deployed.stderr
    commands = [
        command for request in server.asked("ImageGetOrCreate") for command in request.image.dockerfile_commands
    ]
    assert any(command.startswith("FROM python:3.12.") for command in commands)
    assert f"RUN python -m pip install '/wheels/{WHEEL}[cuda13,hub,text]'" in commands
    assert "ENV XLA_PYTHON_CLIENT_MEM_FRACTION=0.9" in commands
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert {"cuda12", "cuda13", "hub", "text"} <= set(project["optional-dependencies"])

    copied = [PurePosixPath(file.filename) for request in server.asked("MountGetOrCreate") for file in request.files]
    assert PurePosixPath("/wheels", WHEEL) in copied
    assert "tensorport_app.py" in {file.name for file in copied}
    assert [dict(request.env_dict) for request in server.asked("SecretGetOrCreate")] == [{"HF_TOKEN": "hf_of_nobody"}]
    (volume,) = server.asked("VolumeGetOrCreate")
    assert volume.deployment_name == "tensorport-models"

    functions = {request.function.function_name: request.function for request in server.asked("FunctionCreate")}
    assert set(functions) == {"download_model", "convert_model", "generate_text", "measure"}
    for name, function in functions.items():
        assert [mount.mount_path for mount in function.volume_mounts] == ["/models"]
        assert len(function.secret_ids) == 1
        is_on_gpu = name in {"generate_text", "measure"}
        assert function.resources.gpu_config.gpu_type == ("L40S" if is_on_gpu else "")
        assert function.timeout_secs == (3600 if is_on_gpu else 4 * 3600)


def test_a_run_asks_for_the_gpu_of_its_flag(server: Any) -> None:
    model = "openai/gpt-oss-120b"
    ended = run_modal("run", f"{APP}::benchmark", "--gpu", "H100", "--model", model, "--batches", "1,3")
    assert "no machine is behind this server" in ended.stdout + ended.stderr
    (bound,) = server.asked("FunctionBindParams")
    resources = bound.function_options.resources
    assert (resources.gpu_config.gpu_type, resources.gpu_config.count) == ("H100!", 1)
    assert (resources.milli_cpu, resources.memory_mb) == (8000, 80 * 1024)
    (called,) = server.asked("FunctionMap")
    arguments, options = pickle.loads(called.pipelined_inputs[0].input.args)
    assert arguments == (model,)
    assert options["batches"] == (1, 3)


@pytest.mark.parametrize("secret", [None, "hf_of_nobody"])
def test_a_container_reads_the_app_without_a_wheel_and_with_the_same_objects(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, secret: str | None
) -> None:
    """Modal refuses a container whose functions depend on another number of objects than those that were built."""
    container = tmp_path / "root" / "tensorport_app.py"  # where Modal puts it, without the checkout around it
    container.parent.mkdir()
    container.write_bytes((ROOT / APP).read_bytes())
    monkeypatch.delenv("TENSORPORT_WHEEL")
    monkeypatch.setattr(modal, "is_local", lambda: False)
    if secret:
        monkeypatch.setenv("HF_TOKEN", secret)
    spec = importlib.util.spec_from_file_location("tensorport_app", container)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert isinstance(module.image, modal.Image)
    assert isinstance(module.token, modal.Secret)
    assert isinstance(module.download_model, modal.Function)


def test_the_newest_wheel_for_linux_is_taken(app: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TENSORPORT_WHEEL")
    monkeypatch.setattr(app, "__file__", str(tmp_path / "notebooks" / "modal" / "tensorport_app.py"))
    dist = tmp_path / "dist"
    dist.mkdir()
    names = [
        "tensorport-0.10.0-cp311-abi3-linux_x86_64.whl",
        "tensorport-0.9.0-cp311-abi3-manylinux_2_28_x86_64.whl",
        "tensorport-0.11.0-cp311-abi3-manylinux_2_28_aarch64.whl",
        "tensorport-0.11.0-cp311-abi3-macosx_11_0_arm64.whl",
        "tensorport-0.11.0.tar.gz",
    ]
    for second, name in enumerate(names):
        (dist / name).touch()
        os.utime(dist / name, (1000 + second, 1000 + second))
    assert app.find_wheel() == dist / names[1]


def test_a_missing_wheel_is_an_error_that_says_how_to_build_one(
    app: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as context:
        context.setenv("TENSORPORT_WHEEL", str(tmp_path / "none.whl"))
        ended = run_modal("run", f"{APP}::download")
    assert ended.returncode != 0
    assert re.search(r"TENSORPORT_WHEEL: found no file .*none\.whl, expected a wheel", ended.stderr + ended.stdout)

    monkeypatch.delenv("TENSORPORT_WHEEL")
    monkeypatch.setattr(app, "__file__", str(tmp_path / "notebooks" / "modal" / "tensorport_app.py"))
    with pytest.raises(FileNotFoundError, match="dist: found no wheel for Linux on x86_64, expected one; `make wheel`"):
        app.find_wheel()


# GPUs.


def test_gpus_are_those_of_the_flag_in_modals_spelling(app: ModuleType) -> None:
    assert get_args(app.Gpu) == tuple(app.GPUS)
    assert {"T4", "L4", "A10G", "L40S", "A100", "H100", "H200", "B200"} <= set(app.GPUS)
    # The list of https://modal.com/docs/guide/gpu, read on 2026-11-28.
    published = {"T4", "L4", "A10", "L40S", "A100", "A100-40GB", "A100-80GB", "RTX-PRO-6000", "H100", "H100!", "H200"}
    assert set(app.GPUS.values()) <= published | {"B200", "B200+"}
    for gpu in app.GPUS:
        options = app.resources(gpu, REPO)
        assert options == {"cpu": 8, "gpu": app.GPUS[gpu], "memory": 24 * 1024}
        assert isinstance(app.generate_text.with_options(**options), modal.Function)


def test_implementations_are_those_of_the_package(app: ModuleType) -> None:
    assert set(get_args(app.Implementation)) <= set(get_args(ImplementationName))


def test_a_large_model_gets_more_memory_and_a_flag_decides(app: ModuleType) -> None:
    assert app.resources("H200", "openai/gpt-oss-120b")["memory"] == 80 * 1024
    assert app.resources("H200", "openai/gpt-oss-120b", 7)["memory"] == 7 * 1024


def test_an_unknown_gpu_is_refused_with_the_list(app: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"gpu: found 'K80', expected one of T4, L4, A10G, .*, B200$"):
        app.resources("K80", REPO)
    refused = run_modal("run", f"{APP}::benchmark", "--gpu", "K80")
    assert refused.returncode != 0
    assert re.search(r"'--gpu': 'K80' is not one of 'T4', 'L4', 'A10G', .*'B200'", refused.stderr + refused.stdout)


# The jobs.


def test_download_fills_the_volume_once(jobs: Mapping[str, Any], one_layer: Path) -> None:
    first, second = jobs["results"][0], jobs["results"][1]
    assert first == second
    checkpoint = tensorport.open(one_layer)
    assert Path(first["path"]).is_relative_to(jobs["folder"] / "hub")
    assert (first["tensors"], first["parameters"], first["nbytes"]) == (
        len(checkpoint),
        checkpoint.total_parameters,
        checkpoint.nbytes,
    )
    assert jobs["downloads"].count("model.safetensors") == 1


def test_convert_writes_a_verified_tree_once(jobs: Mapping[str, Any], one_layer: Path) -> None:
    first, second = jobs["results"][3], jobs["results"][4]
    assert first == second
    assert first["verified"]
    assert Path(first["tree"]) == jobs["folder"] / "trees" / "openai--gpt-oss-20b"
    assert tensorport.verify(first["tree"], one_layer, progress=False).ok


def test_generate_continues_the_prompt(jobs: Mapping[str, Any], one_layer: Path) -> None:
    text = jobs["results"][2]
    assert text == tensorport.load_model(one_layer).generate("One", max_new_tokens=5, temperature=0)
    assert f"\n{text}\n" in jobs["printed"]


def test_the_tree_is_loaded_where_there_is_one_and_else_the_download(jobs: Mapping[str, Any]) -> None:
    sources = re.findall(r"^tensorport .* on cpu, (.*)$", jobs["printed"], re.MULTILINE)
    assert sources == [REPO, str(jobs["folder"] / "trees" / "openai--gpt-oss-20b")]


def test_jobs_on_a_gpu_say_which_kernels_run(jobs: Mapping[str, Any]) -> None:
    explanations = re.findall(r"^mxfp4\.moe on cpu:\n((?:  .*\n)+)", jobs["printed"], re.MULTILINE)
    chosen = [re.findall(r"^  (\w+): runs$", text, re.MULTILINE) for text in explanations]
    assert chosen == [["native"], ["xla"]]


def test_jobs_ask_modal_for_the_gpu_and_the_memory(jobs: Mapping[str, Any]) -> None:
    asked = [(options["gpu"], options["memory"]) for options in jobs["asked"]]
    assert asked == [("A10", 24 * 1024), ("H100!", 7 * 1024)]


def test_benchmark_measures_each_batch_and_writes_the_records(jobs: Mapping[str, Any]) -> None:
    records = jobs["results"][5]
    lines = (jobs["folder"] / "records.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == records
    sizes = [(record["batch"], record["prompt_tokens"], record["new_tokens"]) for record in records]
    assert sizes == [(3, 21, 63)] * 2  # of one size, for another one takes seconds to compile
    for record in records:
        assert record["tensorport"] == tensorport.__version__
        assert (record["model"], record["device"], record["implementation"]) == (REPO, "cpu", "xla")
        assert record["peak_bytes"] is None  # which a CPU does not say
        seconds = np.array([record["prefill_s"], record["first_token_s"], record["total_s"], record["load_s"]])
        assert (seconds > 0).all()
        assert record["prefill_s"] <= record["first_token_s"] <= record["total_s"]
        assert record["tokens_per_s"] > 0
    assert "records.jsonl: 2 records" in jobs["printed"]


def test_a_checkpoint_that_was_uploaded_comes_before_the_hub(app: ModuleType, tmp_path: Path) -> None:
    assert app.source_of("demo", str(tmp_path)) == "demo"
    (tmp_path / "demo").mkdir()
    assert app.source_of("demo", str(tmp_path)) == str(tmp_path / "demo")


# The guide.


def commands_of(path: Path) -> list[str]:
    """Lines of shell blocks that call `modal`; continued lines are one."""
    blocks = re.findall(r"^```sh\n(.*?)^```", path.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [command for line in lines for command in line.split(" && ") if re.search(r"^(\w+=\S+ )*modal ", command)]


COMMANDS = commands_of(GUIDE)


def parse(words: list[str]) -> dict[str, Any]:
    """What modal's own parser makes of a command, which is not run.

    Raises:
        click.ClickException: there is no such command, flag or value.
    """
    from modal.cli.entry_point import entrypoint_cli  # noqa: PLC0415 - imports all of Modal's commands

    command, context = entrypoint_cli, click.Context(entrypoint_cli, info_name="modal")
    while isinstance(command, click.Group):
        parser = command.make_parser(context)
        context.params, words, _ = parser.parse_args(args=list(words))
        context.params = {parameter.name: context.params.get(parameter.name) for parameter in command.params}
        found = command.get_command(context, words[0])
        if found is None:
            raise click.UsageError(f"found {words[0]!r}, expected a command of {context.info_name}")
        command, context = found, click.Context(found, info_name=words[0], parent=context)
        words = words[1:]
    try:
        return dict(command.make_context(context.info_name, list(words), parent=context.parent).params)
    except click.exceptions.Exit:  # --help was asked for, and printed
        return {}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_guide_parses(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = [word for word in shlex.split(command, comments=True) if not re.match(r"[A-Z_]+=", word)]
    parse(words[1:])


def test_a_command_that_the_app_has_not_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert parse(["run", f"{APP}::generate", "--gpu", "B200", "--seed", "7"])["seed"] == 7
    wrong = [
        ["run", f"{APP}::generate", "--gpus", "B200"],
        ["run", f"{APP}::generate", "--gpu", "B300"],
        ["run", f"{APP}::train"],
        ["volume", "list-all"],
        ["volumes", "list"],
    ]
    for words in wrong:
        with pytest.raises(click.ClickException):
            parse(words)


def test_the_guide_has_every_job_and_every_gpu(app: ModuleType) -> None:
    text = GUIDE.read_text("utf-8")
    told = {match[1] for command in COMMANDS if (match := re.search(r"::(\w+)", command))}
    assert told == set(JOBS)
    for gpu in app.GPUS:
        assert re.search(rf"^\| `{re.escape(gpu)}` \| `{re.escape(app.GPUS[gpu])}` \|", text, re.MULTILINE), gpu


def test_links_of_the_guide_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", GUIDE.read_text("utf-8"))
    assert targets
    for target in targets:
        assert (GUIDE.parent / target).exists(), target
