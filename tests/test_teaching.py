"""notebooks/teaching.md: its sections, exercises, answers and times are the notebooks' own."""

import re
from pathlib import Path

import nbformat
import pytest
from lessons import NOTEBOOKS, minutes, sections, written

from optmerge_core.study.exercises import check_exercise

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "notebooks" / "teaching.md").read_text()
BY_NUMBER = {path.name[:2]: path for path in NOTEBOOKS}


def numbers(text: str) -> set[int]:
    """The numbers of "1 to 4, 9"."""
    spans = re.findall(r"(\d+)(?: to (\d+))?", text)
    return {n for low, high in spans for n in range(int(low), int(high or low) + 1)}


def test_every_section_of_a_lessons_notebook_is_core_or_for_afterwards():
    rows = re.findall(
        r"^\| \d \| \[(\d\d)\]\((\S+)\)[^|]*\| \d+ \| \d+ \|([^|]+)\|([^|]+)\|", PAGE, re.M
    )
    assert len(rows) == 6
    for number, file, core, rest in rows:
        assert (ROOT / "notebooks" / file) == BY_NUMBER[number]
        marked = sections(BY_NUMBER[number])
        assert numbers(core) == {n for n, appendix in marked.items() if not appendix}, number
        assert numbers(rest) == {n for n, appendix in marked.items() if appendix}, number


def test_the_times_are_those_of_the_notebooks_and_a_core_fits_into_a_lesson():
    """Else `python tests/lessons.py` writes them anew."""
    files = written()
    assert {path.name for path in files} >= {"README.md", "teaching.md"}
    assert [path.name for path, text in files.items() if path.read_text() != text] == []
    cores = {path.name: minutes(path)[0] for path in NOTEBOOKS}
    assert {name: core for name, core in cores.items() if core > 40} == {}


def test_minutes_by_hand(tmp_path):
    texts = ["# 09 · x\n\n" + "a " * 147, "## 1 · b\n\n" + "a " * 96, "## Appendix: 2 · c\n\nd"]
    cells = [nbformat.v4.new_markdown_cell(text) for text in texts]
    cells.insert(2, nbformat.v4.new_code_cell("\n".join(["1"] * 12)))
    cells.insert(1, nbformat.v4.new_code_cell("import a\n" * 30))
    cells.append(nbformat.v4.new_code_cell("\n".join(["1"] * 80)))
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "09.ipynb")
    assert minutes(tmp_path / "09.ipynb") == (4, 14)  # 1.5 + 1 + 1.5, and ten
    assert sections(tmp_path / "09.ipynb") == {1: False, 2: True}


@pytest.mark.parametrize("number", range(len(NOTEBOOKS)))
def test_a_notebook_says_what_it_needs_and_leads_to_its_neighbours(number):
    first, *_, last = nbformat.read(NOTEBOOKS[number], 4).cells
    titles = [nbformat.read(path, 4).cells[0].source.splitlines()[0][2:] for path in NOTEBOOKS]
    links = [f"[{title}]({path.name})" for title, path in zip(titles, NOTEBOOKS, strict=True)]
    before = [links[number - 1].replace("[", "[← ")] if number else []
    after = [link.replace("](", " →](") for link in links[number + 1 : number + 2]]
    here = " · ".join(before + after)
    assert first.source.splitlines()[2] == here and last.source.splitlines()[-1] == here
    said = re.findall(r"^\*\*([\w ]+?)\.?\*\*", first.source, re.MULTILINE)
    assert [word for word in said if word in ("You need", "You will know", "Time")] == [
        "You need", "You will know", "Time"
    ]  # fmt: skip


def test_what_the_page_refers_to_is_there():
    flat = " ".join(PAGE.split())
    cited = re.findall(r"(?<!\d)(0\d), sections? ([\d, and]*\d)", flat)
    assert len(cited) > 6
    for number, named in cited:
        assert numbers(named) <= set(sections(BY_NUMBER[number])), (number, named)
    exercises = re.findall(r"\b(0\d)-(\d)\b", PAGE)
    assert len(exercises) > 6
    for number, exercise in exercises:
        assert check_exercise(int(number), int(exercise)).text
    for link in re.findall(r"\]\(([^)]+)\)", PAGE):
        assert (ROOT / "notebooks" / link).is_file(), link


def test_the_lab_takes_the_answers_that_were_given_before():
    exported = re.search(r"^(.*): export OPTMERGE_ANSWERS", (ROOT / "Makefile").read_text(), re.M)
    assert {"reproduce", "lab"} <= set(exported[1].split())


def test_every_question_of_a_quiz_has_its_answer():
    quizzes = PAGE.split("## Quiz ")[1:]
    assert len(quizzes) == 3
    for quiz in quizzes:
        questions, answers = quiz.split("**Answers.**")
        asked = re.findall(r"^(\d)\. ", questions, flags=re.MULTILINE)
        assert asked == re.findall(r"(?:^|\s)(\d): ", answers)
