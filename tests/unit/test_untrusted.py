"""Links, kinds of file, weights with NaN, terminals: what the corpus of malformed inputs is not."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from quantize.checking import Report
from quantize.checklist import Checked
from quantize.checkpoint import examine
from quantize.cli import fail
from quantize.environments import Environments
from quantize.errors import SourceError
from quantize.findings import Finding, Told
from quantize.model_files import unsound_files
from quantize.plan import Plan, StageEntry
from quantize.printable import printable, shortened
from quantize.progress import BarView, LineView, Progress
from quantize.protocol import Events, write_json
from quantize.report.checks import checks_text
from quantize.report.tables import artifacts_table, environments_table, plan_table, render
from quantize.stages.fetch import hash_checkpoint
from quantize.status import Status
from quantize.store import Artifact, Manifest
from quantize.tensors import read_header
from quantize.untrusted import JSON_LIMIT_BYTES, foreign_link, open_regular, read_bytes
from quantize.weights import hash_and_look
from tests.unit.checkpoints import (
    bf16,
    llama_config,
    llama_tensors,
    safetensors_bytes,
    write_checkpoint,
)

HOSTILE = "[red]x[/] [link=https://e.example]y[/link] [/oops] {{ 7*7 }} \x1b[31m\x9b\u202e\ud800"


def hub_cache(root: Path) -> Path:
    """A snapshot as huggingface_hub lays it out: links into the repository's blobs."""
    plain = write_checkpoint(root / "plain", llama_tensors(layers=1))
    snapshot = root / "hub/models--owner--name/snapshots" / ("0" * 40)
    blobs = snapshot.parents[1] / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(plain.iterdir())):
        shutil.copyfile(path, blobs / f"{number:064x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:064x}")
    return snapshot


def test_links_of_a_hub_cache_are_followed(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    assert examine(snapshot)[1] == []
    (tmp_path / "short").symlink_to(snapshot)  # a folder that the user names by a link
    assert examine(tmp_path / "short")[1] == []


def test_links_out_of_a_hub_cache_are_not(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    link = snapshot / "config.json"
    elsewhere = tmp_path / "hub/models--other--name/blobs/0"
    elsewhere.parent.mkdir(parents=True)
    for target in (tmp_path / "plain/config.json", elsewhere, snapshot.parents[1] / "refs"):
        target.write_bytes((tmp_path / "plain/config.json").read_bytes())
        link.unlink()
        link.symlink_to(target)
        assert foreign_link(link) == str(target)
        assert "outside the checkpoint's folder" in examine(snapshot)[1][0].message
    # the same layout under another name is no cache
    moved = tmp_path / "weights/snapshots/1"
    shutil.copytree(snapshot, moved, symlinks=True)
    shutil.copytree(snapshot.parents[1] / "blobs", tmp_path / "weights/blobs")
    assert foreign_link(moved / "tokenizer.json") is not None
    # nor are the blobs' neighbours that are no snapshots
    beside = snapshot.parents[1] / "refs.d/1"
    shutil.copytree(snapshot, beside, symlinks=True)
    assert foreign_link(beside / "tokenizer.json") is not None


def test_links_inside_the_folder_and_hard_links(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "a")
    (folder / "LICENSE").symlink_to("config.json")
    os.link(folder / "config.json", folder / "LICENSE.txt")
    assert examine(folder)[1] == []


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody may look into; pytest's own are for the user alone."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def test_what_one_may_not_read(open_folder: Path) -> None:
    """As nobody: for root there is no such file."""
    folder = write_checkpoint(open_folder / "a")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).chmod(0)
    code = (
        "import os, sys; from pathlib import Path; from quantize.checkpoint import examine; "
        "b'a'.decode('utf-8-sig'); os.setuid(65534) if os.getuid() == 0 else None; "
        "print(*(f.message for f in examine(Path(sys.argv[1]))[1]), sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert f"cannot read {folder / name}: Permission denied" in done.stdout
    folder.chmod(0)
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False
    )
    folder.chmod(0o755)
    assert (done.stderr, "cannot read" in done.stdout) == ("", True)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path, tmp_path / "none"):
        with pytest.raises(SourceError, match=str(path)):
            open_regular(path)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_no_number(tmp_path: Path, dtype: str, value: float) -> None:
    values = np.full((300, 7), 65504.0 if dtype == "F16" else 3e38, "<f8")
    values[1] = -values[1]
    values[2] = 0.0
    path = tmp_path / "model.safetensors"
    kind = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "BF16": "<f4"}[dtype]

    def write() -> str:
        stored = values.astype(kind)
        bits = bf16(stored) if dtype == "BF16" else stored
        path.write_bytes(safetensors_bytes({"a": (dtype, bits), "b.weight": (dtype, bits)}))
        return subprocess.run(["sha256sum", path], capture_output=True, text=True).stdout[:64]

    sha256 = write()
    assert hash_and_look(path) == (sha256, [])
    values[299, 6] = value
    sha256 = write()
    faults = [
        f"{name} has 1 NaN or Inf of 2100 (the first at [299, 6])" for name in ("a", "b.weight")
    ]
    assert hash_and_look(path) == (sha256, faults)


def test_fetch_names_the_file_and_the_tensor(tmp_path: Path) -> None:
    tensors = llama_tensors()
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][1][3, 5] = 0x7FC0  # NaN in BF16
    folder = write_checkpoint(tmp_path / "a", tensors, llama_config(), shards=2)
    with pytest.raises(SourceError) as error:
        hash_checkpoint(folder, lambda *_: None)
    shard = next(path.name for path in folder.glob("*.safetensors") if name in read_header(path))
    assert f"{shard}: {name} has 1 NaN or Inf" in error.value.message
    assert "(the first at [3, 5])" in error.value.message


# --- what is shown


def test_printable() -> None:
    assert printable("a\tb\nc é 漢 \U0001f600") == "a\tb\nc é 漢 \U0001f600"
    assert printable("\x1b[2J\r\x00\x9b\u202e\u2028\ud800\x7f") == (
        "\\x1b[2J\\r\\x00\\x9b\\u202e\\u2028\\ud800\\x7f"
    )
    assert shortened("a\nb") == "a\\nb"
    assert shortened("x" * 500, 10) == "xxxxxxx..."


def test_a_table_takes_names_as_they_are() -> None:
    entry = StageEntry("fetch", "fetch", "0" * 64, {}, status="changed", reason=HOSTILE)
    shown = render(plan_table(Plan(HOSTILE, "cpu", (entry,), ())))
    assert "[red]x[/]" in shown and "[/oops]" in shown and "link=https" in shown
    assert not set(shown) & set("\x1b\x9b\u202e\ud800")
    shown.encode()


def test_other_tables_do_so_too(tmp_path: Path) -> None:
    made = Manifest("fetch", "0" * 64, {}, (), HOSTILE, "2026-01-01", {"total": 1.0}, {})
    own = {"vllm": tmp_path / "[red]x[/]" / "bin" / "python"}
    shown = render(artifacts_table([Artifact(tmp_path, made)]))
    assert "[red]x[/]" in shown
    assert not set(shown) & set("\x1b\x9b\u202e\ud800")
    shown = render(environments_table(Environments("cpu", tmp_path / "[red]x[/]", own)))
    assert "[red]x[/]" in "".join(shown.split())


@pytest.mark.parametrize(
    "told",
    [
        Told(findings=[Finding(HOSTILE, "")]),
        Told(findings=[Finding("", HOSTILE)]),
        Told(notes=[HOSTILE]),
        Told(unchecked=HOSTILE),
        Told(skipped=HOSTILE),
    ],
    ids=["message", "hint", "note", "unchecked", "skipped"],
)
def test_checks_take_names_as_they_are(told: Told) -> None:
    """Each says names of the checkpoint: of tensors, files, the architecture."""
    shown = checks_text(Report("tiny", (Checked("files", told),)))
    assert "[red]x[/]" in shown
    assert not set(shown) & set("\x1b\x9b\u202e\ud800")


def test_notes_on_all_checks_take_names_as_they_are() -> None:
    shown = checks_text(Report("tiny", (), (HOSTILE,)))
    assert "[red]x[/]" in shown
    assert not set(shown) & set("\x1b\x9b\u202e\ud800")


@pytest.mark.parametrize("bars", [False, True])
def test_progress_shows_names_as_they_are(tmp_path: Path, bars: bool) -> None:
    text = io.StringIO()
    lines: list[str] = []
    console = Console(file=text, width=200, force_terminal=False)
    view = BarView(console) if bars else LineView(lines.append, every_seconds=0)
    status = Status([tmp_path / "status.json"], {})
    progress = Progress(view, status)
    with progress.stage("fetch", 1, 2):
        progress.note(HOSTILE)
        progress.event({"kind": "note", "text": HOSTILE})
        progress.step(HOSTILE, 1, 2, "rows")
        status.write()
    assert json.loads((tmp_path / "status.json").read_text())["what"] == HOSTILE
    progress.close()
    shown = text.getvalue() if bars else "\n".join(lines)
    assert shown.count("[red]x[/]") >= 2
    assert not set(shown) & set("\x1b\x9b\u202e\ud800")


def test_a_step_shows_names_as_they_are() -> None:
    """Without a stage, whose title a view shows alone for a second."""
    lines: list[str] = []
    Progress(LineView(lines.append, every_seconds=0)).step(HOSTILE, 1, 2, "rows")
    assert "[red]x[/]" in lines[0]
    assert not set(lines[0]) & set("\x1b\x9b\u202e\ud800")


def test_half_a_character_can_be_written_and_read_again(tmp_path: Path) -> None:
    value = {"a": "\\\ud800\\", "b": HOSTILE}
    write_json(tmp_path / "a.json", value)
    assert json.loads((tmp_path / "a.json").read_text()) == value
    Events(tmp_path / "events.jsonl").note(HOSTILE)
    assert json.loads((tmp_path / "events.jsonl").read_text())["text"] == HOSTILE


def test_what_ends_a_command_cannot_write_to_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        fail(SourceError(HOSTILE, HOSTILE))
    said = capsys.readouterr().err
    assert said.count("[red]x[/]") == 2
    assert not set(said) & set("\x1b\x9b\u202e\ud800")


def test_limits(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": 1}')
    assert read_bytes(path, 8) == b'{"a": 1}'
    with pytest.raises(SourceError, match="larger than 7 bytes"):
        read_bytes(path, 7)
    with open(path, "r+b") as file:
        file.truncate(64 << 20)
    tracemalloc.start()
    try:
        with pytest.raises(SourceError, match="larger than 8 bytes"):
            read_bytes(path, 8)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20  # it was not read to be measured
    finally:
        tracemalloc.stop()
    folder = write_checkpoint(tmp_path / "model")
    assert unsound_files(folder) == []
    with open(folder / "tokenizer.json", "r+b") as file:
        file.truncate(JSON_LIMIT_BYTES + 1)
    assert "far more than such a file has" in unsound_files(folder)[0].message
