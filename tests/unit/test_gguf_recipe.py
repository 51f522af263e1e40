"""GGUF in recipes, plans, preflight and on the card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from quantize import building, environment_checks
from quantize.checkpoint import read_checkpoint
from quantize.engine_checks import check_engine
from quantize.engines import llamacpp
from quantize.environment_checks import check_environments
from quantize.environments import ENVIRONMENTS, Environments
from quantize.errors import QuantizeError, ResourceError, UsageError
from quantize.modelfile import modelfile, turns_of
from quantize.planner import plan
from quantize.progress import LineView, Progress
from quantize.report.card_gguf import gguf_card
from quantize.resources import shipped_root
from tests.unit.planning import BASE, Tiny, changed, ids, keys, locks

GGUF = shipped_root() / "recipes" / "tiny-llama-gguf.yaml"
INSTRUCT = shipped_root() / "examples" / "tiny_llama" / "instruct"


# --- the plan ------------------------------------------------------------------------------------


def test_the_stages_of_a_gguf_recipe(tiny: Tiny) -> None:
    made = plan(tiny("evaluate=null", recipe=GGUF), locks)
    assert ids(made) == ("fetch", "gguf", "calibrate", "compress", "audit", "card", "publish")
    entries = {entry.id: entry for entry in made.stages}
    assert entries["compress"].inputs == {
        "fetch": "fetch",
        "calibrate": "calibrate",
        "gguf": "gguf",
    }
    assert entries["audit"].inputs["gguf"] == "gguf"
    assert entries["gguf"].environments == entries["compress"].environments == ("llamacpp",)


def test_both_sides_are_gguf_and_the_base_is_not_measured(tiny: Tiny) -> None:
    made = plan(tiny(recipe=GGUF), locks)
    entries = {entry.id: entry for entry in made.stages}
    assert entries["measure-baseline"].inputs["model"] == "gguf"
    assert entries["measure-repeat"].inputs["model"] == "gguf"
    assert entries["measure-candidate"].inputs["model"] == "compress"
    assert not BASE & set(entries)
    assert any("the base is not measured" in note for note in made.notes)


def test_without_calibration_there_is_no_importance_matrix(tiny: Tiny) -> None:
    made = plan(tiny("calibration=null", recipe=GGUF), locks)
    assert "calibrate" not in ids(made)
    q8_0 = plan(tiny("quantize.scheme=Q8_0", recipe=GGUF), locks)
    assert "calibrate" not in ids(q8_0), "Q8_0 reads none"


def test_a_type_gives_another_file_of_the_same_bf16(tiny: Tiny) -> None:
    before = plan(tiny("evaluate=null", recipe=GGUF), locks)
    after = plan(tiny("evaluate=null", "quantize.scheme=Q6_K", recipe=GGUF), locks)
    assert changed(before, after) == {"compress", "audit", "card", "publish"}
    assert keys(before)["gguf"] == keys(after)["gguf"]


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("quantize.scheme=W4A16", "cannot produce W4A16"),
        ("quantize.engine=stream", "engine stream has no method gguf"),
        ("quantize.group_size=64", "group_size"),
        ("quantize.kv_cache=fp8", "cannot do kv_cache"),
        ("quantize.ignore=[model.layers.0.mlp.down_proj]", "cannot do ignore"),
        ("model.adapter_mode=separate", "adapter_mode"),
    ],
)
def test_what_a_gguf_recipe_cannot_say(override: str, fault: str, tiny: Tiny) -> None:
    extra = ("model.adapter=examples/tiny_llama/lora",) if "adapter" in override else ()
    with pytest.raises(QuantizeError) as caught:
        tiny(override, *extra, recipe=GGUF)
    assert isinstance(caught.value, UsageError) or "recipe" in caught.value.message
    assert fault in caught.value.message


# --- before the work starts ----------------------------------------------------------------------


def test_architectures_that_the_converter_does_not_know() -> None:
    assert llamacpp.cannot_read({"architectures": ["LlamaForCausalLM"]}) is None
    assert llamacpp.cannot_read({"architectures": ["Qwen3MoeForCausalLM"]}) is None
    for config in ({"architectures": ["NoSuchForCausalLM"]}, {"architectures": []}, {}):
        reason = llamacpp.cannot_read(config)
        assert reason is not None
        assert "0.3.36" in reason
    table = json.loads(llamacpp.ARCHITECTURES.read_text())
    lock = Path(building.FOLDER, "llamacpp.cpu.lock").read_text()
    assert f"llama-cpp-python=={table['llama-cpp-python']}" in lock, "make the table anew"


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    found = shutil.which

    def without(name: str, *rest: Any) -> str | None:
        compilers = {name for names in building.COMPILERS.values() for name in names}
        return None if name in compilers else found(name, *rest)

    monkeypatch.setattr(building.shutil, "which", without)
    for variable in building.COMPILERS:
        monkeypatch.delenv(variable, raising=False)


@pytest.mark.usefixtures("no_compiler")
def test_a_missing_compiler_is_said_before_anything_runs(tmp_path: Path) -> None:
    (finding,) = check_environments(Environments("cpu", tmp_path), ["llamacpp"]).findings
    assert finding.error is ResourceError
    assert "no cc or gcc or clang, no c++ or g++ or clang++ on PATH" in finding.message
    assert "apt install g++" in finding.hint
    own = Environments("cpu", tmp_path, {"llamacpp": Path("/bin/sh")})
    with pytest.raises(ResourceError, match="there is no compiler"):
        Environments("cpu", tmp_path).install(
            "llamacpp", Progress(LineView(lambda _: None)), tmp_path / "log"
        )
    assert not list(tmp_path.glob("environments/llamacpp*"))
    assert environment_checks._without_compiler(["vllm"]) == []
    assert own.installed("llamacpp")


@pytest.mark.usefixtures("no_compiler")
def test_a_compiler_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "/bin/true")
    monkeypatch.setenv("CXX", "/bin/true")
    assert check_environments(Environments("cpu", tmp_path), ["llamacpp"]).findings == []


def test_settings_are_part_of_the_environments_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = ENVIRONMENTS["llamacpp"].build
    assert build is not None
    monkeypatch.setattr(building, "has_nvcc", lambda: False)
    without = Environments("cuda", tmp_path).lock_digest("llamacpp")
    notes = check_environments(Environments("cuda", tmp_path), ["llamacpp"]).notes
    assert any("compiled for CPUs alone" in note for note in notes)
    assert build.note("cpu") is None
    monkeypatch.setattr(building, "has_nvcc", lambda: True)
    assert Environments("cuda", tmp_path).lock_digest("llamacpp") != without
    arguments = build.arguments("cuda", tmp_path / "build")
    assert "llama-cpp-python:cmake.define.QUANTIZE_CUDA=ON" in arguments
    assert "QUANTIZE_CUDA" not in " ".join(build.arguments("cpu", tmp_path / "build"))


def test_progress_of_a_build(tmp_path: Path) -> None:
    assert building.compiled(tmp_path) == (0, 0)
    (tmp_path / "build.ninja").write_text(
        "rule CXX\nbuild a/x.cpp.o: CXX x.cpp\nbuild y.c.o: C y.c\nbuild lib.so: LINK a/x.cpp.o\n"
    )
    assert building.compiled(tmp_path) == (0, 2)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.cpp.o").touch()
    assert building.compiled(tmp_path) == (1, 2)


# --- Ollama --------------------------------------------------------------------------------------


def test_the_modelfile_of_the_shipped_checkpoint() -> None:
    assert modelfile(INSTRUCT, "x.gguf") == (
        "FROM ./x.gguf\n"
        'TEMPLATE """{{ range .Messages }}'
        '{{ if eq .Role "system" }}<|system|>{{ .Content }}<|end|>'
        '{{ else if eq .Role "user" }}<|user|>{{ .Content }}<|end|>'
        '{{ else if eq .Role "assistant" }}<|assistant|>{{ .Content }}<|end|>'
        '{{ end }}{{ end }}<|assistant|>"""\n'
        'PARAMETER stop "<|end|>"\n'
        "PARAMETER temperature 0\n"
    )


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_turns_of_chatml() -> None:
    turns = turns_of(CHATML, {})
    assert turns is not None
    assert turns.around["user"] == ("<|im_start|>user\n", "<|im_end|>\n")
    assert turns.answer == "<|im_start|>assistant\n"


@pytest.mark.parametrize(
    "template",
    [
        # a system message of its own where there is none
        "{% if messages[0]['role'] != 'system' %}<s>You are kind.</s>{% endif %}" + CHATML,
        # the last turn looks otherwise
        "{% for m in messages %}{{ '!' if loop.last }}{{ m['role'] }}{{ m.content }}{% endfor %}",
        # what was said is written twice
        "{% for m in messages %}{{ m['content'] }}{{ m['content'] }}{% endfor %}",
        # it takes one message alone
        "{{ raise_exception('no') if messages|length > 1 }}{{ messages[0]['content'] }}",
        # text that Go's template would read
        CHATML.replace("<|im_start|>", "{{ '{{' }}").replace("{{ '{{ ", "{{ '{"),
        "not a template {% if",
    ],
)
def test_templates_that_are_no_plain_turns(template: str) -> None:
    assert turns_of(template, {}) is None


# --- the card ------------------------------------------------------------------------------------


def test_the_file_table() -> None:
    formats = {"F32": 9, "Q4_K": 25, "Q6_K": 5}
    found = {"file": "x-Q4_K_M.gguf", "bytes": 2_670_880, "type": "Q4_K_M"}
    record: dict[str, Any] = {
        "audit": {"gguf": found | {"bits_per_weight": 4.998, "formats": formats}},
        "recipe": {"name": "x", "serve": {"max_model_len": 1024}},
        "compress": {"imatrix": {"rows": 128, "tokens": 8067, "context": 165, "chunks": 48}},
        "target": "owner/x",
    }
    card = gguf_card(record)
    assert card is not None
    (row,) = card.files
    assert (row.file, row.type, row.bits, row.use) == (
        "x-Q4_K_M.gguf",
        "Q4_K_M",
        "5.00",
        "the usual choice",
    )
    assert card.formats == "25 tensors Q4_K, 9 tensors F32, 5 tensors Q6_K"
    assert "--ctx-size 1024" in card.server
    assert card.download == "hf download owner/x --local-dir ./x"
    assert card.imatrix.startswith("8,067 tokens of 128 calibration rows")
    assert gguf_card(record | {"audit": {}}) is None


def test_an_unknown_architecture_is_a_finding(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "source"
    shutil.copytree(INSTRUCT, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["NoSuchModel"]}))
    recipe = tiny(f"model.source={folder}", recipe=GGUF).recipe
    (finding,) = check_engine(read_checkpoint(folder), recipe)
    assert "engine llamacpp cannot take this checkpoint" in finding.message
    assert "does not know NoSuchModel" in finding.message
    assert "quantize.format" in finding.hint
