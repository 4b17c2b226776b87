"""What a notebook's first cell checks before anything slow begins; nothing here imports torch.

A path that is read (`recipe`, `smol`, `figure_dirs`, `omni_dir`) is looked for from the working
directory, then from the repository's notebooks/. A path that is written is the working directory's.
One that is None is the repository's, wherever the kernel works: figures/<name of the recipe>,
runs/<name>/merged.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from optmerge_core.places import in_checkout
from optmerge_core.study.recipe import Recipe, read_recipe

WRITTEN = {
    "output_dir": "figures/{}",
    "merged_dir": "runs/{}/merged",
    "retrained_dir": "runs/{}/retrained",
}
"""Folder that a notebook writes -> its place in the repository where none is given."""
READ = {"omni_dir": ("figures/omni", "table05_modalities.csv", "04_omni_composition")}
"""Folder that one reads -> its place, a file that must be there, the notebook that writes it."""


def checked(
    namespace: Mapping[str, Any],
    *names: str,
    merges: str = "capabilities",
    questions: bool = False,
    needs: Mapping[str, str] | None = None,
    beside: Mapping[str, str] | None = None,
) -> tuple[Any, ...]:
    """The notebook's parameters in the order of `names`, their paths found.

    namespace: the notebook's globals(); names: the parameters that it has; merges: what its recipe
    must merge; questions: whether it asks any; needs: file -> the notebook that writes it, of the
    same recipe; beside: the same, of notebooks that write into this one's `output_dir`. Raises
    `ValueError` in one sentence for whatever would stop the notebook later on.
    """
    _check_names(namespace, names)
    given = {name: namespace[name] for name in names}
    for name, value in given.items():
        _check_value(name, value)
    several = "recipes" in given
    paths = [_found(path) for path in (given["recipes"] if several else [given["recipe"]])]
    if "smol" in given:
        given["smol"] = _found(given["smol"])
        _check_recipe(given["smol"], read_recipe(given["smol"]), merges, True)
    recipes = [read_recipe(path) for path in paths]
    for path, recipe in zip(paths, recipes, strict=True):
        _check_recipe(path, recipe, merges, questions)
    given |= {"recipes": paths} if several else {"recipe": paths[0]}
    title = "comparison" if several else recipes[0].name
    for name in given.keys() & WRITTEN.keys():
        given[name] = given[name] or in_checkout(WRITTEN[name].format(title))
        _check_writable(name, Path(given[name]))
    read = [given["output_dir"]]
    if several:
        read = given["figure_dirs"] or [in_checkout(f"figures/{recipe.name}") for recipe in recipes]
        if len(read) != len(paths):
            raise ValueError(f"figure_dirs: {len(read)} folders for {len(paths)} recipes")
        given["figure_dirs"] = read = [_found(folder) for folder in read]
    for name in given.keys() & READ.keys():
        place, file, notebook = READ[name]
        given[name] = _found(given[name] or in_checkout(place))
        _check_needs([given[name]], ["its recipe"], {file: notebook})
    _check_needs(read, paths, needs or {})
    _check_needs([given.get("output_dir")], ["the same recipes"], beside or {})
    return tuple(given[name] for name in names)


def _check_names(namespace: Mapping[str, Any], names: Sequence[str]) -> None:
    """The names are all there, and papermill has injected no other.

    It takes a misspelt one with a warning; what it injected begins with its comment, and IPython
    keeps the source of every cell it has run in `In`.
    """
    cells = [text for text in namespace.get("In", []) if text.startswith("# Parameters\n")]
    injected = [
        target.id
        for text in cells
        for node in ast.parse(text).body
        if isinstance(node, ast.Assign)
        for target in node.targets
    ]
    for name in injected:
        if name not in names:
            close = get_close_matches(name, names, 1, 0)[0]
            raise ValueError(
                f"{name} is no parameter of this notebook; did you mean {close}? "
                f"It has {', '.join(names)}"
            )
    for name in names:
        if name not in namespace:
            raise ValueError(f"{name} is not set: run the cell of parameters, which sets it, first")


def _check_value(name: str, value: Any) -> None:
    text = isinstance(value, str | os.PathLike) and str(value) != ""
    if name == "device":
        valid = isinstance(value, str) and re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps", value)
        asked = 'give "auto", "cpu", "cuda" or one of several such as "cuda:1"'
    elif name == "retrain":
        valid, asked = isinstance(value, bool), "give True or False"
    elif name in ("recipes", "figure_dirs"):
        all_texts = isinstance(value, list) and all(isinstance(x, str | os.PathLike) for x in value)
        valid = value is None and name == "figure_dirs" or all_texts and value
        asked = "give a list of paths"
    else:
        valid = text or value is None and name in WRITTEN.keys() | READ.keys()
        asked = "give a path" + " or None" * (name not in ("recipe", "smol"))
    if not valid:
        raise ValueError(f"{name} = {value!r}: {asked}")
    if str(value).startswith("cuda"):
        from optmerge_core.runtime import parse_device  # torch knows whether there is one

        parse_device(value)


def _found(path: str | os.PathLike) -> str:
    """A path that is read, from the working directory or else from the repository's notebooks/."""
    if Path(path).exists() or Path(path).is_absolute():
        return str(path)
    beside_notebooks = in_checkout(Path("notebooks", path))
    return beside_notebooks if Path(beside_notebooks).exists() else str(path)


def _check_recipe(path: str, recipe: Recipe, merges: str, questions: bool) -> None:
    if recipe.merges != merges:
        suits = "notebook 04" if recipe.merges == "modalities" else "any notebook but 04"
        raise ValueError(
            f"{path} merges {recipe.merges}, this notebook merges {merges}; run {suits} on it"
        )
    data = recipe.evaluation.data
    if questions and not data:
        raise ValueError(
            f"{path}: this notebook asks questions; add evaluation: {{data: FOLDER}}, with "
            "data/benchmark/questions or your own as in README.md"
        )
    for split in ("validation", "test") if questions else ():
        if not any(Path(data, split).glob("*.parquet")):
            raise ValueError(f"{path}: evaluation.data: {data}/{split} has no <task>.parquet")


def _check_writable(name: str, folder: Path) -> None:
    """Nothing is made here: a refused notebook leaves no empty folder."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        why = "may not be written" if there.is_dir() else "is a file"
        raise ValueError(f"{name} = {str(folder)!r}: {there} {why}; give another folder")


def _check_needs(folders: Sequence[str], recipes: Sequence[str], needs: Mapping[str, str]) -> None:
    for folder, recipe in zip(folders, recipes, strict=True):
        for file, notebook in needs.items():
            if not Path(folder, file).is_file():
                raise ValueError(
                    f"{folder} has no {file}: run notebook {notebook} on {recipe} with this folder "
                    f"first, or all in order with `python -m optmerge_core run {recipe}`"
                )
