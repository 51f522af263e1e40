"""Broken inputs through the command line: the right exit code, one message, nothing else."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from quantize.cli import main
from tests.end_to_end.conftest import environment
from tests.faults.mutations import cases
from tests.faults.place import SOUND, Case, Marker, Place

CASES = cases()
LIMIT_SECONDS = 5.0
BY_PROCESS = CASES[:: len(CASES) // 8]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Place.make(tmp_path_factory.mktemp("sound")).folder


@pytest.fixture
def place(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    shutil.copytree(sound, tmp_path / "place")
    monkeypatch.setenv("QUANTIZE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return Place(tmp_path / "place")


def run(place: Place, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as end:
        main.main(arguments(place))
    said = capsys.readouterr()
    assert "Traceback" not in said.out
    return int(end.value.code or 0), said.err


def arguments(place: Place) -> list[str]:
    return ["run", str(place.folder / "recipe.yaml"), "--store", str(place.folder.parent / "store")]


def surroundings(place: Place) -> dict[str, tuple[int, int]]:
    """Everything but the store and the cache: size and time of change by path."""
    found = {}
    for parent, folders, files in os.walk(place.folder.parent):
        if Path(parent) == place.folder.parent:
            folders[:] = [name for name in folders if name not in ("store", "cache")]
        for name in (*folders, *files):
            status = (Path(parent) / name).lstat()
            found[f"{parent}/{name}"] = (status.st_size, status.st_mtime_ns)
    return found


def check_message(err: str, code: int, case: Case) -> None:
    assert code == case.code, err
    assert case.words in err, err
    assert "Traceback" not in err
    assert sum(line.startswith("error: ") for line in err.splitlines()) == 1, err
    assert not [c for c in err if c != "\n" and (ord(c) < 32 or 0x7F <= ord(c) < 0xA0)]
    assert not set(err) & set("\u202e\u2028\ud800")
    assert len(err) < 12_000


def test_there_are_many() -> None:
    assert len(CASES) >= 200


def test_the_sound_one_is_taken(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    code, err = run(place, capsys)
    assert (code, SOUND[1] in err) == (SOUND[0], True), err
    place.recipe("source: model\n", "source: model\n  adapter: adapter\n")
    code, err = run(place, capsys)
    assert (code, SOUND[1] in err) == (SOUND[0], True), err


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_malformed(case: Case, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    case.spoil(place)
    before = surroundings(place)
    started = time.process_time()  # of this process: the machine may be busy with others
    code, err = run(place, capsys)
    assert time.process_time() - started < LIMIT_SECONDS
    check_message(err, code, case)
    assert surroundings(place) == before
    assert not place.marker.exists()


@pytest.mark.parametrize("case", BY_PROCESS, ids=lambda case: case.name)
def test_malformed_in_a_process_of_its_own(case: Case, place: Place) -> None:
    case.spoil(place)
    before = surroundings(place)
    done = subprocess.run(
        [sys.executable, "-m", "quantize", *arguments(place)],
        env=environment({"QUANTIZE_CACHE": os.environ["QUANTIZE_CACHE"]}),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    check_message(done.stderr, done.returncode, case)
    assert surroundings(place) == before


NEVER_READ = (
    *(
        "pytorch_model.bin",
        "adapter_model.bin",
        "training_args.bin",
        "optimizer.pt",
        "rng_state.pth",
    ),
    *("scheduler.pt", "model.pkl", "tokenizer.pkl", "tokenizer.pickle", "consolidated.00.pth"),
    *("tf_model.h5", "flax_model.msgpack", "model.ckpt", "state.npy", "handler.pt"),
    *("consolidated.safetensors", "runs/events.pkl", "global_step1/mp_rank_00_model_states.pt"),
)


def test_pickles_beside_good_weights_are_left_alone(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every name that a loader might look for, none of them opened: their times stay."""
    for name in NEVER_READ:
        place.write(f"model/{name}", pickle.dumps(Marker(place.marker)))
        place.write(f"adapter/{name}", pickle.dumps(Marker(place.marker)))
        for folder in ("model", "adapter"):
            os.utime(place.folder / folder / name, ns=(0, 10**18))
    place.recipe("source: model\n", "source: model\n  adapter: adapter\n")
    code, err = run(place, capsys)
    assert code == SOUND[0], err
    assert not place.marker.exists()
    pickle.loads((place.model / "pytorch_model.bin").read_bytes())  # it would have
    assert place.marker.exists()
