"""The streaming engine against llm-compressor's `oneshot`, side by side: CPU time, memory, quality.

    python bench/engine.py --python ENVIRONMENT/bin/python

ENVIRONMENT is the llmcompressor one (`quantize setup` prints where it is; by default it is
installed). Every measurement is a fresh process; engines take turns within a round, and each round
calibrates on other text. Writes bench/engine.json, and from it bench/engine.md and bench/engine.svg
(`--render` does only that). `--parts` chooses among shipped, wide, memory and kills.

CPU seconds are user and system time of the whole process; "own" ones are without the imports, which
are the same for both engines. Memory is the highest RssAnon, read every 20 ms: what the process has
allocated, without the pages of mapped files.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
INSIDE = ROOT / "bench" / "engine_inside.py"
RESULTS = ROOT / "bench" / "engine.json"
POLL_SECONDS = 0.02

ENGINES = ("oneshot", "stream")
METHODS = {
    "fp8": ("FP8_DYNAMIC", None),
    "gptq": ("W4A16", 128),
    "awq": ("W4A16_ASYM", 128),
    "awq+gptq": ("W4A16_ASYM", 128),
}
MODELS = {
    "shipped": "examples/tiny_llama/instruct (4 layers of width 256)",
    "plain": "4 layers of width 1024",
    "outliers": "4 layers of width 1024, with outlier channels",
}
LAYERS = (4, 12, 36)
VERSIONS = ("llmcompressor", "compressed-tensors", "torch", "transformers")

Record = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", type=Path, help="interpreter of the llmcompressor environment")
    parser.add_argument("--parts", nargs="+", default=["shipped", "wide", "memory", "kills"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--rounds", type=int, default=3, help="of the shipped checkpoint")
    parser.add_argument("--wide-rounds", type=int, default=1)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--work", type=Path, help="where models are kept for another run")
    parser.add_argument("--render", action="store_true")
    options = parser.parse_args()
    if not options.render:
        found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        with tempfile.TemporaryDirectory() as scratch:
            work = (options.work or Path(scratch)).absolute()
            work.mkdir(parents=True, exist_ok=True)
            bench(options, work, found)
    found = json.loads(RESULTS.read_text())
    RESULTS.with_suffix(".md").write_text(table(found), encoding="utf-8")
    plot(found, RESULTS.with_suffix(".svg"))


def bench(options: argparse.Namespace, work: Path, found: Record) -> None:
    """Run the chosen parts; each replaces its own part of the results."""
    python = options.python.absolute() if options.python else installed()
    found["machine"] = machine(python)
    found["command"] = f"python bench/engine.py --rounds {options.rounds}"
    found["command"] += f" --wide-rounds {options.wide_rounds} --kills {options.kills}"
    models: list[tuple[str, Path, int]] = []
    if "shipped" in options.parts:
        models.append(("shipped", ROOT / "examples/tiny_llama/instruct", options.rounds))
    if "wide" in options.parts:
        if not (work / "wide" / "trained.json").exists():
            inside(python, "wide", work / "wide")
        found["trained"] = json.loads((work / "wide" / "trained.json").read_text())
        models += [
            (kind, work / "wide" / kind, options.wide_rounds) for kind in ("plain", "outliers")
        ]
    for kind, model, rounds in models:
        found.setdefault("engines", {})[kind] = engines(
            python, model, rounds, options.methods, work
        )
        keep(found)
    if "memory" in options.parts:
        found["memory"] = memory(python, work)
        keep(found)
    if "kills" in options.parts:
        found["kills"] = kills(python, options.kills, work)
        keep(found)


def keep(found: Record) -> None:
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def engines(
    python: Path, model: Path, rounds: int, methods: list[str], work: Path
) -> dict[str, list[Record]]:
    """Every method by every engine, in turn; the results by "METHOD ENGINE", one a round."""
    found: dict[str, list[Record]] = {}
    for number in range(rounds):
        tokens = work / "tokens.npz"
        inside(python, "tokens", model, tokens, number)
        for method in methods:
            outputs = {}
            for engine in ENGINES:
                output = fresh(work / "output" / engine)
                record = quantized(python, engine, method, model, tokens, output)
                found.setdefault(f"{method} {engine}", []).append(record)
                outputs[engine] = output / "model"
            measured = json.loads(inside(python, "measure", model, *outputs.values()))
            for engine, folder in outputs.items():
                one = measured[str(folder)]
                record = found[f"{method} {engine}"][-1]
                record |= {"kl": one["kl"], "perplexity": one["perplexity"]}
                record["baseline_perplexity"] = measured[str(model)]["perplexity"]
            say(model, method, {engine: found[f"{method} {engine}"][-1] for engine in ENGINES})
    return found


def memory(python: Path, work: Path) -> dict[str, list[Record]]:
    """GPTQ on 4, 12 and 36 equal layers."""
    found: dict[str, list[Record]] = {engine: [] for engine in ENGINES}
    for layers in LAYERS:
        model = work / "deep" / str(layers)
        if not model.exists():
            inside(python, "deep", model, layers)
        inside(python, "tokens", model, work / "tokens.npz", 0)
        for engine in ENGINES:
            output = fresh(work / "output" / engine)
            record = quantized(python, engine, "gptq", model, work / "tokens.npz", output)
            found[engine].append({"layers": layers} | record)
            shutil.rmtree(output)
        say(model, "gptq", {engine: found[engine][-1] for engine in ENGINES})
    return found


def kills(python: Path, count: int, work: Path) -> Record:
    folder = fresh(work / "kills")
    output = folder / "kills.json"
    module = ["-m", "tests.end_to_end.engine_kill", "llama", str(folder), str(count), str(output)]
    subprocess.run(
        [python, *module], cwd=ROOT, env=variables(), stdout=subprocess.DEVNULL, check=True
    )
    found: Record = json.loads(output.read_text())
    return found


def quantized(
    python: Path, engine: str, method: str, model: Path, tokens: Path, output: Path
) -> Record:
    """One worker in a process of its own, with what it used."""
    scheme, group_size = METHODS[method]
    (output / "model").mkdir()
    (output / "work").mkdir()
    body = {
        "model": str(model),
        "output": str(output / "model"),
        "tokens": None if method == "fp8" else str(tokens),
        "method": method,
        "scheme": scheme,
        "group_size": group_size,
        "ignore": ["lm_head"],
        "overrides": [],
        "kv_cache": None,
        "dampening": 0.01,
        "activation_order": "static",
        "copy": [],
    }
    request = {"worker": engine, "body": body, "work": str(output / "work"), "version": 1}
    request["events"] = str(output / "events.jsonl")
    (output / "request.json").write_text(json.dumps(request))
    command = [str(python), str(INSIDE), "run", engine]
    command += [str(output / "request.json"), str(output / "result.json")]
    record = observed(command, output / "log")
    own = json.loads((output / "result.json").read_text())
    return record | {"own_cpu_seconds": own["cpu_seconds"]}


def observed(command: list[str], log: Path) -> Record:
    """Run a process; CPU and wall seconds, and its highest RssAnon in bytes."""
    started = time.monotonic()
    with open(log, "wb") as file:
        process = subprocess.Popen(command, env=variables(), stdout=file, stderr=file)
    peak = [0]
    ended = threading.Event()
    watcher = threading.Thread(target=watch, args=(process.pid, peak, ended))
    watcher.start()
    _, status, used = os.wait4(process.pid, 0)
    ended.set()
    watcher.join()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}:\n{log.read_text()[-3000:]}")
    return {
        "wall_seconds": time.monotonic() - started,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_anonymous_bytes": peak[0],
    }


def watch(process: int, peak: list[int], ended: threading.Event) -> None:
    while not ended.wait(POLL_SECONDS):
        try:
            status = Path(f"/proc/{process}/status").read_text()
        except OSError:
            return
        for line in status.splitlines():
            if line.startswith("RssAnon:"):
                peak[0] = max(peak[0], int(line.split()[1]) * 1024)


def inside(python: Path, *arguments: object) -> str:
    command = [str(python), str(INSIDE), *map(str, arguments)]
    done = subprocess.run(command, env=variables(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}:\n{done.stderr[-3000:]}")
    return done.stdout.strip().rpartition("\n")[2]


def variables() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def installed() -> Path:
    from quantize.environments import Environments, accelerator, cache_folder
    from quantize.progress import LineView, Progress

    here = Environments(accelerator(), cache_folder())
    with tempfile.TemporaryDirectory() as folder:
        return here.install("llmcompressor", Progress(LineView(print)), Path(folder, "log"))


def machine(python: Path) -> Record:
    processor = next(
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    )
    code = f"from importlib.metadata import version as v; print(*(v(n) for n in {VERSIONS}))"
    shown = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "system": platform.system(),
        "date": datetime.date.today().isoformat(),
        "versions": dict(zip(VERSIONS, shown.stdout.split(), strict=True)),
    }


def say(model: Path, method: str, records: dict[str, Record]) -> None:
    for engine, record in records.items():
        shown = {key: f"{value:.5g}" for key, value in record.items()}
        print(model.name, method, engine, shown, flush=True)


def table(found: Record) -> str:
    """The page: what was run where, and a table for each part."""
    about = found["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    lines = [
        "# Engines",
        "",
        "The streaming engine (`engine: stream`) against llm-compressor's `oneshot`"
        " (`engine: llmcompressor`).",
        f"Machine: {about['processor']}, {about['cores']} cores, {about['memory_gb']} GB, no GPU,"
        f" {about['date']}; {versions}.",
        "",
        "```",
        found["command"],
        "```",
        "",
        "CPU seconds are user and system time, *own* without imports (the same for both engines)."
        " Memory is the highest RssAnon.",
        "KL is the mean over held-out positions and the whole vocabulary, in nats, against BF16, in"
        " transformers; where there were",
        "several rounds, each was calibrated on other text: medians of seconds and memory, means of"
        " KL and perplexity.",
        "",
    ]
    for kind, records in found.get("engines", {}).items():
        lines += ["", *engine_table(kind, records, found)]
    if "memory" in found:
        lines += ["", *memory_table(found["memory"])]
    if "kills" in found:
        lines += ["", *kill_lines(found["kills"])]
    return "\n".join(lines) + "\n"


def engine_table(kind: str, records: dict[str, list[Record]], found: Record) -> list[str]:
    first = next(iter(records.values()))
    baseline = first[0]["baseline_perplexity"]
    how = ""
    if kind != "shipped":
        how = f", trained for {found['trained']['steps']} steps on the same documents"
    lines = [
        f"## {MODELS[kind]}{how}",
        "",
        f"{len(first)} round{'s' * (len(first) > 1)}; perplexity of BF16 {baseline:.4f}.",
        "",
        "| method | engine | CPU s | own CPU s | oneshot ÷ stream | wall s | memory | KL"
        " | ÷ oneshot | perplexity |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for method in METHODS:
        if f"{method} stream" not in records:
            continue
        rows = {engine: records[f"{method} {engine}"] for engine in ENGINES}
        own = {engine: median(rows[engine], "own_cpu_seconds") for engine in ENGINES}
        kl = {engine: mean(rows[engine], "kl") for engine in ENGINES}
        for engine in ENGINES:
            faster = f"{own['oneshot'] / own['stream']:.1f}" if engine == "stream" else ""
            ratio = f"{kl['stream'] / kl['oneshot']:.3f}" if engine == "stream" else ""
            lines.append(
                f"| {method} {METHODS[method][0]} | {engine}"
                f" | {median(rows[engine], 'cpu_seconds'):.1f} | {own[engine]:.1f} | {faster}"
                f" | {median(rows[engine], 'wall_seconds'):.1f}"
                f" | {median(rows[engine], 'peak_anonymous_bytes') / 1e6:.0f} MB"
                f" | {kl[engine]:.5f} | {ratio} | {mean(rows[engine], 'perplexity'):.4f} |"
            )
    return lines


def memory_table(records: dict[str, list[Record]]) -> list[str]:
    lines = [
        "## Memory by depth: GPTQ, random layers of width 512",
        "",
        "| engine | "
        + " | ".join(f"{one['layers']} layers" for one in records["stream"])
        + " | growth |",
        "|---|" + "---:|" * (len(records["stream"]) + 1),
    ]
    for engine in ENGINES:
        bytes_ = [one["peak_anonymous_bytes"] for one in records[engine]]
        cells = " | ".join(f"{count / 1e6:.0f} MB" for count in bytes_)
        lines.append(f"| {engine} | {cells} | {bytes_[-1] / bytes_[0] - 1:+.1%} |")
    return lines


def kill_lines(found: Record) -> list[str]:
    each = found["kills"]
    killed = sum(kill["killed"] for kill in each)
    identical = sum(kill["identical"] for kill in each)
    return [
        "## Killed at random moments",
        "",
        f"awq+gptq of {found['layers']} layers, SIGKILL at {len(each)} random moments of a run of"
        f" {found['seconds']:.1f} s ({killed} came before its end), then run again: {identical} of"
        f" {len(each)} results byte-identical to an undisturbed run's; at most"
        f" {max(kill['repeated'] for kill in each)} layer begun twice; no finished part written"
        f" again in {sum(not kill['rewritten'] for kill in each)} of {len(each)}.",
    ]


def median(records: list[Record], key: str) -> float:
    return statistics.median(record[key] for record in records)


def mean(records: list[Record], key: str) -> float:
    return statistics.fmean(record[key] for record in records)


def plot(found: Record, file: Path) -> None:
    """CPU seconds and KL by method, memory by depth."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "engine"  # the same file from the same results
    from matplotlib import pyplot

    kinds = list(found.get("engines", {}))
    rows = max(1, len(kinds))
    figure, axes = pyplot.subplots(rows, 3, figsize=(12, 3.2 * rows), squeeze=False)
    colours = {"oneshot": "#9aa5b1", "stream": "#1f6feb"}
    for row, kind in enumerate(kinds):
        records = found["engines"][kind]
        methods = [method for method in METHODS if f"{method} stream" in records]
        for axis, key, label in (
            (axes[row][0], "own_cpu_seconds", "CPU seconds, without imports"),
            (axes[row][1], "kl", "KL from BF16, nats a token"),
        ):
            for shift, engine in ((-0.2, "oneshot"), (0.2, "stream")):
                values = [mean(records[f"{method} {engine}"], key) for method in methods]
                places = [place + shift for place in range(len(methods))]
                axis.bar(places, values, 0.38, label=engine, color=colours[engine])
            axis.set_xticks(range(len(methods)), methods)
            axis.set_yscale("log")
            axis.set_title(f"{label}\n{MODELS[kind]}", fontsize=8)
        axes[row][0].legend(fontsize=8)
        if row:
            axes[row][2].axis("off")
    if "memory" in found:
        axis = axes[0][2]
        for engine in ENGINES:
            points = found["memory"][engine]
            layers = [one["layers"] for one in points]
            megabytes = [one["peak_anonymous_bytes"] / 1e6 for one in points]
            axis.plot(layers, megabytes, "o-", label=engine, color=colours[engine])
        axis.set_ylim(bottom=0)
        axis.set_xlabel("layers")
        axis.set_title("peak anonymous memory, MB\nGPTQ, width 512", fontsize=8)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


main()
