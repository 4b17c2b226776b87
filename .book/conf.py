"""The book of `make book`: README, notebooks with their saved outputs, course and cards."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from optmerge_core.study.notebook_page import with_formulas  # noqa: E402

project = "OptMerge"
extensions = ["myst_nb"]
nb_execution_mode = "off"
nb_ipywidgets_js = {}  # of a network's; saved progress bars are text
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
html_title = "OptMerge"
html_theme = "sphinx_book_theme"
html_math_renderer = "mathml"
root_doc = "README"
PAGES = ("notebooks/*", "notebooks/exercises/*", "figures/README", "data/README")
PAGES += ("data/benchmark/*/README", "data/benchmark/smol/*/README")
PAGES += ("CONTRIBUTING", "CHANGELOG")
include_patterns = ["README.md", *(f"{page}{end}" for page in PAGES for end in (".md", ".ipynb"))]
exclude_patterns = [".venv", "runs", "**/.ipynb_checkpoints"]
ROW = re.compile(r"\[(\d\d)\]\(notebooks/\w+\.ipynb\)(?=.*?`figures/\w+/(\w+)\.\w+`)")
"""In the README's table of figures: a notebook's link, and the stem of what it draws."""
SECTION = re.compile(r"(?<=\]\()(notebooks/\w+\.ipynb)#((?:[^()]|\([^()]*\))+)(?=\))")
"""A notebook's section, as JupyterLab links to it."""


def repository() -> str | None:
    """Where the launch buttons lead: BOOK_REPOSITORY, or the origin, a fork's too, on GitHub."""
    command = ["git", "remote", "get-url", "origin"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    found = re.search(r"github\.com[:/]([\w.-]+/[\w.-]+?)(?:\.git)?/?$", told)
    return os.environ.get("BOOK_REPOSITORY") or (found and f"https://github.com/{found[1]}")


html_theme_options = {"show_navbar_depth": 1}
if repository():
    buttons = ("colab", "https://colab.research.google.com"), ("binderhub", "https://mybinder.org")
    html_theme_options |= {
        "repository_url": repository(),
        "repository_branch": os.environ.get("BOOK_BRANCH", "main"),
        "launch_buttons": {f"{name}_url": address for name, address in buttons},
    }


def cells_of(number: str) -> dict[str, int]:
    """What a notebook draws: the stem of a figure or table -> the number of the last such cell."""
    (path,) = (ROOT / "notebooks").glob(f"{number}_*.ipynb")
    found = {}
    for index, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] == "code":
            text = "".join(cell["source"])
            found |= dict.fromkeys(re.findall(r'"((?:fig|table)\w+_\w+)"', text), index)
    return found


def read(app, docname: str, source: list[str]) -> None:
    """Contents and links to cells in the README; in a notebook the targets of those links."""
    if docname == "README":
        source[0] = SECTION.sub(_slug, ROW.sub(_link, source[0]))
        listed = "\n".join(PAGES)
        source[0] += f"\n```{{toctree}}\n:hidden:\n:glob:\n{listed}\n```\n"
    elif found := re.fullmatch(r"notebooks/(\d\d)_\w+", docname):
        notebook = json.loads(source[0])
        for stem, index in sorted(cells_of(found[1]).items(), key=lambda x: x[1], reverse=True):
            cell = {"cell_type": "markdown", "metadata": {}, "source": f"({found[1]}-{stem})="}
            notebook["cells"].insert(index, cell | {"id": f"to-{stem}"})
        source[0] = json.dumps(notebook)


def _link(row: re.Match[str]) -> str:
    number, stem = row[1], row[2]
    return f"[{number}](#{number}-{stem})" if stem in cells_of(number) else row[0]


def _slug(section: re.Match[str]) -> str:
    """The same in the book, whose anchors are GitHub's."""
    slug = re.sub(r"[^-\w]", "", section[2]).lower()
    return f"{section[1]}#{slug}"


def setup(app) -> None:
    def visit(sign: str):
        def show(self, node) -> None:
            from docutils.nodes import SkipNode

            self.body.append(with_formulas(f"{sign}{node.astext().strip()}{sign}"))
            raise SkipNode

        return show, None

    app.add_html_math_renderer("mathml", visit("$"), visit("$$"))
    app.connect("source-read", read)
