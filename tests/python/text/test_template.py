"""render(): chat templates as transformers renders them, in a sandbox; and the template of synthesized checkpoints."""

import dataclasses
import itertools
import json
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from tensorport.text import Tokenizer, render

CASES = Path(__file__).parents[2] / "data" / "gpt_oss_chat" / "cases.json"
USER = [{"role": "user", "content": "Hi <b>é"}]


def cases() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(CASES.read_text("utf-8"))
    assert len(found) > 10
    return found


def without_date(prompt: str) -> str:
    return re.sub(r"Current date: \d{4}-\d\d-\d\d\n", "Current date: DATE\n", prompt)


@pytest.fixture(scope="module")
def template(tiny: Path) -> str:
    return (tiny / "chat_template.jinja").read_text("utf-8")


@pytest.mark.parametrize("case", cases(), ids=range(len(cases())))
def test_the_synthesized_template_renders_as_that_of_gpt_oss(template: str, case: dict[str, Any]) -> None:
    arguments = {"tools": case.get("tools"), "add_generation_prompt": case.get("add_generation_prompt", True)}
    arguments |= case.get("variables", {})
    if case["prompt"] is None:  # refused there
        with pytest.raises(ValueError, match=r"chat template: .*found .*, expected"):
            render(template, case["messages"], **arguments)
    else:
        assert without_date(render(template, case["messages"], **arguments)) == case["prompt"]


# Templates in the manner of several models; what they share is what transformers adds to Jinja.
TEMPLATES = {
    "chatml": "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "blocks": "{% if true %}\n  {% for m in messages %}\n    {{ m.content | trim }}\n  {% endfor %}\n{% endif %}\n.\n",
    "tojson": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ {'b': 1, 'a': '<'} | tojson(sort_keys=1) }}"
    "{{ messages[0] | tojson(ensure_ascii=true, separators=(',', ':')) }}",
    "loop controls": "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% elif i > 4 %}{% break %}{% endif %}{{ i }}"
    "{% endfor %}",
    "generation": "{% set x = 1 %}{% for m in messages %}{% generation %}{{ m.content }}{% set x = 2 %}"
    "{% endgeneration %}{{ x }}{% endfor %}",
    "names": "{% set ns = namespace(a=1, self=2) %}{% set ns.a = ns.a + 1 %}{{ ns.a }}{{ ns.self }}{{ dict(a=1) }}"
    "{{ dict.fromkeys([1], 2) }}{{ documents is none }}{{ tools is none }}{{ tools is defined }}",
    "variables": "{{ bos_token }}{{ number + 1 }}{{ flag }}{{ nothing is defined }}{{ messages | length }}",
    "undefined": "[{{ messages[0].nothing }}]{% if nothing %}x{% endif %}",
    "reasoning": "{% for m in messages %}{{ m.reasoning_content }}{{ m.thinking }}{% endfor %}",
    "year": "{{ strftime_now('%Y') }}",
    "raises": "{{ raise_exception('no ' + messages[0].role) }}",
    "broken": "{% for m in messages %}",
    "wrong types": "{{ messages[0].content + 1 }}",
}
CHATS: dict[str, list[dict[str, Any]]] = {
    "user": USER,
    "parts": [{"role": "user", "content": "  a\n"}, {"role": "assistant", "content": "b", "reasoning": "because"}],
    "none": [{"role": "assistant", "content": "c", "tool_calls": None, "reasoning_content": "so", "n": [1, 2.5, True]}],
}
VARIABLES = {"bos_token": "<s>", "number": 2, "flag": False}


def test_templates_render_as_in_transformers(tiny: Path, template: str) -> None:
    transformers: Any = pytest.importorskip("transformers", reason="needs transformers")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tiny)
    failed = set()
    everything = {**TEMPLATES, "gpt-oss": template}
    for (name, text), (chat, messages), prompted in itertools.product(everything.items(), CHATS.items(), (0, 1)):
        arguments: dict[str, Any] = {"add_generation_prompt": bool(prompted), **VARIABLES}
        try:
            expected = theirs.apply_chat_template(messages, chat_template=text, tokenize=False, **arguments)
        except Exception:  # whatever Jinja or Python raise there
            failed.add(name)
            with pytest.raises(ValueError, match="chat template"):
                render(text, messages, **arguments)
        else:
            assert render(text, messages, **arguments) == expected, (name, chat, prompted)
    assert failed == {"raises", "broken", "wrong types"}


def test_a_prompt_has_the_ids_that_transformers_finds(tiny: Path) -> None:
    transformers: Any = pytest.importorskip("transformers", reason="needs transformers")
    theirs, ours = transformers.PreTrainedTokenizerFast.from_pretrained(tiny), Tokenizer.from_directory(tiny)
    for case in cases():
        if case["prompt"] is not None:
            arguments = {"tools": case.get("tools"), "add_generation_prompt": True, **case.get("variables", {})}
            expected = theirs.apply_chat_template(case["messages"], return_dict=False, **arguments)
            assert ours.encode(ours.chat_prompt(case["messages"], **arguments)) == expected


def test_the_date_is_todays(template: str) -> None:
    before = datetime.now()
    prompt = render(template, USER)
    assert f"Current date: {before:%Y-%m-%d}" in prompt or f"Current date: {datetime.now():%Y-%m-%d}" in prompt


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no such role') }}", "chat template: no such role"),
        ("a\n{% if %}", "chat template, line 2: Expected an expression"),
        ("{% include 'other' %}", "chat template: no loader"),
        ("{{ nothing.at.all }}", "chat template: 'nothing' is undefined"),
        ("{{ 1 / 0 }}", "chat template: division by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "chat template: maximum recursion depth"),
    ],
)
def test_faults_of_templates_are_value_errors(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        render(template, USER)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ strftime_now.__globals__['json'] }}",
        "{{ self.__init__.__globals__ }}",
        "{{ namespace.mro() }}",
        "{{ namespace(__class__=1) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({}) }}",
        "{{ tools[0].clear() }}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
    ],
)
def test_hostile_templates_stay_in_the_sandbox(template: str) -> None:
    messages, tools = [{"role": "user", "content": "x"}], [{"type": "function"}]
    with pytest.raises(ValueError, match=r"unsafe|underscore|Range too big"):
        render(template, messages, tools=tools)
    assert (messages, tools) == ([{"role": "user", "content": "x"}], [{"type": "function"}])


@pytest.mark.parametrize(
    "template",
    [
        "{{ lipsum.__globals__ }}",
        "{{ ''|attr('__class__') }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ dict.__class__ }}",
    ],
)
def test_what_the_sandbox_hides_is_undefined(template: str) -> None:
    assert render(template, USER) == ""


def test_templates_see_nothing_but_plain_data() -> None:
    class Dangerous:
        def delete(self) -> str:
            raise AssertionError

    for arguments in ({"tools": [{"f": Dangerous()}]}, {"x": Dangerous()}):
        with pytest.raises(TypeError, match="found Dangerous, expected texts, numbers, lists and dicts"):
            render("{{ x.delete() }}", USER, **arguments)
    with pytest.raises(TypeError, match="messages: found Dangerous"):
        render("", [{"role": "user", "content": Dangerous()}])
    with pytest.raises(TypeError, match="messages: found str, expected dicts"):
        render("", "Hello")  # type: ignore[arg-type]

    @dataclasses.dataclass
    class Call:
        name: str

    assert render("{{ x.name }}", USER, x=Call("f")) == "f"


def test_without_jinja_the_error_names_the_extra() -> None:
    code = "import sys; sys.modules['jinja2'] = None\nfrom tensorport.text import render\nrender('', [])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "ImportError: chat templates need Jinja: pip install 'tensorport[text]'"
