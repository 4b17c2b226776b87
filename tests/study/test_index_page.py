"""The page of a run: everything that is there, escaped, with links that lead to files."""

import re
from html.parser import HTMLParser
from urllib.parse import unquote

import nbformat
import pytest

from optmerge_core.study.index_page import write_contents, write_index
from optmerge_core.study.report_text import SENTENCES


class Page(HTMLParser):
    """The texts of a page by tag, and what it refers to; unbalanced tags are an error."""

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.links = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        assert tag != "iframe" and (tag != "script" or not attributes)
        self.links += [value for key, value in attributes if key in ("href", "src")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data.strip()))

    def all(self, tag):
        return [text for inside, text in self.texts if inside == tag]


@pytest.fixture
def study(tmp_path):
    """Figures, tables and executed notebooks of a run, some with names and contents that hurt."""
    figures, copies = tmp_path / "figures", tmp_path / "note books"
    figures.mkdir()
    copies.mkdir()
    for name in ("fig02a_layer_norms", "figxx_a&b"):
        for suffix in (".png", ".svg", ".csv"):
            (figures / f"{name}{suffix}").write_bytes(b"x")
    (figures / "table02_main.md").write_text("| method | <b> |\n| --- | --- |\n| a\\|b | 1.5 |\n")
    (figures / "table02_main.csv").write_text("method,<b>\na|b,1.4999\n")
    (figures / "tablexx_plain.csv").write_text('name,value\n"x, <y>",2\n')
    (figures / "predictions.parquet").write_bytes(b"x")
    notebook = nbformat.v4.new_notebook(metadata={"papermill": {"duration": 3.25}})
    nbformat.write(notebook, copies / "00_first.ipynb")
    nbformat.write(notebook, copies / "01_second.failed.ipynb")
    recipe = tmp_path / "study.yaml"
    recipe.write_text("name: <study>\n")
    return tmp_path, figures, copies, recipe


def write(study):
    root, figures, copies, recipe = study
    names = ["00_first.ipynb", "01_second.ipynb", "02_third.ipynb"]
    notebooks = [root / name for name in names]
    page = write_index(root / "index.html", "A & B <i>", notebooks, copies, figures, [recipe])
    return Page(page.read_text(encoding="utf-8"))


def test_a_page_shows_what_is_there(study):
    page = write(study)
    assert page.all("h1") == page.all("title") == ["A & B <i>"]
    assert page.all("h2") == [
        "Notebooks", "Figures", "Tables", "Other files", "Recipe", "Versions"
    ]  # fmt: skip
    assert page.all("h3") == ["Table 2: main", "Table: plain"]
    captions = [text for text in page.all("figcaption") if text.startswith("Figure")]
    assert captions == ["Figure 2a: layer norms (", "Figure: a&b ("]
    assert page.all("pre") == ["name: <study>"]
    assert page.all("th") == ["notebook", "state", "seconds", "method", "<b>", "name", "value"]
    cells = page.all("td")
    assert cells == ["done", "3.2", "01_second.ipynb", "02_third.ipynb", "not run yet", "together",
                     "3.2", "a|b", "1.5", "x, <y>", "2"]  # fmt: skip
    assert {"00_first.ipynb", "failed", "predictions.parquet"} <= set(page.all("a"))
    assert "torch" in page.all("p")[-1]
    assert re.match(r"20\d\d-\d\d-\d\d \d\d:\d\d UTC", page.all("p")[0])
    assert page.all("script")[0].count("onclick") == 1


def test_every_link_is_relative_and_leads_to_a_file(study):
    page = write(study)
    links = [link for link in page.links if link != "#recipe-1"]
    assert len(links) == len(page.links) - 1 == 1 + 2 + 2 + 2 * 2 + 3 + 1 + 1
    assert "note%20books/00_first.html" in links and "note%20books/00_first.ipynb" in links
    for link in links:
        assert not re.match(r"/|\w+:", link) and (study[0] / unquote(link)).is_file(), link
    assert not (study[0] / "index.partial").exists()


def test_the_finding_stands_first_and_figures_say_what_they_show(study):
    (study[1] / "table03_lora.csv").write_text("method,Avg\nTSV Merging,51\n")
    (study[1] / "fig04_optmerge.png").write_bytes(b"x")
    page = write(study)
    assert page.all("h2")[0] == "What came out"
    assert page.all("li")[0] == "Best merge: TSV Merging, 51.0 % of the test questions."
    assert SENTENCES["fig04_optmerge"] in page.all("p")


def test_what_an_earlier_run_has_left_is_not_taken_for_this_ones(study):
    root, figures, copies, _ = study
    (figures / "table03_lora.csv").write_text("method,Avg\nTSV Merging,51\n")
    (figures / "tablexx_claims.csv").write_text("claim,verdict\na,holds\n")
    code = 'save_figure(figure, data, output_dir, "fig02a_layer_norms")', 'name = "table03_lora"'
    for name, source in zip(("00_first", "01_second"), code, strict=True):
        cells = [nbformat.v4.new_code_cell(source), nbformat.v4.new_markdown_cell('"figxx_a"')]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), root / f"{name}.ipynb")
    nbformat.write(nbformat.read(root / "00_first.ipynb", 4), copies / "00_first.ipynb")
    page = write(study)
    assert page.all("li") == ["Holds (1 of the paper's 1 claims): a."]
    assert page.all("h3") == ["Table 2: main", "Table: claims", "Table: plain"]
    assert any(text.startswith("Figure 2a") for text in page.all("figcaption"))
    left = [text for text in page.all("p") if text.startswith("Left out")]
    assert left and left[0].endswith("(figures and tables: 1).")
    (copies / "01_second.ipynb").write_bytes((root / "01_second.ipynb").read_bytes())
    page = write(study)
    assert page.all("li")[0].startswith("Best merge: TSV Merging")
    assert "earlier run" not in " ".join(page.all("p"))


def test_a_long_table_is_cut_and_says_so(study):
    rows = "\n".join(f"{i},{i}" for i in range(1000))
    (study[1] / "tablexx_plain.csv").write_text(f"name,value\n{rows}\n")
    page = write(study)
    assert "1000 rows, of which the first 200 are shown" in page.all("p")
    assert page.all("td")[-1] == "199"


def test_files_that_are_empty_or_absent(tmp_path):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "empty.csv").write_text("")
    (tmp_path / "figures" / "empty.md").write_text("")
    page = write_index(tmp_path / "index.html", "x", [], tmp_path, tmp_path / "figures", [])
    assert Page(page.read_text()).all("h2") == ["Tables", "Versions"]
    notebooks, none = [tmp_path / "a.ipynb"], tmp_path / "none"
    page = write_index(tmp_path / "index.html", "x", notebooks, tmp_path, none, [])
    assert Page(page.read_text()).all("h2") == ["Notebooks", "Versions"]


def test_contents_lead_to_the_pages(tmp_path):
    pages = {"one": tmp_path / "one" / "index.html", "<two>": tmp_path / "two" / "index.html"}
    page = Page(write_contents(tmp_path / "index.html", "Studies", pages).read_text())
    assert page.links == ["one/index.html", "two/index.html"] and page.all("a") == ["one", "<two>"]
