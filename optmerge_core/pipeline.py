"""The notebooks in order for one recipe.

What has finished is not run again: a run that stopped goes on where it stopped. Figures and tables
go to one folder, the executed notebooks to another; the notebooks themselves are never changed.
"""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Any

import nbformat
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from optmerge_core.recipe import load_recipe

CHECKOUT = Path(__file__).resolve().parents[1]


class NotebookError(RuntimeError):
    """A notebook failed; the message names notebook, cell, error and the copy to read."""


def run(
    recipe_path: str | Path,
    output_dir: str | Path | None = None,
    device: str = "auto",
    notebooks_dir: str | Path | None = None,
) -> list[Path]:
    """Execute the numbered notebooks on a recipe; returns the executed copies, in order.

    With `output_dir`, figures and tables go to `output_dir/figures` and the executed copies to
    `output_dir/notebooks`. Without it they go to `figures/<name>` and `runs/<name>/notebooks` of
    the checkout, `name` being the recipe's. Each notebook is given `recipe`, `output_dir` (the
    folder of the figures) and `device`, the paths relative to the notebooks' folder, in which it
    runs as it does in JupyterLab.

    A notebook is skipped if its copy was made with the same parameters and is newer than the
    recipe, the notebook and every copy before it, since notebooks hand over through files.
    Raises `NotebookError` if one fails, `ValueError` if there is nothing to run.
    """
    recipe_path = Path(recipe_path).resolve()
    recipe = load_recipe(recipe_path)
    folder = Path(notebooks_dir or CHECKOUT / "notebooks").resolve()
    notebooks = sorted(folder.glob("[0-9]*.ipynb"))
    if not notebooks:
        raise ValueError(
            f"{_shown(folder)}: no numbered notebook; `run` needs a checkout of the repository "
            "installed with `make setup`, not the package alone"
        )
    if output_dir is None:
        figures = folder.parent / "figures" / recipe.name
        copies = folder.parent / "runs" / recipe.name / "notebooks"
    else:
        figures = Path(output_dir).resolve() / "figures"
        copies = Path(output_dir).resolve() / "notebooks"
    figures.mkdir(parents=True, exist_ok=True)
    copies.mkdir(parents=True, exist_ok=True)
    parameters = {
        "recipe": _relative(recipe_path, folder),
        "output_dir": _relative(figures, folder),
        "device": device,
    }

    table = Table("notebook", title=f"{recipe.name}: {_shown(recipe_path)}")
    table.add_column("seconds", justify="right")
    executed = []
    newest_input = recipe_path.stat().st_mtime
    for notebook in tqdm(notebooks, desc="notebooks", unit="notebook"):
        copy = copies / notebook.name
        newest_input = max(newest_input, notebook.stat().st_mtime)
        if _finished(copy, newest_input, parameters):
            table.add_row(notebook.name, "done before")
        else:
            start = time.perf_counter()
            _execute(notebook, copy, parameters)
            table.add_row(notebook.name, f"{time.perf_counter() - start:.1f}")
        newest_input = max(newest_input, copy.stat().st_mtime)
        executed.append(copy)

    console = Console(soft_wrap=True, highlight=False)
    console.print(table)
    console.print(f"figures and tables:  {_shown(figures)}")
    console.print(f"executed notebooks:  {_shown(copies)}")
    return executed


def _execute(notebook: Path, copy: Path, parameters: dict[str, Any]) -> None:
    """Run one notebook; `copy` exists afterwards only if every cell has run without an error."""
    import papermill  # takes a second, and only this command needs it
    from traitlets.config import Config

    partial = copy.with_suffix(".partial.ipynb")
    failed = copy.with_suffix(".failed.ipynb")
    for old in (copy, failed):
        old.unlink(missing_ok=True)
    try:
        papermill.execute_notebook(
            notebook,
            partial,
            parameters,
            kernel_name="python3",
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
    metadata = nbformat.read(copy, as_version=4).metadata.get("papermill", {})
    return metadata.get("parameters") == parameters and metadata.get("exception") is None


def _last_cell(copy: Path) -> str:
    """The last code cell that was started, by its number and its first line."""
    cells = [
        cell
        for cell in nbformat.read(copy, as_version=4).cells
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
