"""The notebooks in order, for one recipe or several.

What has finished is not run again: a run that stopped goes on where it stopped. Figures and tables
go to one folder, the executed notebooks to another; the notebooks themselves are never changed.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from optmerge_core.errors import extra
from optmerge_core.places import checkout
from optmerge_core.study.agreement import agreement, committed, keep
from optmerge_core.study.index_page import write_contents, write_index
from optmerge_core.study.notebook_page import read_notebook
from optmerge_core.study.recipe import RecipeError, load_recipe


class NotebookError(ChildProcessError):
    """A notebook failed; the message names notebook, cell, error and the copy to read."""


def run(
    recipe_paths: str | Path | Sequence[str | Path],
    output_dir: str | Path | None = None,
    device: str = "auto",
    notebooks_dir: str | Path | None = None,
) -> list[Path]:
    """Execute the numbered notebooks on one or several recipes; returns the executed copies.

    With `output_dir`, a recipe's figures and tables go to `output_dir/figures` and the executed
    copies to `output_dir/notebooks` (of several recipes, to these in `output_dir/<name>`); without,
    to `figures/<name>` and `runs/<name>/notebooks` of the checkout. Each notebook is given
    `recipe`, `output_dir` (the folder of the figures) and `device`, the paths relative to the
    notebooks' folder, in which it runs as it does in JupyterLab. It runs on recipes that merge what
    its own does, capabilities or modalities. One whose parameters are `recipes` and `figure_dirs`
    compares: it runs once, after all others, on several recipes that merge capabilities, and is
    given the figures of the last that merges modalities if it has a parameter `omni_dir`. One that
    sets a study of its own beside them, `smol`, is left out, and that said, where that one's models
    are not built.

    Beside each study's executed copies lies `index.html`, which shows its notebooks, figures and
    tables; it is written anew after every notebook. Of several recipes in `output_dir`, one more
    leads to those.

    Last it says, of studies whose tables are committed, which claims agree with those.

    A notebook is skipped if its copy was made with the same parameters and is newer than the
    recipe, the notebook and every copy before it, since notebooks hand over through files.
    Raises `NotebookError` if one fails, `ValueError` if there is nothing to run.
    """
    if isinstance(recipe_paths, str | Path):
        recipe_paths = [recipe_paths]
    studies = _studies(recipe_paths)
    folder = Path(notebooks_dir or checkout() / "notebooks").resolve()
    for name in (*studies, "comparison"):
        keep(folder.parent, name)
    executed, figures = _run_studies(studies, folder, output_dir, device)
    for name, fresh in figures.items():
        for line in agreement(name, fresh, committed(folder.parent, name)):
            print(line)
    return executed


def _run_studies(
    studies: dict[str, tuple[Path, str]], folder: Path, output_dir: str | Path | None, device: str
) -> tuple[list[Path], dict[str, Path]]:
    """The notebooks in `folder` on all studies: the executed copies, and name -> its figures."""
    takes, comparing = _notebooks(folder)
    executed: list[Path] = []
    pages: dict[str, Path] = {}
    compared: dict[str, list[Path]] = {}  # name -> its executed copies
    figures: dict[str, Path] = {}

    def folders(name: str) -> tuple[Path, Path]:
        """Where figures and executed copies of a study go; its page is listed from now on."""
        if output_dir is None:
            return folder.parent / "figures" / name, folder.parent / "runs" / name / "notebooks"
        out = Path(output_dir).resolve() / (name if len(studies) > 1 else "")
        pages[name] = out / "index.html"
        if len(studies) > 1:
            write_contents(out.parent / "index.html", "Studies", pages)
        return out / "figures", out / "notebooks"

    for name, (path, merges) in studies.items():
        given = {"recipe": _relative(path, folder), "device": device}
        alone = [notebook for notebook, kind in takes.items() if kind == merges]
        if not alone:
            raise ValueError(f"{path.name}: no notebook in {_shown(folder)} merges {merges}")
        figures[name] = folders(name)[0]
        executed += (done := _run_all(name, alone, given, *folders(name), [path]))
        compared |= {name: done} if merges == "capabilities" else {}
    comparing = [n for n in comparing if len(compared) > 1 and _brings_its_study(n)]
    if comparing:
        recipes = [studies[name][0] for name in compared]
        given = {
            "recipes": [_relative(path, folder) for path in recipes],
            "figure_dirs": [_relative(folders(name)[0], folder) for name in compared],
            "device": device,
        }
        others = [figures[name] for name in studies if name not in compared]
        given |= {"omni_dir": _relative(others[-1], folder)} if others else {}
        executed += _run_all(
            "comparison", comparing, given, *folders("comparison"), recipes, executed
        )
        figures["comparison"] = folders("comparison")[0]
    return executed, figures


def _notebooks(folder: Path) -> tuple[dict[Path, str], list[Path]]:
    """The numbered notebooks: those of one recipe -> what they merge, and those that compare."""
    notebooks = sorted(folder.glob("[0-9]*.ipynb"))
    if not notebooks:
        raise ValueError(
            f"{_shown(folder)}: no numbered notebook; `run` needs a checkout of the repository "
            "installed with `make setup`, not the package alone"
        )
    comparing = [notebook for notebook in notebooks if _parameter(notebook, "recipes")]
    return {path: _merges(path) for path in notebooks if path not in comparing}, comparing


def _studies(recipe_paths: Sequence[str | Path]) -> dict[str, tuple[Path, str]]:
    """Name -> (recipe, what it merges). Raises `ValueError` for what the notebooks cannot run."""
    studies: dict[str, tuple[Path, str]] = {}
    for path in map(Path, recipe_paths):
        recipe = load_recipe(path)
        name = recipe.name
        if name in studies:
            other = studies[name][0].name
            raise ValueError(f"{path}: the name {name!r} is {other}'s too; rename one")
        if recipe.merges == "capabilities" and recipe.evaluation.data is None:
            raise ValueError(
                f"{path}: the notebooks ask questions: add evaluation: {{data: FOLDER}}, with "
                "data/benchmark/questions or your own as in README.md; `inspect`, `merge` and "
                "`run --sweep` need none"
            )
        if recipe.merges == "capabilities":
            from optmerge_core.study.side_files import check_askable  # takes torch

            check_askable(recipe)
        studies[name] = path.resolve(), recipe.merges
    return studies


def _run_all(
    title: str,
    notebooks: list[Path],
    parameters: dict[str, Any],
    figures: Path,
    copies: Path,
    recipes: list[Path],
    inputs: list[Path] = (),
) -> list[Path]:
    """Run the notebooks in order, one table of seconds and one page.

    A recipe or another input that is newer makes a copy out of date.
    """
    figures.mkdir(parents=True, exist_ok=True)
    copies.mkdir(parents=True, exist_ok=True)
    merged = copies.parent / "merged"
    parameters = parameters | {
        name: _relative(path, notebooks[0].parent)
        for name, path in {"output_dir": figures, "merged_dir": merged}.items()
    }
    table = Table("notebook", title=title)
    table.add_column("seconds", justify="right")
    executed = []
    newest_input = max(path.stat().st_mtime for path in (*recipes, *inputs))

    def page() -> Path:
        there = copies.parent / "index.html"
        return write_index(there, title, notebooks, copies, figures, recipes)

    page()
    for notebook in tqdm(notebooks, desc=title, unit="notebook"):
        copy = copies / notebook.name
        given = {name: value for name, value in parameters.items() if _parameter(notebook, name)}
        newest_input = max(newest_input, notebook.stat().st_mtime)
        if _finished(copy, newest_input, given):
            table.add_row(notebook.name, "done before")
        else:
            start = time.perf_counter()
            try:
                _execute(notebook, copy, given)
            finally:
                page()
            table.add_row(notebook.name, f"{time.perf_counter() - start:.1f}")
        newest_input = max(newest_input, copy.stat().st_mtime)
        executed.append(copy)

    console = Console(soft_wrap=True, highlight=False)
    console.print(table)
    console.print(f"figures and tables:  {_shown(figures)}")
    console.print(f"executed notebooks:  {_shown(copies)}")
    if merged.is_dir():
        console.print(f"merged models:       {_shown(merged)}")
    console.print(f"all of it, to read:  {_shown(page())}")
    return executed


def _parameter(notebook: Path, name: str) -> str | None:
    """The source of a parameter's default, None if the notebook has no such parameter."""
    cells = read_notebook(notebook).cells
    tagged = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    found = re.search(rf"^{name}\s*=\s*([^#\n]*)", "\n".join(tagged), re.MULTILINE)
    return found and found[1].strip()


def _merges(notebook: Path) -> str:
    """What the notebook's own recipe merges, "capabilities" where it names none that is there."""
    own = notebook.parent / (_parameter(notebook, "recipe") or "").strip("'\"")
    return load_recipe(own).merges if own.is_file() else "capabilities"


def _brings_its_study(notebook: Path) -> bool:
    """Whether the models of the recipe `smol` are there, if the notebook has that parameter."""
    beside = (_parameter(notebook, "smol") or "").strip("'\" ")
    try:
        return not beside or bool(load_recipe(notebook.parent / beside))
    except RecipeError as error:
        print(f"{notebook.name} is left out: {error}")
        return False


def _execute(notebook: Path, copy: Path, parameters: dict[str, Any]) -> None:
    """Run one notebook; `copy` exists afterwards only if every cell has run without an error."""
    with extra("notebooks"):
        import papermill  # takes a second
        from ipykernel.kernelspec import get_kernel_dict
        from jupyter_client.kernelspec import KernelSpec
        from jupyter_client.manager import AsyncKernelManager
        from traitlets.config import Config

    class ThisInterpreter(AsyncKernelManager):
        """A kernel that is this Python, whatever kernels of the same name are installed where."""

        kernel_spec = property(lambda self: KernelSpec(resource_dir="", **get_kernel_dict()))

    partial = copy.with_suffix(".partial.ipynb")
    failed = copy.with_suffix(".failed.ipynb")
    for old in (copy, failed):
        old.unlink(missing_ok=True)
        old.with_suffix(".html").unlink(missing_ok=True)
    try:
        papermill.execute_notebook(
            notebook,
            partial,
            parameters,
            kernel_name="python3",
            kernel_manager_class=ThisInterpreter,
            language="python",
            progress_bar={"desc": notebook.stem, "leave": False},
            cwd=notebook.parent,
            # Other users of the machine cannot listen, and no kernel warns that they could.
            config=Config(KernelManager={"transport_encryption": "auto"}),
        )
        partial.replace(copy)
    except Exception as error:
        # A cell's own error, but also a kernel that died or did not start.
        if not partial.exists():
            raise NotebookError(f"{notebook.name} could not be started: {error}") from error
        partial.replace(failed)
        name = getattr(error, "ename", type(error).__name__)
        text = " ".join(str(getattr(error, "evalue", error)).split())
        raise NotebookError(
            f"{notebook.name}, {_last_cell(failed)}: {name}: {text} "
            f"(the notebook up to there: {_shown(failed)})"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _finished(copy: Path, newest_input: float, parameters: dict[str, Any]) -> bool:
    if not copy.exists() or copy.stat().st_mtime < newest_input:
        return False
    metadata = read_notebook(copy).metadata.get("papermill", {})
    return metadata.get("parameters") == parameters and metadata.get("exception") is None


def _last_cell(copy: Path) -> str:
    """The last code cell that was started, by its number and its first line."""
    cells = [
        cell
        for cell in read_notebook(copy).cells
        if cell.cell_type == "code" and cell.metadata.get("papermill", {}).get("start_time")
    ]
    if not cells:
        return "before its first cell"
    lines = re.sub(r"^\s*(#.*)?\n", "", cells[-1].source, flags=re.MULTILINE).splitlines()
    return f"cell {len(cells)} ({lines[0].strip() if lines else 'empty'})"


def _relative(path: Path, start: Path) -> str:
    """Relative, so that an executed copy tells nothing of the computer it was made on."""
    return Path(os.path.relpath(path, start)).as_posix()


def _shown(path: Path) -> str:
    """Relative to the working directory if the path is inside it."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
