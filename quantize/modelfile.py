"""A Modelfile for Ollama beside a GGUF file: template, stop texts, sampling.

Ollama reads a Modelfile's FROM, TEMPLATE (Go's text/template), PARAMETER and LICENSE
(https://github.com/ollama/ollama/blob/main/docs/modelfile.md). Without TEMPLATE it looks whether
the file's chat template is one of those that it knows, and otherwise gives the model the bare
prompt. So the template is *tried*: a few conversations are rendered, what stands before and after
each message is taken for the role's, and a TEMPLATE is written only if putting these together gives
all of the renderings again. Templates that do more (tools, thinking, another form for the last
turn) get none, and the file says so. Not run in Ollama here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.model_files import chat_template, read_json_object, special_tokens
from quantize.template_checks import render

SYSTEM, USER, ASSISTANT = "Zyqsys", "Zyqusr", "Zyqast"
"""What each role says: words that no template writes by itself."""

PARAMETERS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
"""generation_config.json's name of a setting → Ollama's."""

UNSAFE = ('"""', "{{", "}}")
"""What cannot stand in a TEMPLATE as text."""

Messages = list[dict[str, Any]]


def _said(*turns: tuple[str, str]) -> Messages:
    return [{"role": role, "content": text} for role, text in turns]


CONVERSATIONS: tuple[Messages, ...] = (
    _said(("user", USER)),
    _said(("system", SYSTEM), ("user", USER)),
    _said(("user", USER), ("assistant", ASSISTANT), ("user", USER + "2")),
    _said(
        ("system", SYSTEM),
        ("user", USER),
        ("assistant", ASSISTANT),
        ("user", USER + "2"),
        ("assistant", ASSISTANT + "2"),
        ("user", USER + "3"),
    ),
)


@dataclass(frozen=True)
class Turns:
    """What a template writes around messages, by role, and where the answer begins."""

    around: Mapping[str, tuple[str, str]]
    answer: str

    def render(self, messages: Messages) -> str:
        """A conversation, ready to be answered."""
        parts = [
            self.around[m["role"]][0] + m["content"] + self.around[m["role"]][1] for m in messages
        ]
        return "".join(parts) + self.answer


def modelfile(source: Path, file: str, licence: str | None = None) -> str:
    """The text of a Modelfile for `file`, by the checkpoint that it was made from."""
    lines = [f"FROM ./{file}"]
    template, tokens = chat_template(source), special_tokens(source)
    turns = turns_of(template, tokens) if template is not None else None
    if turns is not None:
        lines.append(f'TEMPLATE """{go_template(turns)}"""')
    elif template is not None:
        lines += [
            "# No TEMPLATE: the model's chat template is not a plain sequence of turns. Ollama has",
            "# its own where it knows the model: compare its answers with llama-server's, which",
            "# runs the template itself.",
        ]
    generation = source / "generation_config.json"
    settings = read_json_object(generation) if generation.is_file() else {}
    stops = [tokens["eos_token"]] if "eos_token" in tokens else []
    lines += [f'PARAMETER stop "{stop}"' for stop in stops if '"' not in stop]
    lines += [f"PARAMETER {name} {value}" for name, value in _sampling(settings).items()]
    if licence:
        lines.append(f'LICENSE """{licence}"""')
    return "\n".join(lines) + "\n"


def _sampling(settings: Mapping[str, Any]) -> dict[str, float | int]:
    """What generation_config.json sets; greedy where it does not sample."""
    found = {
        theirs: settings[ours]
        for ours, theirs in PARAMETERS.items()
        if type(settings.get(ours)) in (int, float)
    }
    if settings.get("do_sample") is False:
        found["temperature"] = 0
    return found


def turns_of(template: str, tokens: Mapping[str, str]) -> Turns | None:
    """What the template writes around each role's message; None where that is not all it does."""
    rendered = render(template, dict(tokens), CONVERSATIONS)
    texts = [result.get("text") for result in rendered.results]
    if rendered.stopped or texts[2] is None:
        return None
    bos = tokens.get("bos_token", "")
    plain = [text.removeprefix(bos) if text is not None and bos else text for text in texts]
    turns = _from_long(plain[2] or "", plain[1])
    if turns is None:
        return None
    for messages, text in zip(CONVERSATIONS, plain, strict=True):
        if text is not None and turns.render(messages) != text:
            return None
    return turns if not any(bad in turns.render(CONVERSATIONS[0]) for bad in UNSAFE) else None


def _from_long(text: str, with_system: str | None) -> Turns | None:
    """From user, assistant, user: the first user's beginning repeats before the second."""
    try:
        before_user, rest = text.split(USER, 1)
        between, rest = rest.split(ASSISTANT, 1)
        again, answer = rest.split(USER + "2", 1)
    except ValueError:
        return None
    if not again.endswith(before_user):
        return None
    after_assistant = again[: len(again) - len(before_user)] if before_user else again
    # Both are the user's end and the assistant's beginning.
    if between != answer:
        return None
    after_user = after_assistant if answer.startswith(after_assistant) else ""
    answer = answer[len(after_user) :]
    around = {"user": (before_user, after_user), "assistant": (answer, after_assistant)}
    if with_system is not None:
        try:
            before_system, rest = with_system.split(SYSTEM, 1)
        except ValueError:
            return None
        after_system, found, _ = rest.partition(before_user + USER)
        if not found:
            return None
        around["system"] = (before_system, after_system)
    return Turns(around, answer)


def go_template(turns: Turns) -> str:
    """The same in Go's text/template, over Ollama's `.Messages`, without whitespace of its own."""
    parts = ["{{ range .Messages }}"]
    keyword = "if"
    for role in ("system", "user", "assistant"):
        if role in turns.around:
            before, after = turns.around[role]
            parts.append(f'{{{{ {keyword} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}')
            keyword = "else if"
    parts += ["{{ end }}", "{{ end }}", turns.answer]
    return "".join(parts)
