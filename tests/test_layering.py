"""The way through the house, held by reading every import: who may know whom, and nobody in a circle.

Adding a module means adding it to MAY_IMPORT: a line to think about. A module is free to import its own room, and
every room may import `errors` and `records`. Imports inside functions count; those under `TYPE_CHECKING` do not.
"""

from __future__ import annotations

import ast
import graphlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"autoplan": "autoplan", "autoplan.kernels": "kernels", "autoplan.cache": "cache"}

OPEN_TO_ALL = {"errors", "records"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "records": set(),
    # these know nothing else of ours
    "kernels": set(),
    "cache": set(),
    "solve": set(),
    "timing": set(),
    "coldness": set(),
    "contention": set(),
    "graphs": set(),
    "offload": set(),
    "recorder": {"layers", "offload"},
    "report": set(),
    # what a layer can become
    "candidates": {"kernels"},
    "layers": {"candidates", "kernels", "offload"},
    "siblings": {"layers"},
    # what was decided, and carrying it out
    "selection": {"solve"},
    "plan": {"cache", "report", "selection"},
    "apply": {"cache", "candidates", "kernels", "layers", "offload", "plan", "recorder", "region", "selection"}
    | {"siblings"},
    # who else plans
    "distributed": {"apply", "cache", "layers", "recorder"},
    # what each choice gains and costs, and the whole of them
    "arms": {"candidates", "kernels", "layers", "siblings"},
    "benchmark": {"arms", "cache", "candidates", "coldness", "contention", "kernels", "timing"},
    "options": {"arms", "benchmark", "candidates", "kernels", "selection"},
    "fusion": {"arms", "benchmark", "candidates", "kernels", "options", "selection"},
    "request": {"benchmark", "cache", "candidates", "divergence", "fisher", "kernels", "offload"}
    | {"recorder", "selection"},
    "divergence": {"recorder"},
    "region": set(),
    "inside": {"divergence", "recorder", "region", "selection", "timing"},
    "fisher": {"divergence", "offload"},
    "sensitivity": {"apply", "cache", "divergence", "fisher", "offload", "options", "recorder"},
    "priorities": {"arms", "benchmark"},
    "posterior": set(),
    "rescale": {"posterior", "selection"},
    "validate": {"apply", "divergence", "graphs", "inside", "recorder", "region", "rescale", "selection", "timing"},
}
# the wiring and the edges: planner knows every room above, the public names and the command know planner too
MAY_IMPORT["planner"] = set(MAY_IMPORT)
MAY_IMPORT["revalidate"] = {room for room in MAY_IMPORT if room not in ("distributed", "planner", "sensitivity")}
MAY_IMPORT["__init__"] = {"apply", "cache", "candidates", "plan", "planner", "recorder", "revalidate", "selection"}
MAY_IMPORT["demo"] = set(MAY_IMPORT)
MAY_IMPORT["cli_cache"] = {"cache"}
MAY_IMPORT["cli_plan"] = {"apply", "plan", "planner", "recorder", "selection"}
MAY_IMPORT["cli"] = set(MAY_IMPORT)

# rooms that must stay free of all libraries but these
LIBRARIES: dict[str, set[str]] = {
    "errors": set(),
    "records": set(),
    "solve": {"numpy"},
    "rescale": {"numpy"},
    "posterior": {"numpy"},
}


class Import(NamedTuple):
    """One imported name, `package.module.name` for `from package.module import name`."""

    name: str
    line: int
    at_module_level: bool


class Imports(ast.NodeVisitor):
    """Collects what a module imports when it runs."""

    def __init__(self, package: str) -> None:
        self.package = package.split(".")
        self.depth = 0
        self.found: list[Import] = []

    def visit_Import(self, node: ast.Import) -> None:
        self.found += [Import(alias.name, node.lineno, not self.depth) for alias in node.names]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        anchor = self.package[: len(self.package) - node.level + 1] if node.level else []
        base = ".".join([*anchor, *([node.module] if node.module else [])])
        self.found += [Import(f"{base}.{alias.name}", node.lineno, not self.depth) for alias in node.names]

    def visit_If(self, node: ast.If) -> None:
        skipped = "TYPE_CHECKING" in (getattr(node.test, "id", ""), getattr(node.test, "attr", ""))
        for child in node.orelse if skipped else [*node.body, *node.orelse]:
            self.visit(child)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self.depth += 1
        self.generic_visit(node)
        self.depth -= 1

    visit_AsyncFunctionDef = visit_FunctionDef


def imports_of(source: str, package: str = "") -> list[Import]:
    collector = Imports(package)
    collector.visit(ast.parse(source))
    return collector.found


def python_files(folder: Path) -> Iterator[Path]:
    """The folder's own files: not those behind the links autoplan/kernels and autoplan/cache."""
    for path in sorted(folder.rglob("*.py")):
        if not (folder / path.relative_to(folder).parts[0]).is_symlink():
            yield path


def read_tree() -> tuple[dict[str, Path], dict[str, list[Import]]]:
    """Every module of ours by its dotted name: its file and its imports."""
    files: dict[str, Path] = {}
    imports: dict[str, list[Import]] = {}
    for package, folder in FOLDERS.items():
        for path in python_files(ROOT / folder):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            is_package = parts[-1] == "__init__"
            name = ".".join([package, *(parts[:-1] if is_package else parts)])
            home = name if is_package else name.rpartition(".")[0]
            files[name] = path
            imports[name] = imports_of(path.read_text(encoding="utf-8"), home)
    return files, imports


FILES, IMPORTS = read_tree()


def module_of(name: str, modules: set[str]) -> str | None:
    """The module of ours that an imported name lives in; None for a library."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or None


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def violations(imports: dict[str, list[Import]]) -> list[str]:
    """Imports that the tables above do not allow."""
    found = []
    for importer, imported in imports.items():
        room = room_of(importer)
        for name, line, _ in imported:
            library = name.partition(".")[0]
            target = module_of(name, set(imports) | {"autoplan"})
            if target is None:
                if library not in sys.stdlib_module_names and library not in LIBRARIES.get(room, {library}):
                    found.append(f"{importer}:{line}: {room} may not import {library}")
            elif room_of(target) not in MAY_IMPORT.get(room, set()) | OPEN_TO_ALL | {room} or (
                room in OPEN_TO_ALL and room_of(target) != room
            ):
                found.append(f"{importer}:{line}: {room} may not import {room_of(target)} ({name})")
    return found


def cycle(imports: dict[str, list[Import]]) -> list[str] | None:
    """A circle of modules that import each other as they load, if there is one."""
    graph = {
        importer: {module_of(entry.name, set(imports)) for entry in imported if entry.at_module_level}
        - {None, importer}
        for importer, imported in imports.items()
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return None


def test_every_module_has_a_line_in_the_table() -> None:
    assert {room_of(module) for module in FILES} - set(MAY_IMPORT) == set()


def test_imports_go_one_way() -> None:
    assert not (found := violations(IMPORTS)), "\n".join(found)


def test_no_import_cycles() -> None:
    assert cycle(IMPORTS) is None
    graphlib.TopologicalSorter(MAY_IMPORT).prepare()  # nor does the table allow one between rooms


def test_nobody_imports_bare_kernels_or_cache() -> None:
    """They are autoplan.kernels and autoplan.cache; with the bare name a second copy would load, or someone else's."""
    for folder in (*FOLDERS.values(), "tests", "examples", "benchmarks"):
        for path in python_files(ROOT / folder):
            bare = [
                entry
                for entry in imports_of(path.read_text(encoding="utf-8"))
                if entry.name.partition(".")[0] in ("kernels", "cache")
            ]
            assert not bare, f"{path.relative_to(ROOT)}: {bare}"


def imported_libraries() -> set[str]:
    names = {entry.name.partition(".")[0] for imported in IMPORTS.values() for entry in imported}
    return names - set(sys.stdlib_module_names) - {"autoplan"}


def test_no_module_bears_the_name_of_a_library() -> None:
    ours = {part for module in FILES for part in module.split(".")[1:]}
    assert ours & (imported_libraries() | set(sys.stdlib_module_names)) == set()


def test_every_library_is_declared(pyproject: dict[str, Any]) -> None:
    project = pyproject["project"]
    extras = project["optional-dependencies"]
    declared = [*project["dependencies"], *extras["demo"], *extras["urls"], *extras["weights"]]
    names = {re.split(r"[^\w.-]", requirement)[0].lower().replace("-", "_") for requirement in declared}
    names.add("accelerate")  # imported only where a model has come with its hooks
    assert imported_libraries() - names == set()


# The checker itself: a test that cannot fail holds nothing.


@pytest.mark.parametrize(
    ("importer", "source", "broken"),
    [
        ("autoplan.kernels.ops", "from autoplan.errors import KernelError", False),
        ("autoplan.kernels.ops", "from autoplan.kernels import packing", False),
        ("autoplan.kernels.ops", "from . import packing", False),
        ("autoplan.kernels.ops", "from .. import planner", True),
        ("autoplan.kernels.ops", "from autoplan import planner", True),
        ("autoplan.kernels.ops", "from autoplan import autoplan", True),
        ("autoplan.kernels.ops", "import autoplan.candidates", True),
        ("autoplan.kernels.ops", "def f():\n    from autoplan import cache", True),
        ("autoplan.kernels.ops", "if TYPE_CHECKING:\n    from autoplan import planner", False),
        ("autoplan.kernels.ops", "if TYPE_CHECKING:\n    pass\nelse:\n    from autoplan import planner", True),
        ("autoplan.records", "import autoplan.errors", True),
        ("autoplan.records", "import torch", True),
        ("autoplan.solve", "import numpy.typing, math", False),
        ("autoplan.solve", "def f():\n    import torch", True),
        ("autoplan.newcomer", "from autoplan import solve", True),
        ("autoplan", "from autoplan.planner import make_plan", False),
        ("autoplan.planner", "from autoplan import cli", True),
        ("autoplan.cli", "from autoplan import planner, make_plan", False),
    ],
)
def test_the_checker_tells_right_from_wrong(importer: str, source: str, broken: bool) -> None:
    package = importer if importer == "autoplan" else importer.rpartition(".")[0]
    names = ["autoplan", "autoplan.kernels", "autoplan.kernels.packing"]
    tree: dict[str, list[Import]] = {name: [] for name in names + [f"autoplan.{room}" for room in MAY_IMPORT]}
    tree[importer] = imports_of(source, package)
    assert bool(violations(tree)) is broken


def test_the_checker_sees_a_cycle() -> None:
    ring = {"a": [Import("b", 1, True)], "b": [Import("c", 1, True)], "c": [Import("a", 1, True)]}
    assert cycle(ring) is not None
    ring["c"] = [Import("a", 1, False)]  # inside a function: no circle while loading
    assert cycle(ring) is None
