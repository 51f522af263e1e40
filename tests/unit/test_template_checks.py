"""Chat templates are tried in a process of their own, as transformers would render them."""

import time
from pathlib import Path

import pytest
from checkpoints import TEMPLATE, edit_json, write_checkpoint

from quantize.checkpoint import read_checkpoint
from quantize.template_checks import WORDS, check_chat_template, render

FOR_ALL = "{% for m in messages %}{{ m.content }}{% endfor %}"

SOUND = {
    "plain": TEMPLATE,
    "tags of transformers": "{% for m in messages %}{% generation %}{{ m['content'] }}"
    "{% endgeneration %}{% if loop.index == 9 %}{% break %}{% endif %}{% endfor %}",
    "its functions": "{{ strftime_now('%d %b %Y') }}{{ messages | tojson(indent=2) }}",
    "special tokens": "{{ bos_token + messages[0].content + eos_token }}",
    "refuses system messages": "{% if messages[0].role == 'system' %}"
    "{{ raise_exception('no system') }}{% endif %}" + FOR_ALL,
    "insists on a system message": "{% if messages[0].role != 'system' %}"
    "{{ raise_exception('system first') }}{% endif %}" + FOR_ALL,
    "content in parts alone": "{% for part in messages[0].content %}{{ part.text }}{% endfor %}",
    "undefined names are false": "{% if tools %}{{ tools }}{% endif %}" + FOR_ALL,
    "a namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}"
    "{% set ns.n = ns.n + 1 %}{{ m.content }}{% endfor %}{{ ns.n }}",
    "string methods": "{{ messages[-1].content.strip().split('|')[0] }}",
}

BROKEN = {
    "{% for m in messages %}": "syntax error: ",
    "{{ messages[0].content }}\n{{ render(messages) }}": "'render' is undefined (line 2 of it)",
    "{{ raise_exception('never') }}": "does not render a plain message: never",
    "{{ messages[0].content | shout }}": "No filter named 'shout'",
    "{{ messages[0].text }}": "without what the user said",
    "Hello!": "without what the user said",
    "{{ ().__class__.__bases__ }}" + FOR_ALL: "unsafe",
    "{{ messages.append(1) }}" + FOR_ALL: "unsafe",
    "{% include 'other' %}" + FOR_ALL: "no loader",
    "{{ 'x' * 10 ** 11 }}" + FOR_ALL: "MemoryError",
    "{% for i in range(10 ** 9) %}{% endfor %}" + FOR_ALL: "Range too big",
}


def said(tmp_path: Path, template: str) -> str:
    folder = write_checkpoint(tmp_path / "model", template=template)
    edit_json(folder / "tokenizer_config.json", {"bos_token": {"content": "<s>"}})
    return " ".join(finding.message for finding in check_chat_template(read_checkpoint(folder)))


@pytest.mark.parametrize("name", SOUND)
def test_sound_templates(tmp_path: Path, name: str) -> None:
    assert said(tmp_path, SOUND[name]) == ""


@pytest.mark.parametrize("template", BROKEN)
def test_broken_templates(tmp_path: Path, template: str) -> None:
    assert BROKEN[template] in said(tmp_path, template)


def test_a_checkpoint_without_a_template_is_not_asked(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, template=None)
    assert check_chat_template(read_checkpoint(folder)) == []


def test_a_template_that_does_not_end_is_ended() -> None:
    loop = "{% for a in range(99999) %}"
    started = time.monotonic()
    rendered = render(loop * 3 + "{% endfor %}" * 3, {}, limit_seconds=2.0)
    assert rendered.stopped == "does not end within 2 s"
    assert time.monotonic() - started < 15


def test_what_is_rendered() -> None:
    results = render(
        "{{ bos_token }}{{ messages | length }}:{{ messages[0].content }}", {"bos_token": "<s>"}
    ).results
    assert [result["text"][:5] for result in results] == ["<s>1:", "<s>2:", "<s>1:", "<s>3:"]
    assert results[0]["text"] == f"<s>1:{WORDS}"
