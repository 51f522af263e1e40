"""Coverage-guided fuzzing of what reads strangers' files; by hand, for it has no end.

    pip install atheris
    python -m tests.faults.fuzz recipe|safetensors|json|card|rows --runs 1000000 --corpus FOLDER

What is found goes to `tests/faults/corpus/<target>/`, which `tests/unit/test_fuzz_corpus.py`
replays.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

INSTRUMENTED = ["quantize", "yaml"]
"""Packages whose branches guide the search; all of Python's would take minutes to prepare."""


def main() -> None:
    """Fuzz one target; libFuzzer ends the process, with 77 on a finding."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target")
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--corpus", type=Path, required=True, help="grows; seeds are added")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations; 0: by the clock")
    arguments = parser.parse_args()
    import atheris

    with atheris.instrument_imports(include=INSTRUMENTED):
        from tests.faults.fuzz_targets import CORPUS, ROOT, TARGETS, memory

    run = TARGETS[arguments.target]
    arguments.corpus.mkdir(parents=True, exist_ok=True)
    seeds = [path for path in (CORPUS / arguments.target).glob("*") if path.is_file()]
    if arguments.target == "recipe":
        seeds += [*(ROOT / "recipes").glob("tiny*.yaml"), *(ROOT / "eval").glob("*/tiny*.yaml")]
    for number, seed in enumerate(seeds):
        (arguments.corpus / f"seed-{number}").write_bytes(seed.read_bytes())
    folder = Path(tempfile.mkdtemp(dir=memory()))

    def once(data: bytes) -> None:
        run(folder, data)

    options = [f"-runs={arguments.runs}", "-max_len=2048", "-timeout=20", "-rss_limit_mb=3000"]
    options += [f"-artifact_prefix={arguments.corpus.parent}/{arguments.target}-"]
    options += [f"-seed={arguments.seed}", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *options, str(arguments.corpus)], once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
