r"""The measure stage against plain lm-eval: wall time and scores, same tasks, same checkpoint.

    python bench/measure.py --hf-python HF/bin/python --vllm-python VLLM/bin/python

measures examples/tiny_llama/instruct on valley_mc and valley_qa through the chat template, in BF16:
with `quantize run --only measure-baseline` (the tasks alone, and the whole suite `tiny` with smoke
prompts, perplexity, generation health and load), with `lm_eval --model hf` and with
`lm_eval --model vllm`. Every measurement is a fresh process from start to end, a server's start
included; engines take turns within a round and the first round is not counted. Writes
bench/measure.json, and from it bench/measure.md (`--render` does only that).

The two environments hold the versions of quantize/envs. Without a GPU:

    uv venv HF --python 3.11
    uv pip install --python HF/bin/python --torch-backend cpu \
        torch==2.13.0 transformers==5.23.0 'lm-eval[hf]==0.4.13'
    uv venv VLLM --python 3.11
    uv pip install --python VLLM/bin/python --torch-backend cpu \
        -r quantize/envs/vllm.cpu.lock --excludes quantize/envs/excludes.txt lm-eval==0.4.13

With one, leave out `--torch-backend cpu` and `--excludes`, and take vllm.cuda.lock.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "measure.json"
MODEL = ROOT / "examples" / "tiny_llama" / "instruct"
RECIPE = ROOT / "recipes" / "tiny-llama-awq.yaml"
TASKS = {"valley_mc": ("acc", "none"), "valley_qa": ("exact_match", "stripped")}
MAX_MODEL_LEN, KV_CACHE_GIB = 1024, 1  # as in the recipe

ENGINES = {
    "tasks": "`quantize`, measure stage, tasks only",
    "whole": "`quantize`, measure stage, whole suite",
    "hf": "`lm_eval --model hf`",
    "vllm": "`lm_eval --model vllm`",
}

Record = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hf-python", type=Path, help="torch, transformers and lm-eval")
    parser.add_argument("--vllm-python", type=Path, help="vLLM and lm-eval")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--rounds", type=int, default=3, help="that count, after one that does not")
    parser.add_argument("--limit", type=int, help="documents of each task, for trying it out")
    parser.add_argument("--hf-batch-size", default="16", help="lm-eval's own default is 1")
    parser.add_argument("--note", default="", help="a sentence about the machine for the page")
    parser.add_argument("--render", action="store_true", help="write the page again, run nothing")
    options = parser.parse_args()
    if not options.render:
        for name in {"hf", "vllm"} & set(options.engines):
            if getattr(options, f"{name}_python") is None:
                parser.error(f"--{name}-python is missing; --help says how to make it")
        with tempfile.TemporaryDirectory() as scratch:
            RESULTS.write_text(json.dumps(bench(options, Path(scratch)), indent=1) + "\n")
    found = json.loads(RESULTS.read_text())
    RESULTS.with_suffix(".md").write_text(page(found), encoding="utf-8")


def bench(options: argparse.Namespace, work: Path) -> Record:
    """Every engine once a round, in turns; each begins one of the rounds."""
    folder = task_folder(work)
    suites = {name: suite(work, name, options.limit) for name in ("tasks", "whole")}
    runs: list[Record] = []
    for round_number in range(options.rounds + 1):
        turn = round_number % len(options.engines)
        for engine in options.engines[turn:] + options.engines[:turn]:
            place = work / f"{engine}-{round_number}"
            place.mkdir()
            if engine in suites:
                measured = measure_stage(suites[engine], place)
            else:
                measured = lm_eval(engine, options, folder, place)
            print(round_number, engine, f"{measured['seconds']:.1f} s", measured["scores"])
            sys.stdout.flush()
            if round_number:
                runs.append({"round": round_number, "engine": engine, **measured})
            shutil.rmtree(place)
    return {
        "machine": machine(options),
        "command": command_line(options),
        "limit": options.limit,
        "hf_batch_size": options.hf_batch_size,
        "runs": runs,
    }


def command_line(options: argparse.Namespace) -> str:
    """What was asked, without this machine's folders."""
    parts = ["python", "bench/measure.py"]
    parts += [f"--{name}-python {name.upper()}/bin/python" for name in ("hf", "vllm")]
    parts += [f"--rounds {options.rounds}"]
    parts += [f"--limit {options.limit}"] if options.limit else []
    return " ".join(parts)


def task_folder(work: Path) -> Path:
    """Both tasks in one folder: lm-eval looks for their data in the working directory."""
    folder = work / "lm_eval_tasks"
    folder.mkdir()
    for name in TASKS:
        for path in (ROOT / "eval" / "tasks" / name).iterdir():
            (folder / path.name).symlink_to(path)
    return folder


def suite(work: Path, name: str, limit: int | None) -> Path:
    """The suite `tiny`, or only its tasks: a suite needs a smoke prompt and a load, of one each."""
    path = ROOT / "eval" / "suites" / "tiny.yaml"
    value: Record = yaml.safe_load(path.read_text())
    value["tasks_folder"] = str(ROOT / "eval" / "tasks")
    for task in value["tasks"]:
        if limit:
            task["limit"] = limit
    if name == "whole":
        value["perplexity"]["text"] = str(ROOT / "eval" / "texts" / "valley.jsonl")
        if "health" in value:
            value["health"]["prompts"] = str((path.parent / value["health"]["prompts"]).resolve())
    else:
        prompt = {"name": "one", "kind": "completion", "prompt": "The", "max_tokens": 1}
        prompts = {"version": 1, "name": "one", "prompts": [prompt]}
        (work / "prompts.yaml").write_text(yaml.safe_dump(prompts))
        keep = ("version", "tasks", "tasks_folder")
        value = {key: value[key] for key in keep}
        value["smoke"] = "prompts.yaml"
        value["load"] = dict.fromkeys(("requests", "concurrency", "output_tokens"), 1)
    value["name"] = f"bench-{name}"
    written = work / f"suite-{name}.yaml"
    written.write_text(yaml.safe_dump(value))
    return written


def measure_stage(suite_path: Path, place: Path) -> Record:
    """`quantize run --only measure-baseline` in an empty store that has the fetched model alone."""
    store = place / "store"
    command = [sys.executable, "-m", "quantize", "run", str(RECIPE), "--json"]
    command += ["--store", str(store), "--set", f"evaluate.suite={suite_path}"]
    environment = {"PYTHONPATH": str(ROOT), "HF_HOME": str(place.parent / "hf")}
    timed([*command, "--only", "fetch"], place, environment)
    seconds = timed([*command, "--only", "measure-baseline"], place, environment)
    (artifact,) = (path.parent for path in (store / "measure").glob("*/record.json"))
    record = json.loads((artifact / "record.json").read_text())
    documents = {
        name: {row["doc"]: row["score"] for row in lines(artifact / "samples" / f"{name}.jsonl")}
        for name in TASKS
    }
    return {"seconds": seconds, "parts": record["seconds"], **scored(documents)}


def lm_eval(engine: str, options: argparse.Namespace, folder: Path, place: Path) -> Record:
    """Plain `lm_eval run`, both tasks in one call."""
    arguments = ["run", "--tasks", *TASKS, "--include_path", str(folder), "--apply_chat_template"]
    arguments += ["--log_samples", "--output_path", str(place / "out"), "--model", engine]
    model = {"pretrained": str(MODEL), "dtype": "bfloat16"}
    environment = {"HF_HOME": str(place.parent / "hf")}
    if engine == "hf":
        command = [str(options.hf_python.absolute()), "-m", "lm_eval"]
        arguments += ["--batch_size", options.hf_batch_size]
        arguments += [] if has_gpu() else ["--device", "cpu"]
    else:
        starter = str(ROOT / "bench" / "lm_eval_vllm.py")
        command = [str(options.vllm_python.absolute()), starter]
        arguments += ["--batch_size", "auto"]
        model["max_model_len"] = str(MAX_MODEL_LEN)
        if not has_gpu():  # as the measure stage serves it: compiling takes longer than the tasks
            model["enforce_eager"] = "True"
            environment |= {"VLLM_TARGET_DEVICE": "cpu"}
            environment |= {"VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB)}
    arguments += ["--model_args", ",".join(f"{key}={value}" for key, value in model.items())]
    arguments += ["--limit", str(options.limit)] if options.limit else []
    seconds = timed([*command, *arguments], folder, environment)
    documents = {}
    for name, (metric, kind) in TASKS.items():
        (path,) = (place / "out").rglob(f"samples_{name}_*.jsonl")
        rows = [row for row in lines(path) if row["filter"] == kind]
        documents[name] = {row["doc"]["id"]: float(row[metric]) for row in rows}
    return {"seconds": seconds, "parts": {}, **scored(documents)}


def scored(documents: dict[str, dict[str, float]]) -> Record:
    """Mean of each task, and a 0 or 1 for each document by its id."""
    right = {
        name: "".join(str(int(scores[key])) for key in sorted(scores))
        for name, scores in documents.items()
    }
    means = {name: statistics.mean(scores.values()) for name, scores in documents.items()}
    return {"scores": means, "right": right}


def timed(command: list[str], folder: Path, environment: dict[str, str]) -> float:
    """Seconds of one process from start to end; its output if it fails."""
    started = time.monotonic()
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    seconds = time.monotonic() - started
    if done.returncode:
        sys.exit(f"{shlex.join(command)} ended with {done.returncode}:\n{done.stdout[-4000:]}")
    return seconds


def lines(path: Path) -> list[Record]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def has_gpu() -> bool:
    return shutil.which("nvidia-smi") is not None


def machine(options: argparse.Namespace) -> Record:
    processor = next(
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    )
    versions = {
        name: installed(getattr(options, f"{name}_python"))
        for name in ("hf", "vllm")
        if name in options.engines
    }
    return {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "gpu": has_gpu(),
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "note": options.note,
        "versions": versions,
    }


def installed(python: Path) -> dict[str, str]:
    """Versions of what counts in an environment."""
    code = (
        "import json; from importlib.metadata import distributions as d;"
        "names = {'lm_eval', 'lm-eval', 'torch', 'transformers', 'vllm', 'vllm-cpu', 'vllm_cpu'};"
        "print(json.dumps({x.name: x.version for x in d() if x.name in names}))"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    value: dict[str, str] = json.loads(done.stdout)
    return dict(sorted(value.items()))


def page(found: Record) -> str:
    """The page: what was run where, seconds, scores, flips."""
    about, runs = found["machine"], found["runs"]
    engines = [name for name in ENGINES if any(run["engine"] == name for run in runs)]
    rounds = max(run["round"] for run in runs)
    documents = {name: len(runs[0]["right"][name]) for name in TASKS}
    asked = ", ".join(f"{name} ({count} documents)" for name, count in documents.items())
    versions = "; ".join(
        f"{name}: " + ", ".join(f"{tool} {number}" for tool, number in tools.items())
        for name, tools in about["versions"].items()
    )
    gpu = "with a GPU" if about["gpu"] else "no GPU"
    out = [
        "# The measure stage against plain lm-eval",
        "",
        f"Checkpoint `examples/tiny_llama/instruct` in BF16, chat template applied; {asked}.",
        f"Machine: {about['processor']}, {about['cores']} cores, {about['memory_gb']} GB, {gpu}, "
        f"{about['date']}. {versions}. `hf` in batches of {found['hf_batch_size']}.",
        *([about["note"]] if about["note"] else []),
        "",
        "```",
        found["command"],
        "```",
        "",
        "Wall time of a fresh process from start to end, a server's start included. Ratios are "
        "taken within a round: above 1, the engine took longer than the stage's tasks. `lm_eval "
        "--model vllm` runs through `bench/lm_eval_vllm.py` where vLLM is `vllm-cpu`: it answers "
        "lm-eval's question for the distribution `vllm`, nothing else.",
        "",
        f"| engine | median of {rounds}, s | lowest and highest, s | ratio to the stage's tasks |",
        "|---|---:|---:|---:|",
        *(time_row(engine, runs) for engine in engines),
        "",
        *part_lines(engines, runs),
        "## Scores",
        "",
        "| engine | " + " | ".join(TASKS) + " |",
        "|---|" + "---:|" * len(TASKS),
        *(score_row(engine, runs) for engine in engines),
        "",
        "Documents whose score differs. On the diagonal between two rounds of the same engine, the "
        "most of any pair: the engine's own noise. Elsewhere in the same round: the most of any "
        "round.",
        "",
        *flip_table(engines, runs),
    ]
    return "\n".join(out) + "\n"


def of(engine: str, runs: list[Record]) -> dict[int, Record]:
    """An engine's run of each round."""
    return {run["round"]: run for run in runs if run["engine"] == engine}


def time_row(engine: str, runs: list[Record]) -> str:
    mine, stage = of(engine, runs), of("tasks", runs)
    seconds = [run["seconds"] for run in mine.values()]
    ratios = [mine[n]["seconds"] / stage[n]["seconds"] for n in mine if n in stage]
    ratio = f"{statistics.median(ratios):.2f}" if ratios else ""
    return (
        f"| {ENGINES[engine]} | {statistics.median(seconds):.1f} "
        f"| {min(seconds):.1f} to {max(seconds):.1f} | {ratio} |"
    )


def part_lines(engines: list[str], runs: list[Record]) -> list[str]:
    """Where the stage's own seconds go, by its record."""
    out = []
    for engine in engines:
        mine = of(engine, runs)
        parts = list(next(iter(mine.values()))["parts"])
        shares = {
            part: statistics.median(r["parts"][part] for r in mine.values()) for part in parts
        }
        if shares:
            said = ", ".join(f"{part} {value:.1f} s" for part, value in shares.items())
            out += [f"{ENGINES[engine]}, by its record (medians): {said}.", ""]
    return out


def score_row(engine: str, runs: list[Record]) -> str:
    cells = []
    for name in TASKS:
        values = sorted({run["scores"][name] for run in of(engine, runs).values()})
        cells.append(" to ".join(f"{value:.4f}" for value in {values[0]: 0, values[-1]: 0}))
    return f"| {ENGINES[engine]} | " + " | ".join(cells) + " |"


def flip_table(engines: list[str], runs: list[Record]) -> list[str]:
    out = ["| | " + " | ".join(ENGINES[engine] for engine in engines) + " |"]
    out.append("|---|" + "---:|" * len(engines))
    for row in engines:
        cells = [str(most_flips(row, column, runs)) for column in engines]
        out.append(f"| {ENGINES[row]} | " + " | ".join(cells) + " |")
    return out


def most_flips(row: str, column: str, runs: list[Record]) -> int | str:
    first, second = of(row, runs), of(column, runs)
    if row == column:
        pairs = list(itertools.combinations(first.values(), 2))
    else:
        pairs = [(first[n], second[n]) for n in first if n in second]
    flips = [sum(flipped(a["right"][name], b["right"][name]) for name in TASKS) for a, b in pairs]
    return max(flips, default="–")


def flipped(first: str, second: str) -> int:
    return sum(a != b for a, b in zip(first, second, strict=True))


if __name__ == "__main__":
    main()
