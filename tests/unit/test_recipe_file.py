import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize import recipe_file
from quantize.errors import Problem, RecipeError, UsageError
from quantize.recipe import Recipe, recipe_schema
from quantize.recipe_file import load_prompts, load_recipe, load_suite
from quantize.resources import (
    find_prompts,
    find_recipe,
    find_suite,
    shipped_names,
    shipped_root,
)
from quantize.yaml_values import MOST_PROBLEMS

VALID = """\
version: 1
name: example
model:
  source: owner/name
  revision: 0123456789abcdef0123456789abcdef01234567
calibration:
  source: rows.jsonl
  samples: 64
quantize:
  method: awq
  group_size: 64
  ignore: [lm_head, "re:.*gate$"]
evaluate:
  suite: tiny
  margins: {perplexity_ratio: 2, task_drop: 0.05}
serve:
  enable_prefix_caching: false
"""


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def problems(folder: Path, text: str | bytes, *overrides: str) -> list[Problem]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(folder, text), overrides)
    return list(caught.value.problems)


def only(folder: Path, text: str | bytes, *overrides: str) -> Problem:
    found = problems(folder, text, *overrides)
    assert len(found) == 1, found
    return found[0]


def test_valid(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, VALID))
    assert recipe.model.revision == "0123456789abcdef0123456789abcdef01234567"
    assert recipe.quantize.ignore == ("lm_head", "re:.*gate$")
    assert recipe.evaluate is not None
    assert recipe.evaluate.margins.perplexity_ratio == 2.0
    assert recipe.serve.enable_prefix_caching is False
    assert recipe.calibration is not None and recipe.calibration.sequence_length == 2048


def test_a_misspelt_required_key_is_one_mistake(tmp_path: Path) -> None:
    problem = only(tmp_path, VALID.replace("  method: ", "  metod: "))
    assert problem.path == "quantize.metod"
    assert "did you mean method" in problem.message


def test_a_file_of_another_kind_is_described_in_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of its keys would be compared with all known ones, and be a line of the message."""
    compared: list[object] = []
    monkeypatch.setattr(recipe_file, "_meant", lambda _kind, path: compared.append(path))
    text = "".join(f"k{number}: 1\n" for number in range(5 * MOST_PROBLEMS))
    assert len(problems(tmp_path, text)) == MOST_PROBLEMS
    assert len(compared) <= 3 * MOST_PROBLEMS  # those described are compared once more


def test_three_mistakes_are_three_problems(tmp_path: Path) -> None:
    text = VALID.replace("group_size: 64", "group_sizes: 64").replace("samples: 64", "samples: abc")
    text = text.replace("enable_prefix_caching: false", "enable_prefix_caching: no")
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, text))
    error = caught.value
    assert [(p.line, p.path) for p in error.problems] == [
        (8, "calibration.samples"),
        (11, "quantize.group_sizes"),
        (17, "serve.enable_prefix_caching"),
    ]
    assert error.exit_code == 2
    assert "3 mistakes in" in error.message
    assert "recipe.yaml:8: calibration.samples: expected a whole number" in error.message
    assert "got the text 'abc'" in error.message
    assert "did you mean group_size" in error.message
    assert "write true or false" in error.message


@pytest.mark.parametrize(
    ("value", "advice"),
    [
        ("no", "write true or false"),
        ("Yes", "write true or false"),
        ("on", "write true or false"),
        ("OFF", "write true or false"),
        ("y", "write true or false"),
        ("1e-3", "write 0.001,"),
        ("1e5", "write 100000,"),
        ("2.5e-12", None),
        ("1.0e12", "write 1000000000000,"),
        ("1e-12", "write 1.0e-12,"),
        ("1e999", "not a finite number"),
        ("010", "decimal"),
        ("0o10", "decimal"),
        ("0x1f", "decimal"),
        ("0b11", "decimal"),
        ("1_000", "underscores"),
        ("1:30", "base 60"),
        ("2024-05-01", "date"),
        ("2024-05-01T10:00:00Z", "date"),
        (".inf", "finite"),
        (".nan", "finite"),
        ("!!python/object/apply:os.system [ls]", "a tag"),
        ("!!str 5", "a tag"),
        ("&x 5", "an anchor"),
        ("*x", "an alias"),
        ("=", "quote it"),
        ('"\\x1b[31m"', "control character U+001B"),
        ('"\\0"', "control character U+0000"),
        ('"\\ud800"', "half a surrogate pair"),
    ],
)
def test_yaml_traps(tmp_path: Path, value: str, advice: str | None) -> None:
    found = problems(tmp_path, VALID.replace("source: rows.jsonl", f"source: {value}"))
    assert [(p.line, p.path) for p in found] == [(7, "calibration.source")]
    assert (advice or "put it in quotes") in found[0].message


@pytest.mark.parametrize(
    "value", ['"no"', "'1e-3'", "nothing", "1.2.3", "12ab", "a:1:30", "yes!", "|-\n    no"]
)
def test_not_a_trap(tmp_path: Path, value: str) -> None:
    recipe = load_recipe(write(tmp_path, VALID.replace("rows.jsonl", value)))
    assert recipe.calibration is not None
    assert recipe.calibration.source == re.sub(r"^\|-\n *|[\"']", "", value)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("", 1, "empty"),
        ("# only a comment\n", 1, "empty"),
        ("- a\n- b\n", 1, "got a list"),
        ("hello\n", 1, "got the text 'hello'"),
        ("version: 1\nname: a: b\n", 2, "a colon where none can stand"),
        ("version: 1\nname: [a\n", 3, "not valid YAML"),
        ("version: 1\n\tname: a\n", 2, "a tab"),
        ("version: 1\n---\nversion: 1\n", 2, "a second document"),
        ("version: 1\nname\n", 3, "key without a colon"),
        ("version: 1\nname: @a\n", 2, "quote the value"),
        (b"version: 1\nname: \xff\n", 2, "not UTF-8"),
        ("version: 1\nname: \x07\n", 2, "U+0007"),
        ("a: " + "[" * 100 + "\n", 1, "nested"),
        ("a: " + "[" * 20_000 + "\n", 1, "nested"),
        ('a: "\\UFFFFFFFF"\n', 1, "not valid YAML"),
        ("#" * (1 << 20) + "\n", 1, "larger than 256 KiB"),
    ],
)
def test_unreadable_text(tmp_path: Path, text: str | bytes, line: int, words: str) -> None:
    problem = only(tmp_path, text)
    assert problem.line == line
    assert words in problem.message


def test_alias_bomb_is_refused_at_once(tmp_path: Path) -> None:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    found = problems(tmp_path, "\n".join(levels))
    assert any("an anchor" in p.message for p in found)


def test_merge_key(tmp_path: Path) -> None:
    problem = only(tmp_path, VALID.replace("  samples: 64", "  <<: {samples: 64}"))
    assert (problem.line, "merge key" in problem.message) == (8, True)


def test_keys_are_text(tmp_path: Path) -> None:
    problem = only(tmp_path, VALID + "  ? [a, b]\n  : 1\n")
    assert problem == Problem(18, "serve", "a key must be plain text")


def test_duplicate_key(tmp_path: Path) -> None:
    problem = only(tmp_path, VALID + "  max_num_seqs: 1\n  max_num_seqs: 2\n")
    assert problem.line == 19
    assert problem.message == "given twice, first on line 18: remove one"


@pytest.mark.parametrize(
    ("extra", "path", "words"),
    [
        ("  group_size: 128", "serve.group_size", "it belongs under quantize"),
        ("  gpu_memory_utilisation: 0.5", "serve.gpu_memory_utilisation", "gpu_memory_utilization"),
        ("  zzz: 1", "serve.zzz", "known here: engine, "),
        ("repo: a/b", "repo", "it belongs under publish.hub"),
        ("quantise: {}", "quantise", "did you mean quantize"),
        ("environments: {vlm: {python: x}}", "environments.vlm", "did you mean vllm"),
    ],
)
def test_unknown_key(tmp_path: Path, extra: str, path: str, words: str) -> None:
    problem = only(tmp_path, f"{VALID}{extra}\n")
    assert (problem.line, problem.path) == (18, path)
    assert "unknown key" in problem.message
    assert words in problem.message


@pytest.mark.parametrize(
    ("old", "new", "line", "path", "words"),
    [
        ("version: 1", "version: 2", 1, "version", "the number 2 is not known here: write 1"),
        ("name: example", "name: An Example", 2, "name", "lower case"),
        ("  source: owner/name\n", "", 3, "model.source", "required"),
        ("source: owner/name", "source:", 4, "model.source", "expected text, got nothing"),
        ("source: owner/name", "source: 5", 4, "model.source", "put it in quotes"),
        ("samples: 64", "samples: 64.0", 8, "calibration.samples", "a whole number"),
        ("samples: 64", "samples: true", 8, "calibration.samples", "got true"),
        ("samples: 64", "samples: 0", 8, "calibration.samples", "must be above 0"),
        ("method: awq", "method: apq", 10, "quantize.method", "did you mean awq"),
        ("[lm_head, ", "[3, ", 12, "quantize.ignore[0]", "expected text"),
        ("re:.*gate$", "re:.*(gate", 12, "quantize.ignore[1]", "is not a regular expression"),
        ("group_size: 64", "group_size: 0", 11, "quantize.group_size", "or channel"),
        ("group_size: 64", "group_size: chanel", 11, "quantize.group_size", "or channel"),
        (
            "group_size: 64",
            "kv_cache: fp4",
            11,
            "quantize.kv_cache",
            "is not known here: write fp8",
        ),
        ("group_size: 64", "engine: streams", 11, "quantize.engine", "did you mean stream"),
        ('[lm_head, "re:.*gate$"]', "lm_head", 12, "quantize.ignore", "expected a list"),
        ("task_drop: 0.05", "task_drop: 5", 15, "evaluate.margins.task_drop", "at most 1"),
        ("task_drop: 0.05", "task_drop: a", 15, "evaluate.margins.task_drop", "expected a number"),
        ("method: awq", "method: fp8", 9, "quantize", "has no groups: remove group_size"),
        ("method: awq", "method: awq\n  scheme: FP8", 9, "quantize", "cannot produce FP8"),
        ("quantize:\n", "quantize: 3\nserve2:\n", 9, "quantize", "expected keys and values"),
    ],
)
def test_wrong_value(tmp_path: Path, old: str, new: str, line: int, path: str, words: str) -> None:
    assert old in VALID
    found = problems(tmp_path, VALID.replace(old, new))
    assert (found[0].line, found[0].path) == (line, path)
    assert words in found[0].message


OVERRIDES = """\
  ignore: []
  overrides:
    - modules: ["re:.*down_proj$", lm_head]
      scheme: W8A16
    - modules: ["re:.*"]
      scheme: W4A16
      group_size: channel
"""
MIXED = VALID.replace('  ignore: [lm_head, "re:.*gate$"]\n', OVERRIDES)


def test_overrides(tmp_path: Path) -> None:
    quantize = load_recipe(write(tmp_path, MIXED)).quantize
    assert quantize.effective_overrides == [
        {"modules": ["re:.*down_proj$", "lm_head"], "scheme": "W8A16", "group_size": 128},
        {"modules": ["re:.*"], "scheme": "W4A16", "group_size": "channel"},
    ]
    other = load_recipe(write(tmp_path, MIXED), ["quantize.overrides=[]"]).quantize
    assert other.effective_overrides == []


@pytest.mark.parametrize(
    ("old", "new", "line", "path", "words"),
    [
        ('["re:.*"]', "[]", 16, "quantize.overrides[1]", "modules is empty: name at least one"),
        ('["re:.*"]', '["re:*"]', 16, "quantize.overrides[1].modules[0]", "nothing to repeat"),
        ("scheme: W8A16", "schema: W8A16", 15, "quantize.overrides[0].schema", "mean scheme"),
        ("W8A16", "W8A17", 15, "quantize.overrides[0].scheme", "did you mean W8A16"),
        ("W8A16", "W8A8\n      group_size: 128", 14, "quantize.overrides[0]", "has no groups"),
        ("W8A16", "MXFP4A16\n      group_size: 32", 14, "quantize.overrides[0]", "groups of 32,"),
    ],
)
def test_wrong_override(
    tmp_path: Path, old: str, new: str, line: int, path: str, words: str
) -> None:
    problem = only(tmp_path, MIXED.replace(old, new))
    assert (problem.line, problem.path) == (line, path)
    assert words in problem.message


def test_the_recipes_in_the_docs(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
    whole, mixed = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert load_recipe(write(tmp_path, whole)).quantize.effective_overrides == []
    start = re.sub(r"quantize:\n(  .*\n)+", "", VALID)
    overrides = load_recipe(write(tmp_path, start + mixed)).quantize.effective_overrides
    assert [o["group_size"] for o in overrides] == [None, 32]
    assert overrides[0]["modules"] == [r"re:.*\.layers\.0\."]


@pytest.mark.parametrize(
    ("method", "scheme", "more", "part"),
    [
        ("rtn", "W4A16", {}, None),
        ("rtn", "NVFP4A16", {}, None),
        ("gptq", "MXFP4A16", {}, "method gptq with MXFP4A16"),
        ("rtn", "W4A16", {"kv_cache": "fp8"}, "kv_cache"),
        ("rtn", "W4A16", {"scheme": "FP8_DYNAMIC"}, None),
        ("rtn", "W4A16", {"scheme": "FP8"}, "an override with FP8"),
        ("fp8", "FP8_BLOCK", {"scheme": "W8A8"}, None),
    ],
)
def test_what_needs_calibration(
    tmp_path: Path, method: str, scheme: str, more: dict[str, str], part: str | None
) -> None:
    text = re.sub(r"calibration:\n(  .*\n)+|  group_size: 64\n", "", VALID)
    text = text.replace("method: awq", f"method: {method}\n  scheme: {scheme}")
    settings = [f"quantize.kv_cache={more['kv_cache']}"] if "kv_cache" in more else []
    if "scheme" in more:
        settings = [f"quantize.overrides=[{{modules: [a], scheme: {more['scheme']}}}]"]
    if part is None:
        assert not load_recipe(write(tmp_path, text), settings).quantize.needs_calibration
    else:
        message = only(tmp_path, text, *settings).message
        assert message.startswith(part) and message.endswith("needs a calibration block")


def test_missing_calibration_block(tmp_path: Path) -> None:
    text = re.sub(r"calibration:\n(  .*\n)+", "", VALID)
    problem = only(tmp_path, text)
    assert "needs a calibration block" in problem.message


def test_values_are_set(tmp_path: Path) -> None:
    recipe = load_recipe(
        write(tmp_path, VALID),
        [
            "name=other",
            "quantize.group_size=32",
            "quantize.ignore=[lm_head, x]",
            "publish.hub.repo=a/b",
            "model.revision=null",
        ],
    )
    assert recipe.name == "other"
    assert recipe.quantize.group_size == 32
    assert recipe.quantize.ignore == ("lm_head", "x")
    assert recipe.publish.hub is not None and recipe.publish.hub.repo == "a/b"
    assert recipe.model.revision is None


def test_set_replaces_a_mistake_in_types(tmp_path: Path) -> None:
    text = VALID.replace("samples: 64", "samples: abc")
    recipe = load_recipe(write(tmp_path, text), ["calibration.samples=7"])
    assert recipe.calibration is not None and recipe.calibration.samples == 7


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("quantize.group_sizes=3", "--set quantize.group_sizes: unknown key, did you mean group_s"),
        ("quantize.group_size=abc", "--set quantize.group_size: expected a whole number"),
        ("serve.enable_prefix_caching=no", "--set serve.enable_prefix_caching: no is a truth"),
        ("serve.extra_args=[a", "--set serve.extra_args: not valid YAML"),
        ("quantize", "--set quantize: expected key=value"),
        ("=3", "--set =3: expected key=value"),
        ("quantize.method.x=3", "--set quantize.method.x: quantize.method holds no keys"),
        ("publish.hub.private=true", "--set publish.hub.repo: this key is required"),
    ],
)
def test_wrong_set(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, VALID), [override])
    assert len(caught.value.problems) == 1
    assert "\n  " + message in caught.value.message


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        load_recipe(tmp_path / "absent.yaml")
    with pytest.raises(UsageError, match="a folder"):
        load_recipe(tmp_path)


def test_byte_order_mark_and_windows_lines(tmp_path: Path) -> None:
    data = b"\xef\xbb\xbf" + VALID.replace("\n", "\r\n").encode()
    assert load_recipe(write(tmp_path, data)).name == "example"


@pytest.mark.parametrize("name", shipped_names("recipes"))
def test_shipped_recipe(name: str) -> None:
    path = find_recipe(name)
    assert path.read_text().splitlines()[0] == (
        "# yaml-language-server: $schema=recipe.schema.json"
    )
    recipe = load_recipe(path)
    assert recipe.name == name
    assert recipe.evaluate is not None
    suite_path = find_suite(recipe.evaluate.suite, path.parent)
    find_prompts(load_suite(suite_path).smoke, suite_path.parent)


@pytest.mark.parametrize("name", shipped_names("eval/suites"))
def test_shipped_suite(name: str) -> None:
    assert load_suite(find_suite(name, Path())).name == name


@pytest.mark.parametrize("name", shipped_names("eval/prompts"))
def test_shipped_prompts(name: str) -> None:
    prompts = load_prompts(find_prompts(name, Path()))
    assert prompts.name == name
    kinds = {prompt.kind for prompt in prompts.prompts}
    kinds |= {"chat"} if name == "base" else set()  # it is for models without a chat template
    assert kinds == {"completion", "chat", "long_context", "concurrent"}


def test_schema_is_current() -> None:
    shipped = json.loads((shipped_root() / "recipes/recipe.schema.json").read_text())
    assert shipped == recipe_schema(), "run: quantize schema > recipes/recipe.schema.json"
    assert set(shipped["properties"]) == set(Recipe.model_fields)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("kind: completion", "either prompt or messages"),
        ("kind: chat, prompt: x", "kind chat takes messages"),
        ("kind: completion, messages: [{role: user, content: x}]", "takes a prompt"),
        ("kind: chat, messages: [{role: assistant, content: x}]", "must be the user's"),
        ("kind: long_context, prompt: x", "filler and context_tokens"),
        ("kind: completion, prompt: x, filler: abc", "filler and context_tokens"),
        ("kind: completion, prompt: x, copies: 8", "copies belongs to"),
        ("kind: completion, prompt: x, checks: [not_emtpy]", "did you mean not_empty"),
    ],
)
def test_wrong_prompt(tmp_path: Path, prompt: str, words: str) -> None:
    path = write(tmp_path, f"version: 1\nname: p\nprompts:\n  - {{name: a, {prompt}}}\n")
    with pytest.raises(RecipeError) as caught:
        load_prompts(path)
    assert [p.line for p in caught.value.problems] == [4]
    assert words in caught.value.message


def test_suite_with_a_task_twice(tmp_path: Path) -> None:
    task = "{name: a, metric: acc}"
    path = write(tmp_path, f"version: 1\nname: s\ntasks: [{task}, {task}]\n")
    with pytest.raises(RecipeError, match="tasks named twice: a"):
        load_suite(path)


FRAGMENTS = st.sampled_from(
    [
        *":-{}[]&*!|>'\"%@`#,?=~\\\t\n\r\0\x85\ufeff\u2028é",
        *("\n  ", "<<: ", "no", "1e-3", "010", "1:30", ".nan", "0x", "9" * 500),
        *("---\n", "...\n", "%YAML 9.9\n", "%TAG ! !\n", "!!int ", "*a", "&a ", "? "),
        *('"\\ud800"', '"\\UFFFFFFFF"', "- "),
    ]
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, len(VALID)), st.integers(0, 12), FRAGMENTS | st.text(max_size=4)),
        min_size=1,
        max_size=4,
    )
)
def test_mutations_raise_nothing_but_recipe_errors(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, int, str]]
) -> None:
    text = VALID
    for start, removed, added in edits:
        text = text[:start] + added + text[start + removed :]
    path = write(tmp_path_factory.getbasetemp(), text.encode("utf-8", "surrogatepass"))
    try:
        assert isinstance(load_recipe(path), Recipe)
    except RecipeError as error:
        lines = text.count("\n") + text.count("\r") + text.count("\x85") + text.count("\u2028") + 2
        assert error.problems
        assert all(1 <= problem.line <= lines for problem in error.problems)
        error.message.encode()  # printable on any UTF-8 terminal
        assert "\x1b" not in error.message


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=20), st.text(max_size=20))
def test_any_set_raises_nothing_but_recipe_errors(
    tmp_path_factory: pytest.TempPathFactory, key: str, value: str
) -> None:
    path = write(tmp_path_factory.getbasetemp(), VALID)
    for override in (f"{key}={value}", f"quantize.{key}={value}", f"quantize.ignore={value}"):
        try:
            load_recipe(path, [override])
        except RecipeError as error:
            error.message.encode()


def keys_of(properties: dict[str, Any], definitions: dict[str, Any], prefix: str) -> Iterator[str]:
    for name, schema in properties.items():
        yield prefix + name
        for part in [schema, *schema.get("anyOf", [])]:
            inner = definitions.get(part.get("$ref", "").rpartition("/")[2], {})
            yield from keys_of(inner.get("properties", {}), definitions, f"{prefix}{name}.")


VALUES = [
    *("5", "-1", "0.5", "true", "null", "abc", "''"),
    *("[]", "[1]", "[[]]", "[{}]", "{}", "{a: 1}", "{python: {}}"),
]


@pytest.mark.parametrize("value", VALUES)
def test_every_key_with_every_kind_of_value(tmp_path: Path, value: str) -> None:
    path = write(tmp_path, VALID)
    schema = recipe_schema()
    keys = [*keys_of(schema["properties"], schema["$defs"], ""), "environments.vllm", "a.b"]
    assert "publish.hub.repo" in keys
    for key in keys:
        try:
            load_recipe(path, [f"{key}={value}"])
        except RecipeError as error:
            assert key in error.message or key.rpartition(".")[0] in error.message
