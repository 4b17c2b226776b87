"""How long the notebooks take: `python tests/lessons.py` writes it wherever it is said.

A minute for a hundred words and for eight lines of code; parameters and imports, which are alike in
all notebooks, are not counted. A section (or a part of one, ###) whose heading begins with
"Appendix" is no part of the core.
"""

import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
WORDS, LINES = 100, 8
"""What is read in a minute."""
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))


def sections(path: Path) -> dict[int, bool]:
    """Number of a section -> whether it is an appendix."""
    cells = nbformat.read(path, 4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    found = re.findall(r"^## (Appendix: )?(\d+) · ", text, flags=re.MULTILINE)
    return {int(number): bool(marked) for marked, number in found}


def minutes(path: Path) -> tuple[int, int]:
    """Of the core, and of the whole."""
    spent, section, part = {False: 0.0, True: 0.0}, False, False  # is it an appendix?
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "markdown":
            for text in re.split(r"^(?=###? )", cell.source, flags=re.MULTILINE):
                if text.startswith("## "):
                    section, part = text.startswith("## Appendix"), False
                elif text.startswith("### "):
                    part = text.startswith("### Appendix")
                spent[section or part] += len(text.split()) / WORDS
        elif not re.search(r"^(from|import) ", cell.source, re.MULTILINE):
            counted = "parameters" not in cell.metadata.get("tags", [])
            spent[section or part] += counted * len(cell.source.splitlines()) / LINES
    return round(spent[False]), round(sum(spent.values()))


def said(path: Path) -> str:
    """The sentence of a notebook's first cell."""
    core, whole = minutes(path)
    if core == whole:
        return f"**Time.** {whole} minutes, all of it core."
    return f"**Time.** {core} minutes for the core, {whole} with the appendices."


def written() -> dict[Path, str]:
    """The notebooks, the README and the page for teachers, with the times that are true."""
    files = {path: path.read_text(encoding="utf-8") for path in NOTEBOOKS}
    times = {path.name[:2]: minutes(path) for path in NOTEBOOKS}
    for path in NOTEBOOKS:
        files[path] = re.sub(r"\*\*Time\.\*\* [^.]*\.", said(path), files[path], count=1)
    rows = {
        ROOT / "README.md": r"^(?P<row>\| (?P<number>\d\d)) \| \d+ \| \d+ \|",
        ROOT / "notebooks" / "teaching.md": (
            r"^(?P<row>\| \d \| \[(?P<number>\d\d)\][^|]*) \| \d+ \| \d+ \|"
        ),
    }

    def timed(found: re.Match[str]) -> str:
        core, whole = times[found["number"]]
        return f"{found['row']} | {core} | {whole} |"

    for page, row in rows.items():
        files[page] = re.sub(row, timed, page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return files


if __name__ == "__main__":
    for path, text in written().items():
        path.write_text(text, encoding="utf-8")
    for path in NOTEBOOKS:
        print(path.stem, *minutes(path))
