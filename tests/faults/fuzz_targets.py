"""What reads strangers' files, as functions of bytes: for :mod:`tests.faults.fuzz` and its corpus.

An execution writes the bytes to a file and has them read as the pipeline reads it. Only an error of
the error tree may come out."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from quantize.calibration_checks import check_calibration
from quantize.checkpoint import card_metadata, examine
from quantize.errors import QuantizeError
from quantize.printable import printable
from quantize.recipe_file import load_prompts, load_recipe, load_suite
from quantize.tensors import read_header
from quantize.untrusted import read_json_object

CORPUS = Path(__file__).parent / "corpus"
ROOT = Path(__file__).resolve().parents[2]
SMALL = "version: 1\nname: a\nmodel: {source: b}\nquantize: {method: rtn}\n"


def _recipe(folder: Path, data: bytes) -> None:
    """The three kinds of YAML file; a recipe also by way of --set."""
    path = folder / "recipe.yaml"
    path.write_bytes(data)
    for load in (load_recipe, load_suite, load_prompts):
        _only_typed(lambda load=load: load(path))  # type: ignore[misc]
    override = data[:200].decode("utf-8", "replace")
    path.write_text(SMALL, encoding="utf-8")  # parsing YAML takes most of the time
    _only_typed(lambda: load_recipe(path, (override,)))


def _safetensors(folder: Path, data: bytes) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(data)
    _only_typed(lambda: read_header(path))
    # The length of the header is a wall that mutation seldom climbs: once more with a true one.
    path.write_bytes(len(data).to_bytes(8, "little") + data + bytes(64))
    _only_typed(lambda: read_header(path))


def _json(folder: Path, data: bytes) -> None:
    """Each JSON file of a checkpoint, and the whole folder as one finds it."""
    names = ("config.json", "model.safetensors.index.json", "tokenizer_config.json")
    for name in names:
        (folder / name).write_bytes(data)
    _only_typed(lambda: read_json_object(folder / "config.json"))
    for finding in examine(folder)[1]:
        printable(finding.message).encode()


def _card(folder: Path, data: bytes) -> None:
    (folder / "README.md").write_bytes(b"---\n" + data + b"\n---\n")
    _only_typed(lambda: card_metadata(folder))


def _rows(folder: Path, data: bytes) -> None:
    for name in ("rows.jsonl", "rows.txt", "rows.parquet"):
        (folder / name).write_bytes(data)
        for finding in check_calibration(folder / name, has_chat_template=True):
            printable(finding.message).encode()


def _only_typed(run: Callable[[], object]) -> None:
    """A typed error whose message can be printed, or none; all else is a finding."""
    try:
        run()
    except QuantizeError as error:
        printable(error.message + error.hint).encode()


TARGETS: dict[str, Callable[[Path, bytes], None]] = {
    "recipe": _recipe,
    "safetensors": _safetensors,
    "json": _json,
    "card": _card,
    "rows": _rows,
}


def execute(target: str, data: bytes) -> None:
    """One execution in a folder of its own."""
    with tempfile.TemporaryDirectory(dir=memory()) as folder:
        TARGETS[target](Path(folder), data)


def memory() -> str | None:
    """A file system in memory, where there is one: the files live for a millisecond."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None
