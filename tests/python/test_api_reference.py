"""docs/api.md is what the sources say, and has every public name with its documentation."""

import importlib
import importlib.util
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest
import tensorport

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def api_reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("api_reference", ROOT / "tools" / "api_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_sources_say(api_reference: ModuleType) -> None:
    page = (ROOT / "docs" / "api.md").read_text("utf-8")
    assert page == api_reference.render(), "run `python tools/api_reference.py`"


def test_every_public_name_is_on_the_page_and_documented(api_reference: ModuleType) -> None:
    sections = {}
    for section in re.split(r"^### ", api_reference.render(), flags=re.MULTILINE)[1:]:
        heading, _, text = section.partition("\n")
        sections[heading.strip("`")] = re.sub(r"^(```.*?^```|#+ .*?$)", "", text, flags=re.MULTILINE | re.DOTALL)
    public = {
        f"{name}.{attribute}"
        for name in api_reference.MODULES
        for attribute in importlib.import_module(name).__all__
        if not inspect.ismodule(getattr(importlib.import_module(name), attribute))
    }
    assert set(sections) == public
    assert not {name for name, text in sections.items() if not text.strip()}


def test_arguments_are_those_of_the_functions(api_reference: ModuleType) -> None:
    page = api_reference.render()
    for function in (tensorport.convert, tensorport.load_params, tensorport.load_model):
        (shown,) = re.findall(rf"^def {function.__name__}\((.*?)^\)", page, re.MULTILINE | re.DOTALL)
        names = re.findall(r"^    (\w+)", shown, re.MULTILINE)
        assert names == list(inspect.signature(function).parameters)


def test_the_stub_documents_errors_as_the_extension_does(api_reference: ModuleType) -> None:
    page = api_reference.render()
    for error in (
        tensorport.TensorportError,
        tensorport.CheckpointError,
        tensorport.MappingError,
        tensorport.ConversionError,
        tensorport.VerificationError,
    ):
        assert error.__doc__
        assert error.__doc__ in page
