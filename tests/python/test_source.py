"""What a source names: a path, or the id of a repository; and the one error for what is neither."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tensorport
from tensorport.hub.ids import HubId, parse
from tensorport.source import local_path

COMMIT = "0123456789abcdef0123456789abcdef01234567"

IDS = {
    "openai/gpt-oss-20b": HubId("openai/gpt-oss-20b"),
    "openai/gpt-oss-20b/original": HubId("openai/gpt-oss-20b", None, "original"),
    "org/name@v1.0": HubId("org/name", "v1.0"),
    f"org/name@{COMMIT}/a/b": HubId("org/name", COMMIT, "a/b"),
    "org/name@refs/pr/3": HubId("org/name", "refs/pr/3"),
    "org/name@refs/pr/3/sub": HubId("org/name", "refs/pr/3", "sub"),
    "org/name@feature%2Fx/sub": HubId("org/name", "feature/x", "sub"),
    "o_1/n.a-m_e": HubId("o_1/n.a-m_e"),
    "org/name/sub@folder": HubId("org/name", None, "sub@folder"),
}

NO_IDS = {
    "name": "an organisation and a name",
    "./model": "'.' is no name",
    "../model": "'..' is no name",
    "/org/name": "'' is no name",
    "org//name": "'' is no name",
    "org/name/": "'' is no folder",
    "org/name//sub": "is no folder",
    "org/name/../other": "is no folder",
    "org/name@": "'' is no branch",
    "org/name@..%2Fother": "is no branch",
    "org/na me": "'na me' is no name",
    "org/-name": "'-name' is no name",
    "org/a--b": "'a--b' is no name",
    "~/model": "'~' is no name",
    "C:\\models\\x": "an organisation and a name",
    "models/model.safetensors": "names a folder, and this a file",
}


@pytest.mark.parametrize("text", IDS)
def test_an_id_has_organisation_name_revision_and_folder(text: str) -> None:
    assert parse(text) == parse(f"hf://{text}") == IDS[text]
    assert str(IDS[text]) == text


@pytest.mark.parametrize("text", NO_IDS)
def test_what_is_no_id_says_why_beside_the_missing_path(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        local_path(text)
    message = str(caught.value)
    assert message.startswith(f"{text}: found no such file or folder, and no id of a repository (")
    assert NO_IDS[text] in message
    assert message.endswith("expected a path or org/name[@revision][/subfolder]")
    assert caught.value.filename == text
    with pytest.raises(ValueError, match=r"source: found .* expected hf://org/name\[@revision\]\[/subfolder\]: "):
        local_path(f"hf://{text}")


def test_a_path_that_exists_wins_over_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert local_path("org/name") == Path("org/name")
    (tmp_path / "org" / "link").symlink_to("nowhere")
    assert local_path("org/link") == Path("org/link")


def test_only_a_string_is_an_id() -> None:
    with pytest.raises(FileNotFoundError, match="which only a string can be"):
        local_path(Path("no-such-org/no-such-name"))


def test_every_function_with_a_source_says_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for function in (
        tensorport.open,
        tensorport.load_params,
        tensorport.load_params_shapes,
        tensorport.load_model,
        tensorport.validate,
        tensorport.models.gpt_oss.load,
        tensorport.models.gpt_oss.load_config,
        lambda source: tensorport.convert(source, "out", progress=False),
        lambda source: tensorport.verify("out", source, progress=False),
    ):
        with pytest.raises(FileNotFoundError, match="missing: found no such file or folder, and no id"):
            function("missing")


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )


def test_without_the_extra_an_id_names_it_and_a_path_needs_none(tiny: Path) -> None:
    code = "import sys; sys.modules['huggingface_hub'] = None\nimport tensorport\n"
    assert run(code + f"tensorport.open({str(tiny)!r})").returncode == 0
    for call in ("open('openai/gpt-oss-20b')", "convert('openai/gpt-oss-20b', 'out')"):
        done = run(f"{code}tensorport.{call}")
        assert done.stderr.splitlines()[-1] == (
            "ImportError: openai/gpt-oss-20b: found no such file or folder, and an id of a repository needs "
            "huggingface_hub: pip install 'tensorport[hub]'"
        )


def test_importing_tensorport_and_opening_paths_imports_no_huggingface_hub(tiny: Path) -> None:
    code = f"import sys, tensorport; tensorport.open({str(tiny)!r}); print('huggingface_hub' in sys.modules)"
    assert run(code).stdout == "False\n"
