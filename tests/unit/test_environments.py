"""Environments: real uv, real virtual environments, a wheel made here, no network."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from base64 import urlsafe_b64encode
from collections.abc import Iterator
from pathlib import Path

import pytest
from child_process import ROOT, Helper, alive, helper, wait_until

from quantize import environments as module
from quantize.environments import MARK, Environment, Environments, cache_folder
from quantize.errors import ResourceError, TransientError, UsageError
from quantize.liveness import Patience
from quantize.process import Process
from quantize.progress import LineView, Progress

IMPORT_WAITS = """
import os, time
if os.environ.get("TOY_WAITS"):
    print("importing", os.getpid(), flush=True)
    time.sleep(60)
"""


def wheel(folder: Path, name: str, version: str, source: str) -> Path:
    """A wheel of one module (PEP 427)."""
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": source,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for path, content in files.items():
        digest = urlsafe_b64encode(hashlib.sha256(content.encode()).digest()).decode().rstrip("=")
        record += f"{path},sha256={digest},{len(content)}\n"
    files[f"{info}/RECORD"] = record + f"{info}/RECORD,,\n"
    target = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(target, "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)
    return target


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheels")
    wheel(folder, "toy", "1.0", IMPORT_WAITS)
    wheel(folder, "toy", "2.0", "raise ImportError('libtoy.so.2: cannot open shared object file')")
    wheel(folder, "toy", "3.0", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    return folder


class Recorder(LineView):
    """Lines that stay, and every step."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.steps: list[str] = []
        super().__init__(self.lines.append)

    def step(self, what: str, done: float, total: float, unit: str, eta_seconds: float) -> None:
        self.steps.append(f"{what}: {done:g}/{total:g} {unit}")


class Toy:
    """An environment `toy` with locks in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.view = Recorder()
        self.log = folder / "install.log"
        self.environments = Environments("cpu", folder / "cache")
        self.lock("toy==1.0\n")

    def lock(self, text: str) -> None:
        (self.folder / "toy.lock").write_text(text)

    def install(self) -> Path:
        return self.environments.install("toy", Progress(self.view), self.log)

    @property
    def final(self) -> Path:
        return self.environments.folder("toy")

    def leftovers(self) -> list[str]:
        """Entries beside the finished environment, its lock aside."""
        found = (path.name for path in self.final.parent.iterdir())
        return sorted(name for name in found if not name.endswith(".lock"))


def known(python: str = sys.executable) -> dict[str, Environment]:
    return {"toy": Environment("toy", "tests", {"cpu": "toy.lock"}, ("toy",), python=python)}


@pytest.fixture
def toy(tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    monkeypatch.setattr(module, "ENVIRONMENTS", known())
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    for name, value in {
        "UV_FIND_LINKS": str(wheels),
        "UV_NO_INDEX": "1",
        "UV_OFFLINE": "1",
        "UV_PYTHON_DOWNLOADS": "never",
        "UV_CACHE_DIR": str(wheels / "uv-cache"),
    }.items():
        monkeypatch.setenv(name, value)
    return Toy(tmp_path)


def test_install_and_again(toy: Toy) -> None:
    assert not toy.environments.installed("toy")
    python = toy.install()
    assert toy.environments.installed("toy")
    assert python == toy.environments.python("toy") == toy.final / "bin" / "python"
    mark = json.loads((toy.final / MARK).read_text())
    assert mark["lock"] == toy.environments.lock_digest("toy")
    assert toy.leftovers() == [toy.final.name]
    found = subprocess.run(
        [python, "-c", "import sys, toy; print(sys.prefix); print(toy.__file__)"],
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert all(Path(path).is_relative_to(toy.final) for path in found)  # and not the staging folder
    said = list(toy.view.lines)
    assert "installing environment toy" in said[0]
    assert "is ready" in said[-1]
    assert "installing toy: 1/1 packages" in toy.view.steps
    assert "checking toy: first import: 0/0 " in toy.view.steps
    for script in (path for path in (toy.final / "bin").iterdir() if path.is_file()):
        assert b".staging" not in script.read_bytes(), script
    made = (toy.final / MARK).stat().st_mtime_ns
    assert toy.install() == python
    assert (toy.final / MARK).stat().st_mtime_ns == made
    assert toy.view.lines == said


def test_an_environment_without_its_mark_is_not_there(toy: Toy) -> None:
    toy.install()
    (toy.final / MARK).unlink()
    (toy.final / "stale").write_text("of the old one")
    assert not toy.environments.installed("toy")
    toy.install()
    assert toy.environments.installed("toy")
    assert not (toy.final / "stale").exists()


def test_an_environment_whose_python_was_removed_is_made_again(toy: Toy) -> None:
    python = toy.install()
    python.unlink()
    python.symlink_to("/nonexistent/python3.11")
    assert not toy.environments.installed("toy")
    assert toy.install().exists()


def test_another_lock_is_another_folder(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    digest, python = toy.environments.lock_digest("toy"), toy.install()
    toy.lock("toy==1.1\n")
    assert toy.environments.lock_digest("toy") != digest
    assert not toy.environments.installed("toy")
    assert toy.environments.python("toy") != python
    toy.lock("toy==1.0\n")
    assert toy.environments.installed("toy")
    assert toy.environments.python("toy") == python
    other = Environment("toy", "tests", {"cpu": "toy.lock"}, ("toy",), python="3.12")
    monkeypatch.setitem(module.ENVIRONMENTS, "toy", other)
    assert toy.environments.lock_digest("toy") != digest


@pytest.mark.parametrize(
    ("lock", "message"),
    [
        ("toy==9.9\n", r"(?s)environment toy does not install:\n.*toy.*9\.9"),
        ("toy==2.0\n", r"(?s)installed but does not work:\n.*libtoy.so.2: cannot open"),
        ("toy==3.0\n", r"installed but does not work:\nFatal Python error: Segmentation fault"),
    ],
)
def test_what_does_not_work_is_not_installed(lock: str, message: str, toy: Toy) -> None:
    toy.lock(lock)
    with pytest.raises(ResourceError, match=message) as caught:
        toy.install()
    assert str(toy.log) in caught.value.hint
    assert not toy.environments.installed("toy")
    assert not toy.final.exists()


def test_settings_of_the_project_around_are_not_read(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = toy.folder / "project"
    project.mkdir()
    (project / "uv.toml").write_text('find-links = ["/nowhere"]\nno-such-setting = true\n')
    monkeypatch.chdir(project)
    assert toy.install().exists()


def test_the_running_python_stands_in_for_one_that_is_not_there(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ENVIRONMENTS", known("3.99"))
    assert toy.install().exists()
    assert any("Python 3.99 not found, using" in note for note in toy.view.lines)


# What a pipeline does in a process of its own: install `toy`, saying so line by line.
INSTALL = """
import sys
from pathlib import Path
from quantize import environments
from quantize.environments import Environment, Environments
from quantize.progress import LineView, Progress
folder = Path(sys.argv[1])
environments.FOLDER = folder
environments.ENVIRONMENTS = {
    "toy": Environment("toy", "tests", {"cpu": "toy.lock"}, ("toy",), python=sys.executable)
}
class Lines(LineView):
    def step(self, *step): pass
progress = Progress(Lines(lambda line: print(line.strip(), flush=True)))
python = Environments("cpu", folder / "cache").install("toy", progress, folder / sys.argv[2])
print("done", python, flush=True)
"""


def importer(log: Path) -> int:
    """The process that imports `toy` and waits there; the environment is all but finished."""
    said = re.compile(r"importing (\d+)\n")
    wait_until(lambda: log.exists() and said.search(log.read_text()), "the import to begin")
    found = said.search(log.read_text())
    assert found
    return int(found[1])


def test_a_killed_install_is_no_environment(toy: Toy) -> None:
    with helper(INSTALL, toy.folder, "killed.log", env={"TOY_WAITS": "1"}) as killed:
        assert killed.read().startswith("installing environment toy")
        pid = importer(toy.folder / "killed.log")
        killed.kill()
        wait_until(lambda: not alive(pid), "the child to die with it")
    assert toy.leftovers() == [f".{toy.final.name}.staging"]
    assert not toy.environments.installed("toy")
    toy.install()
    assert toy.environments.installed("toy")
    assert toy.leftovers() == [toy.final.name]


def test_a_uv_that_hangs_is_ended(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It downloads an interpreter where there is none."""
    silent = tmp_path / "uv"
    silent.write_text("#!/bin/sh\nexec sleep 600\n")
    silent.chmod(0o755)
    monkeypatch.setattr(module, "uv", lambda: str(silent))
    monkeypatch.setattr(module, "DEFAULT_PATIENCE", Patience(0.5, 600.0))
    with pytest.raises(TransientError, match="creating an environment hung and was ended"):
        toy.install()


def test_killed_right_before_the_rename(toy: Toy) -> None:
    toy.install()
    staging = toy.final.with_name(f".{toy.final.name}.staging")
    toy.final.rename(staging)
    (staging / "stale").write_text("of the killed one")
    assert not toy.environments.installed("toy")
    toy.install()
    assert not (toy.final / "stale").exists()
    assert toy.leftovers() == [toy.final.name]


def test_two_at_once_build_one(toy: Toy) -> None:
    waits = toy.folder / "one.log"
    with helper(INSTALL, toy.folder, "one.log", env={"TOY_WAITS": "1"}) as one:
        assert one.read().startswith("installing environment toy")
        pid = importer(waits)
        with helper(INSTALL, toy.folder, "two.log") as two:
            assert "being installed by another process" in two.read()
            os.kill(pid, 15)  # the first one's import fails: nothing is taken for complete
            assert two.read().startswith("installing environment toy")
            assert two.read().startswith("environment toy is ready")
            built = two.read()
        assert built == f"done {toy.environments.python('toy')}"
    with helper(INSTALL, toy.folder, "three.log") as three:
        assert three.read() == built


def test_the_waiting_one_uses_what_the_other_has_built(toy: Toy) -> None:
    first, second = [helper(INSTALL, toy.folder, name) for name in ("one.log", "two.log")]
    with first as one, second as two:
        said = [list(lines(one)), list(lines(two))]
    builders = [text for text in said if text[0].startswith("installing environment")]
    assert len(builders) == 1
    assert said[0][-1] == said[1][-1] == f"done {toy.environments.python('toy')}"


def lines(process: Helper) -> Iterator[str]:
    while True:
        yield (line := process.read())
        if line.startswith("done"):
            return


# --- the user's own interpreter -----------------------------------------------------------------


def test_an_override_is_used_as_it_is(toy: Toy) -> None:
    own = Environments("cpu", toy.folder / "cache", {"toy": Path(sys.executable)})
    assert own.installed("toy")
    assert own.python("toy") == Path(sys.executable)
    assert own.install("toy", Progress(toy.view), toy.log) == own.python("toy")
    assert toy.view.lines == toy.view.steps == []
    assert own.lock_digest("toy") != toy.environments.lock_digest("toy")
    own.check_overrides()


def test_an_override_that_is_not_there(toy: Toy) -> None:
    own = Environments("cpu", toy.folder, {"toy": toy.folder / "python"})
    assert not own.installed("toy")
    for ask in (own.check_overrides, lambda: own.install("toy", Progress(toy.view), toy.log)):
        with pytest.raises(ResourceError, match=r"environments\.toy\.python: .* does not exist"):
            ask()


def test_what_an_override_holds_is_part_of_its_digest(toy: Toy) -> None:
    python = toy.folder / "venv" / "bin" / "python"
    packages = toy.folder / "venv" / "lib" / "python3.11" / "site-packages"
    packages.mkdir(parents=True)
    own = Environments("cpu", toy.folder, {"toy": python})
    before = own.lock_digest("toy")
    (packages / "torch-2.13.0.dist-info").mkdir()
    after = own.lock_digest("toy")
    assert before != after == own.lock_digest("toy")
    (packages / "torch-2.13.0.dist-info").rename(packages / "torch-2.14.0.dist-info")
    assert own.lock_digest("toy") not in (before, after)


# --- where wheels come from ---------------------------------------------------------------------


def test_a_folder_that_pip_was_given_is_used(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    links = os.environ["UV_FIND_LINKS"]
    monkeypatch.delenv("UV_FIND_LINKS")
    (toy.folder / "empty").mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", f"{toy.folder / 'empty'} {links}")  # pip's are spaced
    assert toy.install().exists()


def test_a_folder_that_uv_was_given_comes_first(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(toy.folder / "nowhere"))
    assert toy.install().exists()


# --- the way of this package into an environment ------------------------------------------------


def test_a_worker_sees_this_package_and_none_of_the_core(toy: Toy) -> None:
    python = toy.install()
    path = toy.environments.package_path()
    assert [entry.name for entry in path.iterdir()] == ["quantize"]
    assert (path / "quantize").resolve() == ROOT / "quantize"
    assert toy.environments.package_path() == path
    code = (
        "import json, sys, importlib.util as u, quantize.protocol as p; "
        "print(json.dumps([p.__file__, sys.path, "
        "[n for n in ('pydantic', 'numpy', 'rich', 'httpx', 'toy') if u.find_spec(n)]]))"
    )
    log = toy.folder / "worker.log"
    with Process([str(python), "-P", "-c", code], log=log, env={"PYTHONPATH": str(path)}) as worker:
        assert worker.wait() == 0, worker.output()
        file, places, importable = json.loads(worker.output())
    assert Path(file).is_relative_to(path)
    assert importable == ["toy"]
    core = Path(sys.prefix) / "lib"
    assert not any(Path(place).is_relative_to(core) for place in places)


def test_the_link_follows_a_moved_package_and_survives_a_kill(toy: Toy) -> None:
    path = toy.environments.package_path()
    (path / "quantize").unlink()
    (path / "quantize").symlink_to(toy.folder)  # a checkout that was moved here since
    path.with_name(f".{path.name}.{os.getpid()}").symlink_to("half way")
    assert toy.environments.package_path() == path
    assert (path / "quantize").resolve() == ROOT / "quantize"


# --- the machine --------------------------------------------------------------------------------


def test_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTIZE_ACCELERATOR", "cuda")
    assert module.accelerator() == "cuda"
    monkeypatch.setenv("QUANTIZE_ACCELERATOR", "tpu")
    with pytest.raises(UsageError, match="tpu"):
        module.accelerator()
    monkeypatch.delenv("QUANTIZE_ACCELERATOR")
    assert module.accelerator() == ("cuda" if shutil.which("nvidia-smi") else "cpu")


def test_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("QUANTIZE_CACHE", raising=False)
    for empty in (None, ""):  # an empty variable is an unset one, says the XDG specification
        if empty is None:
            monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        else:
            monkeypatch.setenv("XDG_CACHE_HOME", empty)
        assert cache_folder() == tmp_path / ".cache" / "quantize"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "quantize"
    monkeypatch.setenv("QUANTIZE_CACHE", "~/own")
    assert cache_folder() == tmp_path / "own"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QUANTIZE_CACHE", "here")
    assert cache_folder() == tmp_path / "here"


def test_every_environment_has_its_locks() -> None:
    for environment in module.ENVIRONMENTS.values():
        assert sorted(environment.locks) == ["cpu", "cuda"]
        for accelerator, lock in environment.locks.items():
            text = (module.FOLDER / lock).read_text()
            pinned = [line for line in text.splitlines() if line and line[0] not in " #"]
            assert pinned
            assert all("==" in line for line in pinned)
            assert "://" not in text
            names = {line.split("==")[0].split("[")[0] for line in pinned}
            if accelerator == "cpu":
                assert not names & {"torchvision", "torchaudio", "torchcodec"}


def test_written_bytes(tmp_path: Path) -> None:
    script = "head -c 3000000 /dev/zero; echo done >&2; sleep 60"
    with Process(["sh", "-c", script], log=tmp_path / "log") as process:
        wait_until(lambda: process.output().endswith("done\n"), "3 MB")
        assert module.written_bytes(process.pid) >= 5
    assert module.written_bytes(process.pid) == 0
