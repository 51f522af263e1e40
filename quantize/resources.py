"""Finding what a name means: recipes, suites and prompts by name, inputs by path or on the Hub.

A relative path inside a recipe starts at the recipe file's folder, then at the shipped root; inside
a suite it starts at the suite file's folder. The working directory never matters, except for what
is typed on the command line.
"""

# os.path answers False, or the text unchanged, where pathlib raises: on a name that is too long and
# on the home of an unknown user.
# ruff: noqa: PTH110, PTH111, PTH112, PTH113, PTH117

from __future__ import annotations

import difflib
import os
import re
from contextlib import suppress
from pathlib import Path

from quantize.errors import SourceError, UsageError
from quantize.printable import shortened
from quantize.untrusted import open_regular, what_it_is

PACKAGE = Path(__file__).resolve().parent
HUB_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".txt")


def shipped_root() -> Path:
    """Where `recipes/`, `eval/` and `examples/` are: in the installed package or the checkout."""
    installed = PACKAGE / "_shipped"
    return installed if installed.is_dir() else PACKAGE.parent


def find_recipe(text: str) -> Path:
    """The recipe file that `text` names: a path, or a shipped recipe's name."""
    return _find(text, Path(), "recipe", "recipes")


def find_suite(text: str, relative_to: Path) -> Path:
    """The suite file of `evaluate.suite`: a shipped name, or a path from the recipe's folder."""
    return _find(text, relative_to, "suite", "eval/suites")


def find_prompts(text: str, relative_to: Path) -> Path:
    """The prompts file of a suite's `smoke`: a shipped name, or a path from the suite's folder."""
    return _find(text, relative_to, "prompts", "eval/prompts")


def shipped_names(folder: str) -> list[str]:
    """Names of the YAML files that ship in `folder` (``recipes``, ``eval/suites``, ...)."""
    return sorted(path.stem for path in (shipped_root() / folder).glob("*.yaml"))


def _find(text: str, relative_to: Path, what: str, folder: str) -> Path:
    given = relative_to / os.path.expanduser(text)
    if os.path.isfile(given):
        return given
    names = shipped_names(folder)
    name = text.removeprefix(f"{folder}/").removesuffix(".yaml")
    if name in names:
        return shipped_root() / folder / f"{name}.yaml"
    if os.path.isdir(given):
        raise UsageError(f"{text!r} is a folder, not a {what} file", "name a file")
    near = difflib.get_close_matches(name.rpartition("/")[2], names, 3, 0.5) or names
    raise UsageError(
        f"there is no {what} {text!r}: no such file, and none of that name is shipped",
        f"shipped ones that come near: {', '.join(near)}",
    )


def find_path(text: str, folder: Path, key: str = "path") -> Path | None:
    """An existing file or folder: absolute, from `folder`, or from the shipped root."""
    if not text.isprintable():
        raise SourceError(
            f"{key}: '{shortened(text)}' has control characters, which messages cannot show",
            "rename the file, and name it anew",
        )
    given = Path(os.path.expanduser(text))
    for root in (folder, shipped_root()):
        if os.path.exists(root / given):
            return root / given
    return None


def find_checkpoint(text: str, folder: Path, key: str = "model.source") -> Path | None:
    """The local folder of a checkpoint or adapter, or None for a Hub repository.

    Anything that cannot be ``owner/name`` must exist: SourceError otherwise.
    """
    found = find_path(text, folder, key)
    if found is not None:
        if not os.path.isdir(found):
            raise _file_for_folder(key, found)
        return found
    if is_hub_repository(text):
        return None
    raise _absent(key, text, folder, "folder")


def _file_for_folder(key: str, found: Path) -> SourceError:
    """A file where a checkpoint's folder should be; archives are not opened."""
    what = _what(found)
    if what is None:
        return SourceError(f"{key}: {found} is a file, not a folder", "name its folder")
    hint = "unpack it yourself, look at what is in it, and name that folder"
    if "GGUF" in what:
        hint = "GGUF is quantized already: start from the checkpoint that it was made from"
    return SourceError(f"{key}: {found} is {what}, not a checkpoint's folder", hint)


def _what(found: Path) -> str | None:
    with suppress(SourceError), open_regular(found) as file:
        return what_it_is(file.read(512))
    return None


def find_data(text: str, folder: Path, key: str) -> Path | None:
    """The local file of a data set, or None for a Hub data set; like :func:`find_checkpoint`."""
    found = find_path(text, folder, key)
    if found is not None:
        if os.path.isdir(found):
            raise SourceError(f"{key}: {found} is a folder, not a file", "name a file in it")
        open_regular(found).close()  # a SourceError for pipes, devices and what one may not read
        return found
    if is_hub_repository(text) and not text.endswith(DATA_SUFFIXES):
        return None
    raise _absent(key, text, folder, "file")


def is_hub_repository(text: str) -> bool:
    """Whether `text` has the form ``owner/name``; ``./name`` and ``~/name`` do not."""
    return HUB_REPOSITORY.fullmatch(text) is not None and ".." not in text


def _absent(key: str, text: str, folder: Path, kind: str) -> SourceError:
    places = "" if os.path.isabs(text) else f" in {folder.absolute()} or {shipped_root()}"
    return SourceError(
        f"{key}: there is no {kind} {text!r}{places}, and it is no Hub repository (owner/name)",
        f"correct {key}; a relative path starts at the file that names it",
    )
