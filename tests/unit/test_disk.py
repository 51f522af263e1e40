"""Each refusal of the system has its class, its exit code and its next step."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from quantize.cli import main
from quantize.disk import HINTS, SPOKEN, fault, room, spoken
from quantize.errors import ResourceError, TransientError
from quantize.progress import LineView, Progress
from quantize.protocol import write_atomic
from quantize.refusals import refusal, refusals
from quantize.runner import _Tail
from quantize.status import Status
from quantize.store import Store


@pytest.mark.parametrize("number", sorted(HINTS))
def test_every_class_of_refusal_is_no_bug(number: int, tmp_path: Path) -> None:
    error = refusal(OSError(number, os.strerror(number), "weights"), "stage x", tmp_path)
    assert error is not None
    assert os.strerror(number) in error.message
    assert "stage x: " in error.message
    assert error.hint
    away = number in (errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.EHOSTDOWN)
    assert type(error) is (TransientError if away else ResourceError)
    full = number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    assert (f"bytes are free at {tmp_path}" in error.message) == full


@pytest.mark.parametrize("error", [FileNotFoundError(2, "gone"), KeyError("x"), OSError("odd")])
def test_a_bug_stays_a_bug(error: Exception) -> None:
    assert fault(error) is None


def test_what_native_code_says_is_understood() -> None:
    """safetensors, as it says it; and a library's error that was raised from the system's."""
    rust = Exception(
        'Error while serializing: I/O error: Os { code: 28, message: "No space left on device" }'
    )
    found = fault(rust)
    assert found is not None
    assert found.number == errno.ENOSPC
    wrapped = RuntimeError("cannot make the data set")
    wrapped.__cause__ = OSError(errno.EIO, "Input/output error")
    found = fault(wrapped)
    assert found is not None
    assert found.message.startswith("the disk fails")
    assert all(spoken(f"x: {os.strerror(number)}\n") == number for number in SPOKEN)


def test_the_bytes_that_are_needed_are_said_wherever_it_is_noticed(tmp_path: Path) -> None:
    for error in (
        OSError(errno.ENOSPC, "No space left on device"),
        ResourceError("compress: the disk is full: [Errno 28] No space left on device", "hint"),
    ):
        with (
            pytest.raises(ResourceError) as caught,
            refusals("stage compress", tmp_path, lambda: 12345),
        ):
            raise error
        assert "about 12345 bytes more are needed" in caught.value.message
        assert caught.value.message.count("bytes are free") == 1
    with pytest.raises(ResourceError, match=r"^port in use$"), refusals("stage x", tmp_path):
        raise ResourceError("port in use")
    with pytest.raises(FileNotFoundError), refusals("stage x", tmp_path):
        raise FileNotFoundError(2, "a bug")


# --- what only tells of the work must not stop it -----------------------------------------------


def test_a_status_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    status = Status([tmp_path / "no such folder" / "status.json"], {})
    progress = Progress(LineView(lambda line: None), status)
    with progress.stage("compress", 1, 2):
        progress.step("layers", 1, 2)
    status.end(None)


def test_a_store_that_is_full_when_a_run_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path, value: object, **_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr("quantize.status.write_json", refuse)
    with pytest.raises(SystemExit) as caught:
        main.main(["run", "tiny-llama-fp8", "--until", "fetch", "--store", str(tmp_path)])
    said = capsys.readouterr().err
    assert caught.value.code == 4
    assert f"bytes are free at {tmp_path}" in said
    assert "--metrics" not in said


def test_a_torn_event_is_skipped(tmp_path: Path) -> None:
    """A full disk tears a line, and the next event is appended to it."""
    lines: list[str] = []
    path = tmp_path / "events.jsonl"
    whole = '{"kind": "note", "text": "whole"}\n'
    path.write_text('{"kind": "note", "te' + whole + whole)
    _Tail(path, Progress(LineView(lines.append))).read()
    assert [line.strip() for line in lines] == ["whole"]


def test_an_atomic_write_that_fails_leaves_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "value.json").write_text("old")

    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="No space"):
        write_atomic(tmp_path / "value.json", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["value.json"]
    assert (tmp_path / "value.json").read_text() == "old"


def test_no_inode_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no inode" not in room(tmp_path)
    found = os.statvfs(tmp_path)
    none = os.statvfs_result((*found[:5], found.f_files, 0, 0, *found[8:]))
    monkeypatch.setattr(os, "statvfs", lambda place: none)
    assert "no inode for another file" in room(tmp_path / "not there yet")


@pytest.mark.parametrize(
    ("number", "code"), [(errno.EIO, 4), (errno.ESTALE, 75), (errno.ENOENT, 1)]
)
def test_every_command_ends_with_the_code_of_a_refusal(
    number: int,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(store: Store) -> None:
        raise OSError(number, os.strerror(number), "manifest.json")

    monkeypatch.setattr(Store, "artifacts", refuse)
    with pytest.raises(SystemExit) as caught:
        main.main(["store", "ls", "--store", str(tmp_path)])
    assert caught.value.code == code
    said = capsys.readouterr().err
    assert ("Traceback" in said) == (code == 1)
    assert ("next: " in said) == (code != 1)
