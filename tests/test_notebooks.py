"""The saved notebooks keep to the house's form. `make test` runs them against their outputs too."""

import ast
import re
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
EXPECTED = {
    "00_benchmark",
    "01_task_vectors",
    "02_noise_analysis",
    "03_merging",
    "04_omni_composition",
    "05_evaluation",
    "06_when_merging_works",
    "07_real_language_model",
    "08_what_came_out",
    "playground",
}
MAX_CELL_LINES = 25

CHAPTERS = sorted(NOTEBOOKS.glob("*.ipynb"))
SOLUTIONS = sorted((NOTEBOOKS / "exercises").glob("*.ipynb"))


def notebooks(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.stem)


def read(path: Path) -> nbformat.NotebookNode:
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    return notebook


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def tree(cell: nbformat.NotebookNode) -> ast.Module:
    """The cell's syntax tree, without its magics."""
    return ast.parse(re.sub(r"^(\s*)%.*$", r"\1pass", cell.source, flags=re.MULTILINE))


def imports(cell: nbformat.NotebookNode) -> bool:
    return any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(tree(cell)))


def test_all_are_there():
    assert {path.stem for path in CHAPTERS} >= EXPECTED
    assert SOLUTIONS, "notebooks/exercises holds the solutions"


@notebooks(CHAPTERS)
def test_more_prose_than_code(path):
    cells = read(path).cells
    prose = sum(cell.cell_type == "markdown" for cell in cells)
    assert prose >= len(code_cells(path))


@notebooks(CHAPTERS)
def test_begins_with_a_title_and_ends_with_summary_and_exercises(path):
    cells = read(path).cells
    assert cells[0].cell_type == "markdown" and cells[0].source.startswith("# ")
    prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert re.findall(r"^##? +(.+?)\s*$", prose, flags=re.MULTILINE)[-2:] == [
        "Summary",
        "Exercises",
    ]


@notebooks(CHAPTERS)
def test_one_cell_of_parameters_with_the_contract(path):
    tagged = [cell for cell in code_cells(path) if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    names = {
        target.id: node.value
        for node in tree(tagged[0]).body
        if isinstance(node, ast.Assign)
        for target in node.targets
    }
    defaults = {name: ast.literal_eval(value) for name, value in names.items()}
    if "recipes" in defaults:  # it compares
        assert defaults["recipes"] == [
            f"../data/recipes/{n}.yaml" for n in ("internvl", "qwen2_vl")
        ]
        assert defaults["figure_dirs"] is None
    else:
        study = "omni" if "omni" in path.stem else "internvl"
        assert defaults["recipe"] == f"../data/recipes/{study}.yaml"
    assert defaults["output_dir"] is None  # it follows the recipe
    assert defaults["device"] == "auto"
    first, check = code_cells(path)[:2]
    assert first == tagged[0] and re.search(r"checked\(\s*globals\(\)", check.source)


@notebooks(CHAPTERS)
def test_no_path_hangs_on_the_folder_that_the_kernel_works_in(path):
    for cell in code_cells(path)[1:]:
        assert not re.search(r"""['"]\.\./""", cell.source), cell.source


@notebooks(CHAPTERS + SOLUTIONS)
def test_cells_are_short_and_imports_stand_together(path):
    cells = code_cells(path)
    for cell in cells:
        assert len(cell.source.splitlines()) <= MAX_CELL_LINES, cell.source
        assert not re.search(r"^\s*[!%]+\s*(pip|conda|apt|cd|bash|sh)\b", cell.source, re.M)
        assert not cell.source.lstrip().startswith("!"), cell.source
    # A control brings its own import, so that it can be left out.
    own = [cell.id.endswith("-play") for cell in cells]
    together = [n for n, cell in enumerate(cells) if imports(cell) and not own[n]]
    # Of a chapter the check, which imports nothing slow, comes before all else.
    assert together == ([1, 2] if path in CHAPTERS else together[:1])


@notebooks(CHAPTERS)
def test_imports_are_folded_up(path):
    cell = code_cells(path)[2]
    assert cell.metadata.jupyter.source_hidden and "hide-input" in cell.metadata.tags


@notebooks(CHAPTERS)
def test_a_cell_that_proves_something_shows_it(path):
    proves = re.compile(r"^\s*assert |assert_close\(|check_claims\(", re.MULTILINE)
    proving = [cell for cell in code_cells(path) if proves.search(cell.source)]
    assert [cell.id for cell in proving if not cell.outputs] == []


@notebooks(CHAPTERS)
def test_no_output_is_a_path_or_a_warning(path):
    for cell in code_cells(path):
        for output in cell.outputs:
            said = str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", ""))
            assert output.get("name") != "stderr" and "Path(" not in said, said


@notebooks(CHAPTERS + SOLUTIONS)
def test_was_saved_after_one_run_from_top_to_bottom(path):
    cells = [cell for cell in code_cells(path) if cell.source.strip()]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs
    errors = [output for output in outputs if output.output_type == "error"]
    assert errors == []


@notebooks(CHAPTERS + SOLUTIONS)
def test_tells_nothing_of_the_computer_it_was_made_on(path):
    notebook = read(path)
    assert notebook.metadata.kernelspec.name == "python3"
    assert "papermill" not in notebook.metadata, "this is an executed copy; see runs/"
    for cell in notebook.cells:
        text = [cell.source]
        for output in cell.get("outputs", []):
            text.append(output.get("text", ""))
            data = output.get("data", {})
            text += [str(value) for kind, value in data.items() if not kind.startswith("image/")]
        for part in text:
            found = re.search(r"(?<![\w.~/-])/(home|root|Users|work|tmp|mnt|opt|usr)/\w", part)
            assert not found, f"{found[0]} in: {cell.source}"
