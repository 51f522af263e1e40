"""`python -m tests`: formatting, lint, strict types, then every test. Arguments go to pytest."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODULE = [sys.executable, "-m"]
UNIT = "tests/unit"


def main() -> None:
    for step in (["ruff", "format", "--check", "."], ["ruff", "check", "."], ["mypy"]):
        if code := run(*step):
            sys.exit(code)
    arguments = sys.argv[1:]
    if set(arguments) - {"--slow"}:  # a choice of tests, which install what they need
        sys.exit(run("pytest", *arguments))
    # llama.cpp is compiled for minutes, on the core that the unit tests leave idle.
    with environments():
        codes = [run("pytest", UNIT, *arguments)]
    codes.append(run("pytest", "--ignore", UNIT, "--durations", "25", *arguments))
    sys.exit(max(codes))


def run(*arguments: str) -> int:
    """Run a module in the root; its exit code."""
    print("$", "python -m", " ".join(arguments), flush=True)
    return subprocess.run([*MODULE, *arguments], cwd=ROOT, check=False).returncode


@contextmanager
def environments() -> Iterator[None]:
    """Install the tools' environments meanwhile; at the end wait for them, and say what failed."""
    with tempfile.TemporaryFile("w+") as log:
        command = [*MODULE, "quantize", "setup", "--all"]
        setup = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield
            if code := setup.wait():
                log.seek(0)
                sys.exit(f"quantize setup --all ended with {code}:\n{log.read()[-4000:]}")
        finally:
            setup.terminate()
            setup.wait()


main()
