"""The layers of docs/architecture.md are those of the code: imports go down, none is left out."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
IN_TOOLS_ENVIRONMENTS = ("engine.", "workers.")
THERE = re.compile(r"(protocol|modules|engine(\..+)?|workers\..+)$")


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT / "quantize").with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


MODULES = {_module(path): path for path in (ROOT / "quantize").rglob("*.py")}


def imports(name: str) -> Iterator[str]:
    """Modules of the package that a module imports, but for its types alone."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or id(node) in for_types:
            continue
        module = node.module or ""
        if module.partition(".")[0] != "quantize":
            continue
        inside = module.partition(".")[2]
        for alias in node.names:
            longer = f"{inside}.{alias.name}" if inside else alias.name
            found = longer if longer in MODULES else inside
            if found not in ("", name):
                yield found


def listed() -> list[str]:
    """The table's modules, from below; in a row in the order in which they stand."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = text.partition("| Layer | Modules in `quantize/` |")[2].partition("\n\n")[0]
    names = re.findall(r"`([\w.*]+)`", table)
    return [name for name in names if "*" not in name]


TABLES = {"engines", "artifact_formats", "servers"}
"""Packages whose own module is a table of their modules."""


def is_in_the_table(name: str) -> bool:
    parts = ("engine.", "workers", "report.page", "report.paired")
    return bool(name) and name not in ("__main__", "engine") and not name.startswith(parts)


def test_every_module_stands_in_the_table_once() -> None:
    packages = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    needed = {name for name in MODULES if is_in_the_table(name)} - packages | TABLES
    names = listed()
    assert len(names) == len(set(names))
    assert set(names) - {"engine.support"} == needed


def test_the_tables_modules_import_from_below() -> None:
    order = {name: place for place, name in enumerate(listed())}
    upward = [
        f"{name} imports {other}"
        for name in order
        for other in imports(name)
        if other in order and order[other] > order[name]
    ]
    assert upward == []


@pytest.mark.parametrize("name", [n for n in MODULES if n.startswith(IN_TOOLS_ENVIRONMENTS)])
def test_what_runs_in_a_tools_environment_imports_little_of_the_package(name: str) -> None:
    assert [other for other in imports(name) if not THERE.match(other)] == []
