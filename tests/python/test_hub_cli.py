"""The command line on ids of repositories: the same commands, one download, and errors without a traceback."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tensorport
from fake_hub import FakeHub

REPO = "org/model"

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(hub: FakeHub, tmp_path: Path) -> Run:
    """Runs the Python command line in whose environment the hub is, in an empty folder."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_CACHE": str(tmp_path / "hub-cache")}
    (tmp_path / "work").mkdir()

    def command(
        *arguments: str, program: tuple[str, ...] = (sys.executable, "-m", "tensorport"), **more: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*program, *arguments],
            env={**inherited, **environment, **more},
            cwd=tmp_path / "work",
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )

    return command


@pytest.fixture
def repository(hub: FakeHub, tiny: Path) -> Path:
    """What `org/model` holds."""
    hub.add(REPO, {path.name: path.read_bytes() for path in tiny.iterdir()})
    return tiny


def test_convert_verify_and_inspect_take_ids(hub: FakeHub, repository: Path, run: Run, tmp_path: Path) -> None:
    done = run("convert", "--input", REPO, "--output", "out")
    assert (done.returncode, done.stderr) == (0, "")
    downloads = hub.downloads()
    assert len(downloads) == len(set(downloads)) == len(list(repository.iterdir()))
    done = run("verify", "--model", "out", "--source", f"hf://{REPO}")
    assert (done.returncode, done.stderr) == (0, "")
    assert tensorport.verify(tmp_path / "work" / "out", repository, progress=False).ok
    done = run("inspect", REPO, "--json")
    assert done.returncode == 0
    found = {tensor["name"] for tensor in json.loads(done.stdout)["tensors"]}
    assert found == set(tensorport.open(repository))
    assert hub.downloads() == downloads


@pytest.mark.usefixtures("repository")
def test_flags_are_looked_at_before_anything_is_downloaded(hub: FakeHub, run: Run) -> None:
    assert run("convert", "--input", REPO, "--output", "out", "--precision", "float12").returncode == 2
    assert run("convert", "--input", REPO).returncode == 2
    assert hub.requests == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("convert", "--output", "out", "--input"),
        ("verify", "--model", "out", "--source"),
        ("inspect",),
        ("generate", "--prompt-ids", "1", "--model"),
        ("chat", "--model"),
        ("validate", "--model"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_an_error_names_both_readings_and_is_status_1(run: Run, arguments: tuple[str, ...]) -> None:
    done = run(*arguments, "nothing")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "error: nothing: found no such file or folder, and no id of a repository (an id has an organisation and a "
        "name: org/name), expected a path or org/name[@revision][/subfolder]\n"
    )
    done = run(*arguments, "org/nothing")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: org/nothing: found no such file or folder, and no repository org/nothing at ")
    assert done.stderr.count("\n") == 1


def test_hf_before_what_is_no_id_is_a_usage_error(run: Run) -> None:
    done = run("inspect", "hf://nothing")
    assert done.returncode == 2
    assert done.stderr.startswith("error: source: found 'hf://nothing', expected hf://org/name[@revision][/subfolder]")


def test_generate_runs_a_model_of_a_repository(hub: FakeHub, repository: Path, run: Run) -> None:
    arguments = ("--prompt-ids", "1,2,3", "--temperature", "0", "--max-new-tokens", "3", "--model")
    done = run("generate", *arguments, REPO)
    assert done.returncode == 0, done.stderr
    assert done.stdout == run("generate", *arguments, str(repository)).stdout != ""
    assert len(hub.downloads()) == len(list(repository.iterdir()))


def test_a_hub_that_is_not_there_is_one_line(run: Run) -> None:
    done = run("inspect", REPO, HF_HUB_OFFLINE="1")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: org/model: found no such file or folder, and no whole copy of org/model in ")
    assert done.stderr.count("\n") == 1


def test_the_plain_binary_names_the_package_that_reads_hubs(run: Run) -> None:
    path = os.environ.get("TENSORPORT_BINARY")
    if not path:
        pytest.skip("needs the plain binary: set TENSORPORT_BINARY to its path")
    binary = (str(Path(path).absolute()),)
    done = run("inspect", REPO, program=binary)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "error: org/model: found no such file or folder, expected a path; the id of a repository is for the Python "
        "package: pip install 'tensorport[hub]'\n"
    )
    assert (
        run("inspect", "nothing", program=binary).stderr == "error: nothing: No such file or directory (os error 2)\n"
    )
