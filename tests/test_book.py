"""The book: what the README's table names leads to cells, and it builds, whole and offline."""

import importlib.util
import os
import re
import subprocess
from pathlib import Path

import pytest
from test_skeleton import read_pins

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def conf():
    spec = importlib.util.spec_from_file_location("book_conf", ROOT / ".book" / "conf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_figures_leads_to_cells(conf):
    source = [(ROOT / "README.md").read_text()]
    rows = len(conf.ROW.findall(source[0]))
    conf.read(None, "README", source)
    links = re.findall(r"\(#(\d\d)-(\w+)\)", source[0])
    assert rows == len(re.findall(r"^\| .*`figures/", source[0], re.MULTILINE)) > 25
    assert len(links) == rows
    assert all(stem in conf.cells_of(number) for number, stem in links)


def test_a_link_to_a_section_becomes_the_books(conf):
    source = ["[3](notebooks/05_evaluation.ipynb#3-·-Results-(Table-2)), [x](#glossary)"]
    conf.read(None, "README", source)
    assert source[0].startswith("[3](notebooks/05_evaluation.ipynb#3--results-table-2), [x](#gl")


def test_a_notebook_gets_its_targets_before_their_cells(conf):
    source = [(ROOT / "notebooks" / "00_benchmark.ipynb").read_text()]
    conf.read(None, "notebooks/00_benchmark", source)
    cells = conf.json.loads(source[0])["cells"]
    (place,) = [n for n, c in enumerate(cells) if c["source"] == "(00-fig01_overview)="]
    assert '"fig01_overview"' in "".join(cells[place + 1]["source"])


def test_the_books_own_pins_agree_with_the_repositorys():
    lines = (ROOT / ".book" / "requirements.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    ours = {pin.name: str(pin.specifier).removeprefix("==") for pin in read_pins()}
    shared = pins.keys() & ours.keys()
    assert shared and {name: pins[name] for name in shared} == {name: ours[name] for name in shared}


@pytest.mark.slow
def test_it_builds_without_a_warning_and_fetches_nothing(tmp_path):
    python = ROOT / ".venv" / "book" / "bin" / "python"
    assert python.exists(), "run make book, or make test-slow: they install Sphinx"
    command = [python, "-m", "sphinx", "-q", "--fail-on-warning", "-b", "html", "-c", ".book"]
    environment = os.environ | {"BOOK_REPOSITORY": "https://github.com/OWNER/NAME"}
    done = subprocess.run(
        [*command, "-d", tmp_path / "cache", ".", tmp_path / "book"],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pages = {path.stem: path.read_text() for path in (tmp_path / "book").rglob("*.html")}
    assert {path.stem for path in (ROOT / "notebooks").rglob("*.ipynb")} <= set(pages)
    text = pages["03_merging"]
    assert "<math" in text and "mybinder.org/v2/gh/OWNER/NAME/main" in text
    for page in pages.values():
        assert not re.search(r"""<(?:script|link|img)[^>]*(?:src|href)=["']https?://""", page)
