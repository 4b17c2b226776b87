"""notebooks/teaching.md: the sections, exercises, answers and times that it names are there."""

import re
from pathlib import Path

import nbformat

from optmerge_core.study.exercises import check_exercise

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "notebooks" / "teaching.md").read_text()
NOTEBOOKS = {path.name[:2]: path for path in (ROOT / "notebooks").glob("[0-9]*.ipynb")}


def sections(number: str) -> set[int]:
    cells = nbformat.read(NOTEBOOKS[number], 4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    return {int(found) for found in re.findall(r"^## (\d+) · ", text, flags=re.MULTILINE)}


def numbers(text: str) -> set[int]:
    """The numbers of "1 to 4, 9"."""
    spans = re.findall(r"(\d+)(?: to (\d+))?", text)
    return {n for low, high in spans for n in range(int(low), int(high or low) + 1)}


def test_every_section_of_a_lessons_notebook_is_core_or_for_afterwards():
    rows = re.findall(
        r"^\| \d \| \[(\d\d)\]\((\S+)\)[^|]*\| (\d+) \|([^|]+)\|([^|]+)\|", PAGE, re.M
    )
    assert len(rows) == 6
    for number, file, minutes, core, rest in rows:
        assert (ROOT / "notebooks" / file) == NOTEBOOKS[number]
        assert not numbers(core) & numbers(rest)
        assert numbers(core) | numbers(rest) == sections(number), number
        assert f"| {number} | {minutes} |" in (ROOT / "README.md").read_text()


def test_what_the_page_refers_to_is_there():
    flat = " ".join(PAGE.split())
    cited = re.findall(r"(?<!\d)(0\d), sections? ([\d, and]*\d)", flat)
    assert len(cited) > 6
    for number, named in cited:
        assert numbers(named) <= sections(number), (number, named)
    exercises = re.findall(r"\b(0\d)-(\d)\b", PAGE)
    assert len(exercises) > 6
    for number, exercise in exercises:
        assert check_exercise(int(number), int(exercise)).text
    for link in re.findall(r"\]\(([^)]+)\)", PAGE):
        assert (ROOT / "notebooks" / link).is_file(), link


def test_every_question_of_a_quiz_has_its_answer():
    quizzes = PAGE.split("## Quiz ")[1:]
    assert len(quizzes) == 3
    for quiz in quizzes:
        questions, answers = quiz.split("**Answers.**")
        asked = re.findall(r"^(\d)\. ", questions, flags=re.MULTILINE)
        assert asked == re.findall(r"(?:^|\s)(\d): ", answers)
