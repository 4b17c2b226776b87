import json
import os
import re
import sys
from pathlib import Path

import nbformat
import pytest

from optmerge_core.__main__ import main
from optmerge_core.study import notebooks as pipeline
from optmerge_core.study.notebooks import NotebookError, run

PARAMETERS = 'recipe = "none"\noutput_dir = "none"\ndevice = "none"\nimport pathlib, sys, json'
STUDY = "base_model: base\nmodels: [{model: chart}]\nevaluation: {data: .}\n"
LOG = """
folder = pathlib.Path(output_dir)
with open(folder / "log.jsonl", "a") as log:
    entry = [NAME, recipe, output_dir, device, str(pathlib.Path.cwd()), sys.executable]
    print(json.dumps(entry), file=log)
"""


def write_notebook(folder: Path, name: str, *sources: str) -> Path:
    """A notebook that writes what it was given to log.jsonl, then runs `sources`."""
    cells = [nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})]
    log = LOG.replace("NAME", repr(name)).strip()
    cells += [nbformat.v4.new_code_cell(source) for source in (log, *sources)]
    for number, cell in enumerate(cells):
        cell.id = str(number)
    path = folder / f"{name}.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A checkout in miniature: a recipe, two numbered notebooks and one without a number."""
    for folder in ("notebooks", "base", "chart"):
        (tmp_path / folder).mkdir()
    (tmp_path / "study.yaml").write_text(STUDY)
    for name in ("01_second", "00_first", "solutions"):
        write_notebook(tmp_path / "notebooks", name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def log_of(figures: Path) -> list[list[str]]:
    return [json.loads(line) for line in (figures / "log.jsonl").read_text().splitlines()]


def test_order_parameters_folders_and_skipping(study, capsys):
    executed = run("study.yaml", "out", "cpu", "notebooks")
    names = ["00_first.ipynb", "01_second.ipynb"]
    assert executed == [study / "out" / "notebooks" / name for name in names]
    given = ["../study.yaml", "../out/figures", "cpu", str(study / "notebooks"), sys.executable]
    log = log_of(study / "out" / "figures")
    assert log == [["00_first", *given], ["01_second", *given]]
    pages = {name.replace("ipynb", "html") for name in names}
    assert {path.name for path in executed[0].parent.iterdir()} == set(names) | pages
    shown = capsys.readouterr().out
    assert "out/index.html" in shown
    assert "out/figures" in shown and "out/notebooks" in shown and "done before" not in shown

    # Nothing changed: nothing runs.
    assert run("study.yaml", "out", "cpu", "notebooks") == executed
    assert len(log_of(study / "out" / "figures")) == 2
    assert capsys.readouterr().out.count("done before") == 2

    # A newer notebook runs again, and what comes after it, not what comes before.
    later = executed[1].stat().st_mtime + 1
    os.utime(study / "notebooks" / "01_second.ipynb", (later, later))
    run("study.yaml", "out", "cpu", "notebooks")
    assert [entry[0] for entry in log_of(study / "out" / "figures")][2:] == ["01_second"]


def test_notebooks_run_with_this_interpreter_whatever_python3_is_elsewhere(
    study, tmp_path, monkeypatch
):
    """A kernel of that name comes first in Jupyter's path: another Python's, which would fail."""
    foreign = tmp_path / "foreign" / "kernels" / "python3"
    foreign.mkdir(parents=True)
    argv = [sys.executable, "-c", "raise SystemExit('another Python')", "{connection_file}"]
    spec = {"argv": argv, "display_name": "foreign", "language": "python", "env": {"FOREIGN": "1"}}
    (foreign / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "foreign"))
    write_notebook(study / "notebooks", "00_first", "import os\nassert 'FOREIGN' not in os.environ")
    run("study.yaml", "out", "cpu", "notebooks")
    assert {entry[-1] for entry in log_of(study / "out" / "figures")} == {sys.executable}


@pytest.fixture
def instant(monkeypatch):
    """papermill replaced by a copy of the notebook, for tests of what runs; a list of the names."""
    ran = []

    def execute_notebook(notebook, copy, parameters, **_):
        content = nbformat.read(notebook, as_version=4)
        content.metadata["papermill"] = {"parameters": parameters, "exception": None}
        nbformat.write(content, copy)
        ran.append(notebook.name[:2])

    monkeypatch.setattr("papermill.execute_notebook", execute_notebook)
    return ran


def test_a_change_runs_everything_after_it_again(study, instant):
    def ran(device="cpu"):
        instant.clear()
        run("study.yaml", "out", device, "notebooks")
        return instant

    assert ran() == ["00", "01"] and ran() == []
    copies = study / "out" / "notebooks"
    (copies / "00_first.ipynb").unlink()
    assert ran() == ["00", "01"]
    later = (copies / "01_second.ipynb").stat().st_mtime + 1
    os.utime(study / "study.yaml", (later, later))
    for name in ("00_first", "01_second"):
        assert not pipeline._finished(copies / f"{name}.ipynb", later, {})
    earlier = later - 1000
    os.utime(study / "study.yaml", (earlier, earlier))
    assert ran() == [] and ran("cuda") == ["00", "01"]


def test_the_page_is_there_after_every_notebook(study, monkeypatch):
    page, seen = study / "out" / "index.html", []

    def execute_notebook(notebook, copy, parameters, **_):
        seen.append(re.findall(r">(done|not run yet)</td>", page.read_text()))
        if notebook.name == "01_second.ipynb":
            raise KeyboardInterrupt
        nbformat.write(nbformat.read(notebook, as_version=4), copy)

    monkeypatch.setattr("papermill.execute_notebook", execute_notebook)
    with pytest.raises(KeyboardInterrupt):
        run("study.yaml", "out", "cpu", "notebooks")
    assert seen == [["not run yet"] * 2, ["done", "not run yet"]]
    text = page.read_text()
    assert 'href="notebooks/00_first.ipynb"' in text and "models: [{model: chart}]" in text


def test_default_folders(study, instant, monkeypatch):
    monkeypatch.setattr(pipeline, "checkout", lambda: study)
    executed = run("study.yaml")
    assert (study / "runs" / "study" / "index.html").is_file()
    assert executed[0] == study / "runs" / "study" / "notebooks" / "00_first.ipynb"
    assert (study / "figures" / "study").is_dir()


def test_a_run_ends_with_the_claims_that_agree(study, instant, monkeypatch, capsys):
    monkeypatch.setattr(pipeline, "checkout", lambda: study)
    table = study / "figures" / "study" / "tablexx_claims.csv"
    table.parent.mkdir(parents=True)
    table.write_text("claim,lead,verdict\na wins,4,holds\n")
    run("study.yaml")
    assert "study: 1 of 1 claims agree\n" in capsys.readouterr().out
    table.write_text("claim,lead,verdict\na wins,-4,does not hold\n")
    run("study.yaml")
    shown = capsys.readouterr().out
    assert "study: DIFFERS: a wins: does not hold, committed holds (lead -4, committed 4)" in shown


def test_several_recipes_then_the_comparison(study, instant, monkeypatch):
    (study / "other.yaml").write_text(STUDY)
    given = 'recipes = []\nfigure_dirs = []\noutput_dir = ""\ndevice = ""'
    cell = nbformat.v4.new_code_cell(given, metadata={"tags": ["parameters"]}, id="0")
    path = study / "notebooks" / "02_both.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)
    executed = run(["study.yaml", "other.yaml"], "out", "cpu", "notebooks")
    assert instant == ["00", "01", "00", "01", "02"]
    assert executed[3] == study / "out" / "other" / "notebooks" / "01_second.ipynb"
    copy = study / "out" / "comparison" / "notebooks" / path.name
    assert executed[4] == copy
    links = re.findall(r'href="([^"]+)"', (study / "out" / "index.html").read_text())
    assert links == [f"{name}/index.html" for name in ("study", "other", "comparison")]
    page = (study / "out" / "comparison" / "index.html").read_text()
    assert "study.yaml" in page and "other.yaml" in page and "02_both.ipynb" in page
    assert nbformat.read(copy, as_version=4).metadata["papermill"]["parameters"] == {
        "recipes": ["../study.yaml", "../other.yaml"],
        "figure_dirs": ["../out/study/figures", "../out/other/figures"],
        "output_dir": "../out/comparison/figures",
        "device": "cpu",
    }
    instant.clear()
    (study / "out" / "other" / "notebooks" / "01_second.ipynb").unlink()
    run(["study.yaml", "other.yaml"], "out", "cpu", "notebooks")
    assert instant == ["01", "02"]
    instant.clear()
    monkeypatch.setattr(pipeline, "checkout", lambda: study)
    assert main(["run", "study.yaml", "other.yaml"]) == 0
    assert (study / "figures" / "comparison").is_dir() and instant[-1] == "02"
    instant.clear()
    assert main(["run", "study.yaml", "--output", "alone"]) == 0
    assert instant == ["00", "01"]  # one recipe: nothing to compare


def test_a_notebook_runs_on_recipes_that_merge_what_its_own_does(study, instant):
    omni = "merges: modalities\nbase_model: base\nmodels: [{model: chart}]\n"
    (study / "omni.yaml").write_text(omni)
    with pytest.raises(ValueError, match=r"omni.yaml: no notebook in notebooks merges modalities"):
        run("omni.yaml", "out", "cpu", "notebooks")
    given = 'recipe = "../omni.yaml"  # the study\noutput_dir = ""\ndevice = ""'
    cell = nbformat.v4.new_code_cell(given, metadata={"tags": ["parameters"]}, id="0")
    path = study / "notebooks" / "04_omni.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)
    run(["study.yaml", "omni.yaml"], "out", "cpu", "notebooks")
    assert instant == ["00", "01", "04"]


def test_a_notebook_that_compares_is_given_the_modalities_figures_if_it_asks(study, instant):
    (study / "omni.yaml").write_text(
        "merges: modalities\nbase_model: base\nmodels: [{model: chart}]\n"
    )
    (study / "other.yaml").write_text(STUDY)
    for stem, given in {
        "04_omni": 'recipe = "../omni.yaml"\noutput_dir = ""',
        "06_both": "recipes = []\nfigure_dirs = []",
        "08_all": "recipes = []\nfigure_dirs = []\nomni_dir = None",
    }.items():
        cell = nbformat.v4.new_code_cell(given, metadata={"tags": ["parameters"]}, id="0")
        notebook = nbformat.v4.new_notebook(cells=[cell])
        nbformat.write(notebook, study / "notebooks" / f"{stem}.ipynb")
    done = run(["study.yaml", "omni.yaml", "other.yaml"], "out", "cpu", "notebooks")[-2:]
    given = [nbformat.read(path, 4).metadata["papermill"]["parameters"] for path in done]
    assert [sorted(x) for x in given] == [
        ["figure_dirs", "recipes"],
        ["figure_dirs", "omni_dir", "recipes"],
    ]
    assert given[1]["omni_dir"] == "../out/omni/figures"


def test_a_notebook_that_brings_a_study_is_left_out_where_that_is_not_built(study, instant, capsys):
    (study / "other.yaml").write_text(STUDY)
    text = 'recipes = []\nfigure_dirs = []\nsmol = "../data/smol.yaml"'
    cell = nbformat.v4.new_code_cell(text, metadata={"tags": ["parameters"]}, id="0")
    notebook = nbformat.v4.new_notebook(cells=[cell])
    nbformat.write(notebook, study / "notebooks" / "07_real.ipynb")
    run(["study.yaml", "other.yaml"], "out", "cpu", "notebooks")
    assert instant == ["00", "01"] * 2
    assert "07_real.ipynb is left out: " in capsys.readouterr().out
    (study / "data").mkdir()
    (study / "data" / "smol.yaml").write_text(STUDY)
    *_, copy = run(["study.yaml", "other.yaml"], "out", "cpu", "notebooks")
    given = nbformat.read(copy, 4).metadata["papermill"]["parameters"]
    assert copy.stem == "07_real" and "smol" not in given


def test_two_recipes_of_one_name(study, instant):
    with pytest.raises(ValueError, match="the name 'study' is study.yaml's too"):
        run(["study.yaml", "study.yaml"], "out", "cpu", "notebooks")
    assert instant == []


def test_failure_names_notebook_and_cell_and_leaves_no_finished_copy(study, monkeypatch, capsys):
    bad = write_notebook(
        study / "notebooks", "01_second", "# why\nnumber = 0\n", "1 / number", "print('after')"
    )
    with pytest.raises(NotebookError) as caught:
        run("study.yaml", "out", notebooks_dir="notebooks")
    failed = Path("out", "notebooks", "01_second.failed.ipynb")
    message = str(caught.value)
    # The cell of injected parameters counts: 1 parameters, 2 injected, 3 log, 4 number, 5.
    assert "01_second.ipynb, cell 5 (1 / number): ZeroDivisionError: division by zero" in message
    assert str(failed) in message and "\n" not in message
    names = {path.name for path in failed.parent.iterdir()}
    pages = {"00_first.html", "01_second.failed.html"}
    assert names == {"00_first.ipynb", failed.name} | pages
    assert "ZeroDivisionError" in failed.read_text()
    page = Path("out", "index.html").read_text()
    assert 'href="notebooks/01_second.failed.html">failed' in page

    monkeypatch.setattr(pipeline, "checkout", lambda: study)
    assert main(["run", "study.yaml", "--output", "out"]) == 1
    assert "error: 01_second.ipynb, cell 5" in capsys.readouterr().err

    # Mended, the run goes on where it stopped.
    bad.unlink()
    write_notebook(study / "notebooks", "01_second", "number = 1")
    run("study.yaml", "out", notebooks_dir="notebooks")
    ran = [entry[0] for entry in log_of(study / "out" / "figures")]
    assert ran == ["00_first", "01_second", "01_second", "01_second"]
    assert not failed.exists() and not failed.with_suffix(".html").exists()


def test_a_dead_kernel_is_a_failure_too(study):
    write_notebook(study / "notebooks", "00_first", "import os\nos._exit(1)")
    with pytest.raises(NotebookError, match=r"00_first.ipynb, cell 4 \(import os\): DeadKernel"):
        run("study.yaml", "out", notebooks_dir="notebooks")


def test_interrupted_leaves_nothing(study, monkeypatch):
    def interrupted(notebook, copy, parameters, **_):
        copy.write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr("papermill.execute_notebook", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("study.yaml", "out", notebooks_dir="notebooks")
    assert list((study / "out" / "notebooks").iterdir()) == []


def test_nothing_to_run(study):
    with pytest.raises(ValueError, match=r"^base: no numbered notebook; .*make setup"):
        run("study.yaml", "out", notebooks_dir="base")


def test_a_study_without_questions_is_refused_before_any_notebook(study):
    text = (study / "study.yaml").read_text().replace("evaluation: {data: .}\n", "")
    (study / "study.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"study.yaml: .*add evaluation: \{data: FOLDER\}"):
        run("study.yaml", "out", notebooks_dir="notebooks")
    assert not (study / "out").exists()


def test_merged_models_go_to_the_runs_own_folder(study, instant, capsys):
    path = write_notebook(study / "notebooks", "02_third")
    path.write_text(path.read_text().replace("import pathlib", "merged_dir = 0\\nimport pathlib"))
    (study / "out" / "merged").mkdir(parents=True)
    executed = run("study.yaml", "out", "cpu", "notebooks")
    given = [nbformat.read(path, 4).metadata["papermill"]["parameters"] for path in executed]
    assert [x.get("merged_dir") for x in given] == [None, None, "../out/merged"]
    assert "merged models:       out/merged" in capsys.readouterr().out
