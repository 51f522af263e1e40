"""lm-eval itself, asking a server whose every probability is known: what becomes of bad input."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from quantize.protocol import Request, load_result, write_json
from tests.end_to_end.conftest import ROOT, environment
from tests.unit.model_server import Model, serving

pytestmark = pytest.mark.end_to_end

YAML = """\
task: own
dataset_path: json
dataset_kwargs:
  data_files:
    test: own.jsonl
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: {target}
{choice}generation_kwargs:
  until: ["END"]
  max_gen_toks: 8
metric_list:
  - metric: {metric}
    aggregation: mean
    higher_is_better: true
metadata:
  version: 3.0
"""
ROWS = [{"id": f"d{n}", "question": f"what is {n}?", "answer": f"{n}"} for n in range(6)]
CHOICES = [row | {"choices": ["one", "two"], "answer": n % 2} for n, row in enumerate(ROWS)]


@dataclass
class Task:
    """An own task in a folder, and the model that it is asked of."""

    folder: Path
    python: Path
    model: Model
    url: str
    body: dict[str, Any] = field(default_factory=dict)
    then: str | None = None  # another task, asked in the same process

    def write(self, rows: list[dict[str, Any]], **keys: str) -> None:
        (self.folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = {"kind": "generate_until", "target": '"{{answer}}"', "choice": ""}
        (self.folder / "own.yaml").write_text(
            YAML.format(**{"metric": "exact_match"} | given | keys)
        )

    def choose(self, rows: list[dict[str, Any]]) -> None:
        choice = 'doc_to_choice: "{{choices}}"\n'
        self.write(rows, kind="multiple_choice", target="answer", choice=choice, metric="acc")
        self.body["metric"] = "acc"

    def run(self, **keys: Any) -> Any:
        task = {
            "base_url": f"{self.url}/v1/completions",
            "model": "model",
            "tokenizer": str(ROOT / "examples" / "tiny_llama" / "instruct"),
            "task": "own",
            "metric": "exact_match",
            "filter": "none",
            "num_fewshot": 0,
            "limit": None,
            "apply_chat_template": True,
            "repeats": 1,
            "temperature": None,
            "cluster": None,
            "concurrency": 4,
            "max_length": 512,
            "no_choices": None,
            "tasks_folder": str(self.folder),
            "samples": str(self.folder / "samples.jsonl"),
            **self.body,
            **keys,
        }
        shared = ("base_url", "model", "tokenizer", "concurrency", "max_length")
        shared += ("tasks_folder", "no_choices")
        task["result"] = str(self.folder / "own.result.json")
        body = {name: task.pop(name) for name in shared} | {"tasks": [task]}
        if self.then is not None:
            body["tasks"].append(task | {"task": self.then, "result": f"{self.folder}/then.json"})
        request, result = self.folder / "request.json", self.folder / "result.json"
        job = Request("evaluate", body, str(self.folder), str(self.folder / "events.jsonl"))
        write_json(request, vars(job))
        module = ["-P", "-m", "quantize.workers.evaluate", str(request), str(result)]
        cache = {"HF_DATASETS_CACHE": str(self.folder / "datasets")}
        with (self.folder / "log").open("wb") as log:
            subprocess.run(
                [str(self.python), *module],
                env=environment(cache),
                stdout=log,
                stderr=log,
                check=False,
            )
        found = load_result(result)
        if not found.ok:
            return found
        stored = json.loads(Path(task["result"]).read_text())
        assert stored["seconds"] > 0
        return replace(found, body=stored["value"])

    def samples(self) -> list[dict[str, Any]]:
        text = (self.folder / "samples.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def task(environment_python: Callable[[str], Path], tmp_path: Path) -> Iterator[Task]:
    model = Model()
    with serving(model) as url:
        yield Task(tmp_path, environment_python("lmeval"), model, url)


def test_samples_hold_what_was_asked(task: Task) -> None:
    task.write([row | {"passage": "ab"[n % 2]} for n, row in enumerate(ROWS)])
    task.model.go_on = lambda body: "3"
    result = task.run(cluster="passage", limit=5)
    assert result.ok, result.message
    assert result.body["score"] == pytest.approx(0.2)
    assert (result.body["documents"], result.body["clusters"]) == (5, 2)
    first = task.samples()[0]
    assert "what is 0?" in first["prompt"]
    assert first["prompt"] != "what is 0?"  # the template stands around it
    assert (first["doc"], first["response"], first["target"]) == ("d0", "3", "0")


def test_a_sampled_task_is_asked_with_other_seeds(task: Task) -> None:
    task.write(ROWS)
    task.model.go_on = lambda body: str(body["seed"] % 2)
    result = task.run(repeats=3, temperature=0.7)
    assert result.ok, result.message
    asked = [body for path, body in task.model.requests if path == "/v1/completions"]
    assert {body["temperature"] for body in asked} == {0.7}
    assert len({body["seed"] for body in asked}) == 3
    assert len(asked) == 3 * len(ROWS)
    by_document = {sample["doc"]: sample["scores"] for sample in task.samples()}
    assert sorted(by_document["d0"]) == [0.0, 1.0, 1.0]
    assert sorted(by_document["d1"]) == [0.0, 0.0, 1.0]
    assert by_document["d5"] == [0.0, 0.0, 0.0]
    assert result.body["score"] == pytest.approx(3 / 18)


def test_choices(task: Task) -> None:
    task.choose(CHOICES)
    result = task.run()
    assert result.ok, result.message
    assert result.body["documents"] == 6
    assert task.samples()[0]["response"].count("\n") == 1


@pytest.mark.parametrize(
    ("row", "choices", "message"),
    [
        ({"answer": None}, False, "task own, document d3: it has no answer"),
        ({"answer": None}, True, "task own, document d3: it has no answer"),
        ({"answer": 2}, True, "task own, document d3: its answer 2 is none of its 2 choices"),
        ({"question": None}, None, ""),
    ],
)
def test_a_document_without_an_answer(
    row: dict[str, Any], choices: bool | None, message: str, task: Task
) -> None:
    rows = [old | row if old["id"] == "d3" else old for old in (CHOICES if choices else ROWS)]
    (task.choose if choices else task.write)(rows)
    result = task.run()
    if not message:  # a question may be null: that is text
        assert result.ok, result.message
        return
    assert (result.ok, result.kind) == (False, "SourceError")
    assert message in result.message
    assert not [path for path, _ in task.model.requests if path == "/v1/completions"]


def test_a_field_that_no_document_has(task: Task) -> None:
    task.write(ROWS, target='"{{anwser}}"')
    result = task.run()
    assert result.kind == "SourceError"
    assert "task own" in result.message
    assert "'anwser' is undefined" in result.message


def test_data_that_are_not_there(task: Task) -> None:
    task.write(ROWS)
    (task.folder / "own.jsonl").unlink()
    result = task.run()
    assert result.kind == "SourceError"
    assert "task own: its data are not there" in result.message
    assert "own.jsonl" in result.message


def test_a_task_that_nobody_knows(task: Task) -> None:
    task.write(ROWS)
    result = task.run(task="onw")
    assert (result.kind, "knows no task 'onw'" in result.message) == ("SourceError", True)


def test_a_finished_task_stays_when_the_next_one_fails(task: Task) -> None:
    task.write(ROWS)
    task.then = "nobody_knows_this"
    found = task.run()
    assert found.kind == "SourceError"
    assert "nobody_knows_this" in found.message
    stored = json.loads((task.folder / "own.result.json").read_text())
    assert stored["value"]["documents"] == len(ROWS) == len(task.samples())
    assert not (task.folder / "then.json").exists()


def test_a_choice_cannot_be_sampled(task: Task) -> None:
    task.choose(CHOICES)
    result = task.run(repeats=2, temperature=1.0)
    assert (result.kind, "cannot be sampled" in result.message) == ("SourceError", True)


@pytest.mark.parametrize(("kind", "concurrency"), [("choose", 4), ("write", 4), ("write", 1)])
def test_a_server_that_dies_in_the_middle(kind: str, concurrency: int, task: Task) -> None:
    (task.choose if kind == "choose" else task.write)(CHOICES if kind == "choose" else ROWS)
    task.model.dies_after = 3
    result = task.run(concurrency=concurrency)
    assert (result.ok, result.kind) == (False, "TransientError")
    assert "task own" in result.message
    assert "run the same command again" in result.hint
    assert not (task.folder / "samples.jsonl").exists()
    task.model.dies_after, task.model.fault = None, ""
    assert task.run().ok


def test_log_probabilities_that_are_not_numbers(task: Task) -> None:
    task.choose(CHOICES)
    task.model.fault = "nan"
    result = task.run()
    assert result.kind == "ToolError"
    assert "log-probabilities that are not numbers" in result.message
    assert "damaged weights" in result.hint
