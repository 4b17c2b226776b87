"""The examples of CONTRIBUTING.md, run as they are written there."""

import importlib
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType

import matplotlib
import pandas as pd
import pytest
from test_rooms import MAX_CORE, MAX_FILE, MAX_FUNCTION

from optmerge_core.methods import FILES
from optmerge_core.methods.registry import METHODS

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402

from optmerge_core import figures  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()


def examples(heading: str) -> list[tuple[str, str]]:
    """The blocks of code under a heading: where each belongs, as its first line says, and all."""
    (section,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.M)
    fence = r"^```(?:python|diff)\n(# (\S+?)(?:, \w+)?\n.*?)^```$"
    blocks = re.findall(fence, section, flags=re.DOTALL | re.MULTILINE)
    return [(place, re.sub(r"^\+", "", code, flags=re.MULTILINE)) for code, place in blocks]


def new_module(place: str, code: str, monkeypatch) -> ModuleType:
    """A file that an example adds, imported by the name it would have."""
    module = ModuleType(place.removesuffix(".py").replace("/", "."))
    module.__file__ = place
    exec(compile(code, place, "exec"), vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def run_tests(module: ModuleType, request) -> int:
    """Call the test functions of a module with the fixtures they name; returns how many."""
    tests = [function for name, function in vars(module).items() if name.startswith("test_")]
    for test in tests:
        test(**{name: request.getfixturevalue(name) for name in inspect.signature(test).parameters})
    return len(tests)


def test_a_method(monkeypatch, request):
    (file, code), *entries, (test, test_code) = examples("A method")
    module = new_module(file, code, monkeypatch)
    before = [FILES, figures.LABELS, figures.COLORS]
    added = [eval("{" + lines.partition("\n")[2] + "}") for _, lines in entries]
    assert [place.rpartition("/")[2] for place, _ in entries] == [
        "__init__.py",
        *2 * ["figures.py"],
    ]
    for table, entry in zip(before, added, strict=True):
        assert entry.keys() == {"magmax"} and not entry.keys() & table.keys()
    for table, entry in zip(before[1:], added[1:], strict=True):
        assert not set(entry.values()) & set(table.values()), "taken by another method"
    assert module.__name__ == f"optmerge_core.methods.{added[0]['magmax']}"
    monkeypatch.setitem(FILES, *added[0].popitem())
    monkeypatch.setitem(METHODS, "magmax", module.magmax)
    assert run_tests(new_module(test, test_code, monkeypatch), request) == 3


def test_a_family(monkeypatch, request):
    (file, rule), (test, code) = examples("A family")
    families = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    before = dict(families.FAMILIES)
    monkeypatch.setattr(families, "FAMILIES", dict(before))
    exec(rule, vars(families))
    assert families.FAMILIES.items() > before.items()
    assert run_tests(new_module(test, code, monkeypatch), request) == 1


def test_a_figure(monkeypatch, tmp_path):
    ((notebook, cell),) = examples("A figure")
    assert (ROOT / notebook).is_file() and len(cell.splitlines()) <= 25
    monkeypatch.chdir(tmp_path)
    with plt.rc_context():
        drawn = {}
        exec(cell, drawn)
    plt.close(drawn["figure"])
    folder = tmp_path / drawn["output_dir"]
    assert {path.suffix for path in folder.glob("figxx_norms.*")} == {".png", ".svg", ".csv"}
    saved = pd.read_csv(folder / "figxx_norms.csv")
    pd.testing.assert_frame_equal(saved, drawn["data"])
    assert saved["norm"].tolist() == pytest.approx(drawn["norms"], rel=1e-3)


def test_the_limits_are_those_that_hold():
    said = " ".join(TEXT.split())
    assert f"a file has at most {MAX_FILE} lines and a function {MAX_FUNCTION}" in said
    assert f"`merging/`) at most {MAX_CORE}." in said
