"""index.html of a run: what a browser shows without a server, without JavaScript.

The page is made from the files that are there, so it can be written at any time of a run.
"""

from __future__ import annotations

import csv
import itertools
import os
import platform
import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from urllib.parse import quote

import nbformat

PACKAGES = ("optmerge-core", "torch", "transformers", "safetensors", "peft", "numpy", "pandas")
ROWS = 200
"""Rows of a table that has no .md, which are shown at most; the .csv has all."""
NUMBER = re.compile(r"[-+−]?[\d.,]*(?:e[-+]?\d+)? ?%?|–|nan", re.IGNORECASE)

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff; }
h1, h2, h3 { line-height: 1.2; margin: 2rem 0 0.5rem; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.2rem 0.6rem; border-bottom: 1px solid #ccc; text-align: right; }
th { border-bottom: 2px solid #666; vertical-align: bottom; }
.words { text-align: left; }
.wide { overflow-x: auto; }
figure { margin: 1.5rem 0; }
figure img { max-width: min(100%, 50rem); height: auto; }
figcaption, .files { font-size: 0.85rem; color: #555; }
pre { background: #f5f5f5; padding: 1rem; overflow-x: auto; font-size: 0.85rem; }
"""


def write_index(
    page: Path,
    title: str,
    notebooks: Sequence[str],
    copies: Path,
    figures: Path,
    recipes: list[Path],
) -> Path:
    """Write the page of one study: notebooks, figures, tables, recipes' texts, versions.

    notebooks: the file names in their order; copies: the folder of the executed ones; figures: the
    folder of figures and tables. Links are relative to the page. Returns its path.
    """

    def link(path: Path, text: str) -> str:
        return f'<a href="{_href(path, page)}">{escape(text)}</a>'

    def files(stem: str, suffixes: Sequence[str]) -> str:
        found = [figures / f"{stem}{s}" for s in suffixes if (figures / f"{stem}{s}").is_file()]
        return ", ".join(link(path, path.suffix[1:]) for path in found)

    body = ["<h2>Notebooks</h2>", _notebooks(notebooks, copies, link)] if notebooks else []
    names = sorted(path.name for path in figures.glob("*")) if figures.is_dir() else []
    pictures = [Path(name).stem for name in names if name.endswith(".png")]
    tables = [
        stem
        for stem in dict.fromkeys(Path(n).stem for n in names if n.endswith((".md", ".csv")))
        if stem not in pictures
    ]
    body += ["<h2>Figures</h2>"] * bool(pictures)
    for stem in pictures:
        caption = escape(_caption(stem))
        body.append(
            f'<figure id="{escape(stem)}"><img src="{_href(figures / f"{stem}.png", page)}" '
            f'alt="{caption}" loading="lazy"><figcaption>{caption} '
            f"({files(stem, ('.svg', '.csv'))})</figcaption></figure>"
        )
    body += ["<h2>Tables</h2>"] * bool(tables)
    for stem in tables:
        body.append(f'<h3 id="{escape(stem)}">{escape(_caption(stem))}</h3>')
        body.append(_table(figures, stem))
        body.append(f'<p class="files">{escape(stem)}: {files(stem, (".csv", ".md"))}</p>')
    shown = {".png", ".svg", ".csv", ".md"}
    others = [name for name in names if Path(name).suffix not in shown]
    if others:
        items = "".join(f"<li>{link(figures / name, name)}</li>" for name in others)
        body += ["<h2>Other files</h2>", f"<ul>{items}</ul>"]
    for recipe in recipes:
        body += [f"<h2>Recipe {link(recipe, recipe.name)}</h2>"]
        body += [f"<pre>{escape(recipe.read_text(encoding='utf-8'))}</pre>"]
    body += ["<h2>Versions</h2>", f"<p>{escape(_versions())}</p>"]
    return _write(page, title, body)


def write_contents(page: Path, title: str, pages: Mapping[str, Path]) -> Path:
    """Write a page of links to the pages of several studies, name -> page."""
    items = [
        f'<li><a href="{_href(path, page)}">{escape(name)}</a></li>' for name, path in pages.items()
    ]
    return _write(page, title, ["<ul>", *items, "</ul>"])


def _write(page: Path, title: str, body: list[str]) -> Path:
    """The page is replaced at once: whoever looks during a run sees a whole one."""
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    html = f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body><h1>{escape(title)}</h1>\n'
    page.parent.mkdir(parents=True, exist_ok=True)
    partial = page.with_suffix(".partial")
    partial.write_text(html + "\n".join(body) + "\n</body></html>\n", encoding="utf-8")
    return partial.replace(page)


def _notebooks(notebooks: Sequence[str], copies: Path, link) -> str:
    """The executed notebooks with their seconds; one that failed, and those that are to come."""
    rows, total = [], 0.0
    for name in notebooks:
        copy, failed = copies / name, (copies / name).with_suffix(".failed.ipynb")
        if copy.is_file():
            seconds = (
                nbformat.read(copy, as_version=4).metadata.get("papermill", {}).get("duration")
            )
            total += seconds or 0
            rows.append((link(copy, name), "done", f"{seconds:.1f}" if seconds else ""))
        elif failed.is_file():
            rows.append((escape(name), link(failed, "failed"), ""))
        else:
            rows.append((escape(name), "not run yet", ""))
    rows.append(("together", "", f"{total:.1f}"))
    return _html_table(["notebook", "state", "seconds"], rows, escaped=True)


def _table(folder: Path, stem: str) -> str:
    """The .md, which is rounded for reading, else the .csv."""
    path = folder / f"{stem}.md"
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines()
        # A bar within a cell is written \\|; the cells' own spaces are the table's.
        rows = [
            re.split(r"(?<!\\)\|", line.strip())[1:-1] for line in lines if line.startswith("|")
        ]
        rows = [[cell.strip().replace(r"\|", "|") for cell in row] for row in rows]
        header, rest = rows[0] if rows else [], rows[2:]
    else:
        with open(folder / f"{stem}.csv", newline="", encoding="utf-8") as file:
            header, *rest = [*csv.reader(file)] or [[]]
        if len(rest) > ROWS:
            note = f"<p>{len(rest)} rows, of which the first {ROWS} are shown</p>"
            return note + _html_table(header, rest[:ROWS])
    return _html_table(header, rest)


def _html_table(header: Sequence[str], rows: Sequence[Sequence[str]], escaped: bool = False) -> str:
    """A table whose columns of numbers stand to the right."""
    columns = itertools.zip_longest(*rows, fillvalue="")
    words = [not all(NUMBER.fullmatch(cell) for cell in column) for column in columns]

    def line(cells: Sequence[str], tag: str) -> str:
        texts = cells if escaped else [escape(cell) for cell in cells]
        classes = [' class="words"' if word else "" for word in words] + [""] * len(texts)
        return "".join(
            f"<{tag}{kind}>{text}</{tag}>" for text, kind in zip(texts, classes, strict=False)
        )

    lines = [line(header, "th"), *(line(row, "td") for row in rows)]
    body = "\n".join(f"<tr>{text}</tr>" for text in lines)
    return f'<div class="wide"><table>\n{body}\n</table></div>'


def _caption(stem: str) -> str:
    """fig02a_layer_norms -> "Figure 2a: layer norms"; figxx_ and others have no number."""
    match = re.fullmatch(r"(fig|table)0*(\w*?)_(.+)", stem)
    if not match:
        return stem.replace("_", " ")
    kind, number, what = match.groups()
    kind = {"fig": "Figure", "table": "Table"}[kind]
    return f"{kind}{'' if number == 'xx' else f' {number}'}: {what.replace('_', ' ')}"


def _href(path: Path, page: Path) -> str:
    return escape(quote(Path(os.path.relpath(path, page.parent)).as_posix()))


def _versions() -> str:
    found = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)
