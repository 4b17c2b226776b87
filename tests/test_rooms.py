"""The rooms of the package: who may know whom, and how large anything may be."""

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "optmerge_core"
FLOORS = (
    {"errors"},
    {"runtime", "figures", "places"},
    {"checkpoints", "methods"},
    {"task_vectors"},
    {"merging"},
    {"evaluation"},
    {"omni"},
    {"study"},
    {"benchmark"},
    {"__main__", "__init__"},
)
"""From the ground up: a file may import from its own room and from the floors below."""
METHODS_MAY_IMPORT = {"torch", "numpy", "jaxtyping", "triton", *sys.stdlib_module_names}
MAX_CORE = 7600
MAX_FILE, MAX_FUNCTION = 350, 60

FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    """The name a file is imported by: optmerge_core/omni/__init__.py -> optmerge_core.omni."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_name(path): path for path in FILES}


def room(module: str) -> str:
    """The part of the name that follows the package's: optmerge_core.omni.model -> omni."""
    return [*module.split("."), "__init__"][1]


def imported(path: Path) -> Iterator[str]:
    """The modules that a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: imports are written in full"
            for alias in node.names:
                member = f"{node.module}.{alias.name}"
                yield member if member in MODULES else node.module


def inside() -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports."""
    return {name: {i for i in imported(MODULES[name]) if i in MODULES} for name in MODULES}


def test_every_file_lives_in_a_room():
    assert {room(name) for name in MODULES} == set(FLOOR)


def test_no_two_files_import_each_other():
    try:
        TopologicalSorter(inside()).prepare()
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None


def test_no_room_knows_a_higher_one():
    upwards = {
        f"{name} -> {other}"
        for name, others in inside().items()
        for other in others
        if room(name) != room(other) and FLOOR[room(other)] >= FLOOR[room(name)]
    }
    assert upwards == set()


def test_methods_know_tensors_only():
    for path in (PACKAGE / "methods").glob("*.py"):
        for name in imported(path):
            own = name.startswith("optmerge_core.methods")
            assert own or name.split(".")[0] in METHODS_MAY_IMPORT, f"{path.name} imports {name}"


def test_files_are_short():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in FILES}
    assert {name: length for name, length in lengths.items() if length > MAX_FILE} == {}


def test_the_core_is_thin():
    """What one reads to know how a merge is done, counted without blank lines."""
    core = ("methods", "task_vectors", "checkpoints", "merging")
    paths = [path for path in FILES if path.relative_to(PACKAGE).parts[0] in core]
    lines = [line for path in paths for line in path.read_text().splitlines() if line.strip()]
    assert len(lines) <= MAX_CORE


def test_functions_are_short():
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    long = [
        f"{path.relative_to(PACKAGE)}: {node.name}"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, kinds) and node.end_lineno - node.lineno + 1 > MAX_FUNCTION
    ]
    assert long == []


def test_tests_are_arranged_as_the_rooms():
    folders = {path.name for path in (ROOT / "tests").iterdir() if any(path.glob("test_*.py"))}
    assert folders <= set(FLOOR)
