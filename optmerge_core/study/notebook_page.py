"""An executed notebook as a page that a browser shows: outputs kept, formulas without a network."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from optmerge_core.errors import extra

FORMULA = re.compile(r"\$\$(.+?)\$\$|(?<![\\$`\w])\$(?!\s)([^$\n`]+?)(?<!\s)\$(?![\w$])", re.DOTALL)
CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.DOTALL)
REMOTE = re.compile(
    r"<!-- Load mathjax -->.*?<!-- End of mathjax configuration -->"
    r"|<script[^>]*>(?:(?!</script>).)*https?://(?:(?!</script>).)*</script>"
    r"|<script[^>]*\bsrc=[^>]*></script>",
    re.DOTALL,
)
"""What nbconvert's page would fetch: MathJax, require.js, mermaid."""


def read_notebook(path: Path) -> Any:
    """A notebook in the format's fourth version, as nbformat gives it."""
    with extra("notebooks"):
        import nbformat  # slow: it parses a grammar of JSON schemas

    return nbformat.read(path, as_version=4)


def notebook_page(copy: Path) -> Path:
    """The page beside an executed notebook, written anew if that is newer. Returns its path."""
    page = copy.with_suffix(".html")
    if page.is_file() and page.stat().st_mtime >= copy.stat().st_mtime:
        return page
    with extra("notebooks"):
        from nbconvert import HTMLExporter  # takes a second

    notebook = read_notebook(copy)
    notebook.metadata.pop("widgets", None)  # they would be fetched; their text is shown
    notebook.metadata["title"] = copy.stem
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = with_formulas(cell.source)
    text, _ = HTMLExporter(template_name="lab").from_notebook_node(notebook)
    partial = page.with_suffix(".partial")
    partial.write_text(REMOTE.sub("", text), encoding="utf-8")
    return partial.replace(page)


def with_formulas(markdown: str) -> str:
    """TeX between dollars becomes MathML, which browsers draw by themselves; code stays."""
    parts = CODE.split(markdown)
    parts[::2] = [FORMULA.sub(_mathml, part) for part in parts[::2]]
    return "".join(parts)


def _mathml(found: re.Match[str]) -> str:
    """MathML of a formula; what cannot be converted is shown as it was written."""
    with extra("notebooks"):
        from latex2mathml.converter import convert

    tex, form = found[1] or found[2], "block" if found[1] else "inline"
    plain = re.sub(r"\\[bB]ig[lr]?(?=\\\|)", "", tex)  # it knows no large ‖
    try:
        return convert(plain, display=form).replace("\n", " ")
    except Exception:  # of a notebook of one's own: any TeX
        return f"<code>{html.escape(tex)}</code>"
