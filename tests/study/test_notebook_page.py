"""An executed notebook as a page: formulas as MathML, code untouched, nothing fetched."""

import os
import re

import nbformat
import pytest

from optmerge_core.study.notebook_page import notebook_page, with_formulas


def test_formulas_become_mathml_and_code_stays():
    text = with_formulas("the norm $\\|\\tau_i\\|_F$ of `$x$`, 5 $ and 6 $\n\n```\n$y$\n```\n")
    assert text.count("<math") == 1 and "&#x02016;" in text and "$\\|" not in text
    assert "`$x$`" in text and "```\n$y$\n```" in text and "5 $ and 6 $" in text
    block = with_formulas("$$\n\\min_{\\tau_m} \\big\\| \\tau_m \\big\\|_F^2 .\n$$")
    assert 'display="block"' in block and "\n" not in block and "\\" not in block


def test_a_formula_that_cannot_be_converted_is_shown_as_written(monkeypatch):
    def fails(*_, **__):
        raise ValueError

    monkeypatch.setattr("latex2mathml.converter.convert", fails)
    assert with_formulas("a $x < y$") == "a <code>x &lt; y</code>"


@pytest.fixture
def copy(tmp_path):
    cells = [
        nbformat.v4.new_markdown_cell("# Title\n\nThe sum $\\sum_i \\tau_i$."),
        nbformat.v4.new_code_cell("print(1)", execution_count=1),
    ]
    cells[1].outputs = [nbformat.v4.new_output("stream", text="saved output\n")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": {"state": {}}}
    path = tmp_path / "00_first.ipynb"
    nbformat.write(notebook, path)
    return path


def test_a_page_keeps_outputs_and_fetches_nothing(copy):
    text = notebook_page(copy).read_text()
    assert "saved output" in text and "<math" in text and "<title>00_first</title>" in text
    address = r"""(?:src|href)=["'](?:https?:)?//[^"']+|@import|from ["']https?://[^"']+"""
    fetched = re.findall(address, text)
    assert fetched == [] and "cdnjs" not in text
    assert [path.name for path in copy.parent.glob("*.partial")] == []


def test_a_page_is_written_again_only_when_the_notebook_is_newer(copy):
    page = notebook_page(copy)
    page.write_text("kept")
    assert notebook_page(copy).read_text() == "kept"
    later = page.stat().st_mtime + 1
    os.utime(copy, (later, later))
    assert "saved output" in notebook_page(copy).read_text()
