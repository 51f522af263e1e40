"""`python -m tests`: formatting, lint, strict types, then every test. Arguments go to pytest."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    module = [sys.executable, "-m"]
    steps = [
        [*module, "ruff", "format", "--check", "."],
        [*module, "ruff", "check", "."],
        [*module, "mypy"],
        [*module, "pytest", *sys.argv[1:]],
    ]
    for step in steps:
        print("$", " ".join(step[1:]), flush=True)
        if code := subprocess.run(step, cwd=ROOT, check=False).returncode:
            sys.exit(code)


main()
