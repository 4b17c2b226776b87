"""index.html of a run: a report that a browser shows without a server and without a network.

The page is made from the files that are there, so it can be written at any time of a run. Its text
is jinja2's, in `index_page.html.jinja`, everything escaped. Tables too: pandas' `to_html` cuts long
cells and has no class for a column of words. The only script sorts a table by a column.
"""

from __future__ import annotations

import csv
import itertools
import os
import platform
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from optmerge_core.study.agreement import git
from optmerge_core.study.notebook_page import notebook_page, read_notebook
from optmerge_core.study.report_text import SENTENCES, findings

PACKAGES = ("optmerge-core", "torch", "transformers", "safetensors", "peft", "numpy", "pandas")
ROWS = 200
"""Rows of a table that has no .md, which are shown at most; the .csv has all."""
NUMBER = re.compile(r"[-+−]?[\d.,]*(?:e[-+]?\d+)? ?%?|–|nan", re.IGNORECASE)
TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    trim_blocks=True,
    undefined=StrictUndefined,
)


def write_index(
    page: Path,
    title: str,
    notebooks: Sequence[Path],
    copies: Path,
    figures: Path,
    recipes: list[Path],
) -> Path:
    """Write the page of one study: finding, notebooks, figures, tables, recipes' texts, versions.

    notebooks: in their order; copies: the folder of the executed ones; figures: the folder of
    figures and tables. What it has of an earlier run, of notebooks that are still to finish, is
    counted and not shown. Links are relative to the page. Returns its path.
    """
    there = sorted(figures.glob("*"))
    earlier = _named(notebooks) - _named([copies / path.name for path in notebooks])
    found = [path for path in there if path.stem not in earlier]
    pictures = [path for path in found if path.suffix == ".png"]
    drawn = {path.stem for path in pictures}
    tables = dict.fromkeys(path.stem for path in found if path.suffix in (".md", ".csv"))
    return _write(
        page,
        title,
        written=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        revision=_revision(),
        findings=findings(figures, earlier),
        earlier=len({path.stem for path in there} & earlier),
        notebooks=[_notebook(path.name, copies) for path in notebooks],
        pictures=[
            _item(figures, path.stem, (".svg", ".csv")) | {"picture": path} for path in pictures
        ],
        tables=[
            _item(figures, stem, (".csv", ".md")) | _table(figures, stem)
            for stem in tables
            if stem not in drawn
        ],
        others=[path for path in found if path.suffix not in (".png", ".svg", ".csv", ".md")],
        recipes=recipes,
        versions=_versions(),
    )


def write_contents(page: Path, title: str, pages: Mapping[str, Path]) -> Path:
    """Write a page of links to the pages of several studies, name -> page."""
    return _write(page, title, pages=pages)


def _write(page: Path, title: str, **values: Any) -> Path:
    """The page is replaced at once: whoever looks during a run sees a whole one."""

    def href(path: Path) -> str:
        return quote(Path(os.path.relpath(path, page.parent)).as_posix())

    text = TEMPLATES.get_template("index_page.html.jinja").render(title=title, href=href, **values)
    page.parent.mkdir(parents=True, exist_ok=True)
    partial = page.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    return partial.replace(page)


def _named(notebooks: Sequence[Path]) -> set[str]:
    """The figures and tables that the cells of those notebooks name that are there."""
    cells = [cell for path in notebooks if path.is_file() for cell in read_notebook(path).cells]
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    return set(re.findall(r'"((?:fig|table)\w+_\w+)"', code))


def _notebook(name: str, copies: Path) -> dict[str, Any]:
    """Its executed copy with the seconds, or the copy that failed, or neither: it is to come."""
    done, failed = copies / name, (copies / name).with_suffix(".failed.ipynb")
    if not done.is_file():
        found = notebook_page(failed) if failed.is_file() else None
        return {"name": name, "done": None, "failed": found, "seconds": 0}
    seconds = read_notebook(done).metadata.get("papermill", {}).get("duration")
    shown = {"done": notebook_page(done), "file": done}
    return shown | {"name": name, "seconds": seconds or 0}


def _item(folder: Path, stem: str, suffixes: Sequence[str]) -> dict[str, Any]:
    """What a figure and a table have: an anchor, a caption, a sentence, the files beside them."""
    paths = [path for suffix in suffixes if (path := folder / f"{stem}{suffix}").is_file()]
    said = SENTENCES.get(stem)
    return {"stem": stem, "caption": _caption(stem), "sentence": said, "files": paths}


def _table(folder: Path, stem: str) -> dict[str, Any]:
    """The .md, which is rounded for reading, else the .csv's first rows; all cells as text.

    `words`: the columns that are not numbers alone, which stand to the left.
    """
    path, total = folder / f"{stem}.md", 0
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines()
        # A bar within a cell is written \\|; the cells' own spaces are the table's.
        rows = [
            re.split(r"(?<!\\)\|", line.strip())[1:-1] for line in lines if line.startswith("|")
        ]
        rows = [[cell.strip().replace(r"\|", "|") for cell in row] for row in rows]
        header, rows = rows[0] if rows else [], rows[2:]
    else:
        with open(folder / f"{stem}.csv", newline="", encoding="utf-8") as file:
            header, *rows = [*csv.reader(file)] or [[]]
        if len(rows) > ROWS:
            total, rows = len(rows), rows[:ROWS]
    columns = enumerate(itertools.zip_longest(*rows, fillvalue=""))
    words = [i for i, column in columns if not all(map(NUMBER.fullmatch, column))]
    return {"header": header, "rows": rows, "words": words, "total": total}


def _caption(stem: str) -> str:
    """fig02a_layer_norms -> "Figure 2a: layer norms"; figxx_ and others have no number."""
    match = re.fullmatch(r"(fig|table)0*(\w*?)_(.+)", stem)
    if not match:
        return stem.replace("_", " ")
    kind, number, what = match.groups()
    kind = {"fig": "Figure", "table": "Table"}[kind]
    return f"{kind}{'' if number == 'xx' else f' {number}'}: {what.replace('_', ' ')}"


def _revision() -> str | None:
    """The commit that this package's code is at, and whether files differ from it."""
    root = Path(__file__).parents[2]
    commit = git(root, "rev-parse", "--short=12", "HEAD") if (root / ".git").exists() else None
    if commit is None:
        return None
    changed = git(root, "status", "--porcelain", "--untracked-files=no", "--", "optmerge_core")
    return f"{commit.strip()}{', with changes' if changed else ''}"


def _versions() -> list[str]:
    found = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return found
