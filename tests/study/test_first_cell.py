"""The notebooks' first cells: what they refuse, where they write, papermill from anywhere."""

import os
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))}
OMNI = ROOT / "data" / "recipes" / "omni.yaml"


def code_cells(stem):
    return [c for c in nbformat.read(NOTEBOOKS[stem], 4).cells if c.cell_type == "code"]


def first_cells(stem: str, injected: str = "") -> dict:
    """What the parameters and the check leave behind, as in a kernel that papermill started."""
    parameters, check = (cell.source for cell in code_cells(stem)[:2])
    assert "checked(" in check
    namespace = {"In": [""]}
    for source in (parameters, f"# Parameters\n{injected}\n", check):
        namespace["In"].append(source)
        exec(source, namespace)
    return namespace


def own_recipe(folder: Path) -> Path:
    for name in ("base", "chart"):
        (folder / name).mkdir()
    path = folder / "own.yaml"
    path.write_text("base_model: base\nmodels: [{model: chart}]\n")
    return path


def test_no_first_cell_takes_two_seconds_or_imports_torch():
    text = (
        "import sys, time; from test_first_cell import NOTEBOOKS, first_cells\n"
        "start = time.process_time()\n"
        "for stem in NOTEBOOKS: first_cells(stem)\n"
        "assert not {'torch', 'pandas', 'matplotlib'} & {*sys.modules}\n"
        "print(time.process_time() - start)"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{Path(__file__).parent}"}
    command = [sys.executable, "-c", text]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 2


@pytest.mark.parametrize("cwd", [ROOT, ROOT / "notebooks", None], ids=["root", "notebooks", "else"])
@pytest.mark.parametrize("stem", NOTEBOOKS)
def test_defaults_are_the_repositorys_wherever_the_kernel_works(stem, cwd, tmp_path, monkeypatch):
    monkeypatch.chdir(cwd or tmp_path)
    left = first_cells(stem)
    name = "omni" if "omni" in stem else "internvl"
    if "recipes" in left:
        assert [Path(x).resolve().stem for x in left["recipes"]] == ["internvl", "qwen2_vl"]
        folders = [ROOT / "figures" / x for x in ("internvl", "qwen2_vl")]
        assert [Path(x).resolve() for x in left["figure_dirs"]] == folders
        name = "comparison"
    else:
        assert Path(left["recipe"]).resolve() == ROOT / "data" / "recipes" / f"{name}.yaml"
    assert Path(left["output_dir"]).resolve() == ROOT / "figures" / name
    for folder in ("merged", "retrained"):
        if f"{folder}_dir" in left:
            assert Path(left[f"{folder}_dir"]).resolve() == ROOT / "runs" / name / folder


def test_folders_follow_the_recipe_and_given_ones_the_working_directory(tmp_path, monkeypatch):
    left = first_cells("03_merging", 'recipe = "../data/recipes/qwen2_vl.yaml"')
    assert Path(left["output_dir"]).resolve() == ROOT / "figures" / "qwen2_vl"
    assert Path(left["merged_dir"]).resolve() == ROOT / "runs" / "qwen2_vl" / "merged"
    own_recipe(tmp_path)
    monkeypatch.chdir(tmp_path)
    given = 'recipe = "own.yaml"\noutput_dir = "made"'
    left = first_cells("01_task_vectors", given)
    assert (left["recipe"], left["output_dir"]) == ("own.yaml", "made")
    assert not (tmp_path / "made").exists()
    both = ROOT / "data" / "recipes" / "internvl_stressed.yaml", ROOT / "data/recipes/qwen2_vl.yaml"
    figures = [str(ROOT / "figures" / name) for name in ("internvl", "qwen2_vl")]
    given = f"recipes = {[str(path) for path in both]}\nfigure_dirs = {figures}"
    left = first_cells("06_when_merging_works", given)
    assert left["figure_dirs"] == figures


@pytest.mark.parametrize(
    ("stem", "injected", "message"),
    [
        ("00_benchmark", "recpie = 1", "recpie is no parameter of this notebook.*mean recipe"),
        ("00_benchmark", "merged_dir = 'x'", "merged_dir is no parameter.*retrained_dir"),
        ("00_benchmark", "retrain = 'yes'", "retrain = 'yes': give True or False"),
        ("01_task_vectors", "recipe = None", "recipe = None: give a path$"),
        ("01_task_vectors", "recipe = 'no.yaml'", "no.yaml: cannot be read"),
        ("01_task_vectors", "output_dir = 3", "output_dir = 3: give a path or None"),
        ("01_task_vectors", "device = 'gpu'", 'device = \'gpu\': give "auto", "cpu"'),
        ("01_task_vectors", f"recipe = {str(OMNI)!r}", "omni.yaml merges modalities.*notebook 04"),
        ("03_merging", f"recipe = {str(OMNI)!r}", "omni.yaml merges modalities.*notebook 04"),
        ("03_merging", "recipe = 'own.yaml'", "own.yaml: this notebook asks questions; add eval"),
        ("03_merging", "recipe = 'asks.yaml'", "evaluation.data: base/validation has no <task>"),
        ("03_merging", "merged_dir = 'own.yaml/x'", "merged_dir = 'own.yaml/x': .* is a file"),
        ("04_omni_composition", "recipe = 'own.yaml'", "own.yaml merges capabilities, this note"),
        ("05_evaluation", "output_dir = 'new'", "new has no table07_cost.csv: run notebook 03_me"),
        ("06_when_merging_works", "recipes = 'a.yaml'", "recipes = 'a.yaml': give a list of"),
        ("06_when_merging_works", "recipes = []", "give a list of paths"),
        ("06_when_merging_works", "figure_dirs = ['x']", "1 folders for 2 recipes"),
        ("06_when_merging_works", "figure_dirs = ['x', 'y']", "x has no tablexx_claims.csv: run"),
        ("07_real_language_model", "smol = 'no.yaml'", "no.yaml: cannot be read"),
        ("07_real_language_model", "smol = None", "smol = None: give a path$"),
        ("08_what_came_out", "omni_dir = 'x'", "x has no table05_modalities.csv: run notebook 04"),
        ("08_what_came_out", "omni_dir = ''", "omni_dir = '': give a path or None"),
        ("08_what_came_out", "output_dir = 'x'", "x has no table06_different_makers.csv: run"),
    ],
)
def test_refusals_are_one_sentence(stem, injected, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = own_recipe(tmp_path).read_text()
    (tmp_path / "asks.yaml").write_text(text + "evaluation: {data: base}\n")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message) as caught:
        first_cells(stem, injected)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(ValueError, match="may not be written; give another folder"):
        first_cells("01_task_vectors", f"output_dir = {str(tmp_path / 'x')!r}")


def test_a_parameter_that_no_cell_has_set_and_a_cell_run_twice():
    left = first_cells("01_task_vectors")
    again = code_cells("01_task_vectors")[1].source
    exec(again, left)  # what it found is found again
    del left["recipe"]
    with pytest.raises(ValueError, match="recipe is not set: run the cell of parameters"):
        exec(again, left)


def papermill(notebook, copy, cwd, **parameters):
    given = [word for pair in parameters.items() for word in ("-p", *map(str, pair))]
    command = [sys.executable, "-m", "papermill", notebook, copy, *given, "--no-progress-bar"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("where", ["root", "notebooks", "elsewhere"])
def test_papermill_from_anywhere(where, tmp_path):
    """A notebook's first cells and one more, as papermill's own command runs them; nbval, which
    runs all of them in notebooks/, and no path beginning with .. do the rest."""
    notebook = nbformat.read(NOTEBOOKS["03_merging"], 4)
    second = notebook.cells.index(next(c for c in notebook.cells if "checked(" in c.source))
    text = """
import pathlib, yaml
folder = pathlib.Path(output_dir)
folder.mkdir()
(folder / "seen.txt").write_text(yaml.safe_load(open(recipe))["fine_tuning"])
assert pathlib.Path(in_checkout("data/paper")).is_dir()
"""
    notebook.cells = [*notebook.cells[: second + 1], nbformat.v4.new_code_cell(text, id="more")]
    nbformat.write(notebook, tmp_path / "short.ipynb")
    cwd = {"root": ROOT, "notebooks": ROOT / "notebooks", "elsewhere": tmp_path}[where]
    made = "made" if where == "elsewhere" else tmp_path / "made"
    recipe = os.path.relpath(ROOT / "data" / "recipes" / "qwen2_vl.yaml", cwd)
    given = {"output_dir": made, "recipe": recipe}
    done = papermill(tmp_path / "short.ipynb", tmp_path / "out.ipynb", cwd, **given)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "made" / "seen.txt").read_text() == "lora"


def test_papermill_stops_at_a_misspelt_parameter(tmp_path):
    start = time.monotonic()
    done = papermill(NOTEBOOKS["05_evaluation"], tmp_path / "out.ipynb", ROOT, outputdir="x")
    assert done.returncode != 0
    assert "outputdir is no parameter of this notebook; did you mean output_dir?" in done.stderr
    assert time.monotonic() - start < 120
    cells = [c for c in nbformat.read(tmp_path / "out.ipynb", 4).cells if c.cell_type == "code"]
    assert sum(bool(cell.metadata.papermill.get("start_time")) for cell in cells) == 3
