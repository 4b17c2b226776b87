"""A sweep: methods, options and scaling coefficients over one or several recipes, in one table.

Every point is kept in a CSV as soon as it is finished, and not computed again. A method's merged
task vector is computed once for all of its scaling coefficients.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm.auto import tqdm

from optmerge_core import figures
from optmerge_core.merging.checks import check_method
from optmerge_core.merging.varied import number
from optmerge_core.methods.interference import interference
from optmerge_core.methods.registry import METHODS
from optmerge_core.runtime import named_device, parse_device
from optmerge_core.study.index_page import write_index
from optmerge_core.study.open import open_study, settings_in_memory
from optmerge_core.study.parsing import numeric, parse
from optmerge_core.study.recipe import Recipe, load_recipe
from optmerge_core.task_vectors.stack import TaskVectors

NAME = "tablexx_sweep"
KEYS = ["recipe", "method", "options", "scaling_coefficient"]
DATA_FREE = ["interference_loss", "norm", "seconds"]
LATER = ("thresholds", "generator", "on_step", "base")
"""Keywords of methods that no recipe can give."""

Weights = Mapping[str, Tensor]
Score = Callable[[Weights, Weights, float], Mapping[str, float]]
"""(base, merged task vector, scaling coefficient) -> accuracy per task, and "Avg", in per cent."""


@dataclass(frozen=True)
class Point:
    """One row of the table: a recipe with its method, options and scaling coefficient replaced."""

    recipe: Recipe
    settings: str  # of all else in the recipe that decides what comes out, as a hash
    method: str
    options: dict[str, Any]
    scaling_coefficient: float

    @property
    def key(self) -> tuple[str, str, str, float, str]:
        options = ", ".join(f"{name}={value}" for name, value in sorted(self.options.items()))
        return self.recipe.name, self.method, options, self.scaling_coefficient, self.settings


def parse_axes(texts: Iterable[str]) -> dict[str, list[Any]]:
    """`["method=ties,tsv", "lambda=0.3,1"]` -> {"method": ["ties", "tsv"], "lambda": [0.3, 1]}.

    Values are YAML's. Raises `ValueError` for a text of another form or a name given twice.
    """
    axes: dict[str, list[Any]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        parts = [part.strip() for part in values.split(",")]
        if not (name and equals and all(parts)):
            raise ValueError(f"--sweep {text!r}: write NAME=VALUE,VALUE, such as lambda=0.3,0.7,1")
        if name in axes:
            raise ValueError(f"--sweep {name}: given twice; write all values after one {name}=")
        try:
            axes[name] = [numeric(parse(part)) for part in parts]
        except yaml.YAMLError as error:
            raise ValueError(f"--sweep {text!r}: not values YAML can read") from error
        except ValueError as error:
            raise ValueError(f"--sweep {text!r}: {error}") from error
    return axes


def points(recipe_paths: Sequence[str | Path], axes: Mapping[str, Sequence[Any]]) -> list[Point]:
    """The product of the axes over the recipes, each recipe's own where an axis is not given.

    Axes are `method`, `lambda` (the scaling coefficient) and options of methods. What a method does
    not have is left out with a warning; `ValueError` for names and values that nothing understands.
    """
    known = {n for method in METHODS.values() for n in signature(method).parameters}
    known -= {"task_vectors", *LATER}
    others = [name for name in axes if name not in ("method", "lambda")]
    for name in others:
        if name not in known:
            raise ValueError(
                f"--sweep {name}: no method has this option; give method, lambda or one of "
                + ", ".join(sorted(known))
            )
    found: dict[tuple, Point] = {}
    left_out: dict[str, None] = {}
    names: dict[str, Path] = {}
    for path in map(Path, recipe_paths):
        recipe = load_recipe(path)
        if recipe.name in names:
            raise ValueError(f"{path}: the name {recipe.name!r} is {names[recipe.name]}'s too")
        names[recipe.name] = path
        for method in axes.get("method", [recipe.merge_method]):
            method = recipe.method(str(method))
            missing = [name for name in others if name not in signature(METHODS[method]).parameters]
            if missing:
                left_out[f"{method} has no {' or '.join(missing)}"] = None
                continue
            for values in itertools.product(*(axes[name] for name in others)):
                options = settings_in_memory(recipe, method)["method_options"]
                options |= dict(zip(others, values, strict=True))
                check_method(method, options, len(recipe.experts))
                for value in axes.get("lambda", [recipe.scaling_coefficient]):
                    scaling = float(number("lambda", value))
                    point = Point(recipe, _settings(path), method, options, scaling)
                    found[point.key] = point
    if left_out:
        warnings.warn(f"left out of the sweep: {'; '.join(left_out)}", stacklevel=2)
    if not found:
        raise ValueError("--sweep: no point is left; the methods have none of these options")
    return list(found.values())


def sweep(
    recipe_paths: Sequence[str | Path],
    axes: Mapping[str, Sequence[Any]],
    output_dir: str | Path,
    device: str = "auto",
    score_of: Callable[[Recipe], Score | None] = lambda recipe: None,
) -> pd.DataFrame:
    """Merge in memory and evaluate every point; returns one row a point, in the axes' order.

    Columns: recipe, method, options, scaling_coefficient (λ); what `score_of(recipe)` computes, if
    it is not None; interference_loss (Eq. 1, of λ·τm, on matrices) and norm (‖λ·τm‖F), over all
    merged layers; seconds (of the merge, for all its λ).

    `output_dir/figures/tablexx_sweep.csv` holds all points ever finished there, the `.md` those
    of this sweep, and `output_dir/index.html` shows them. A point of a recipe that has changed
    otherwise since is computed again. Merged task vectors are held whole, in float32.
    """
    named_device(device)
    wanted = points(recipe_paths, axes)
    folder = Path(output_dir) / "figures"
    path = folder / f"{NAME}.csv"
    settings = {point.recipe.name: point.settings for point in wanted}
    rows = {
        key: row for key, row in read_points(path).items() if settings.get(key[0], key[4]) == key[4]
    }
    folder.mkdir(parents=True, exist_ok=True)
    pending = [point for point in wanted if point.key not in rows]
    device = str(parse_device(device)) if pending else device
    progress = tqdm(total=len(wanted), initial=len(wanted) - len(pending), desc="sweep")
    with progress:
        for _, same in itertools.groupby(pending, key=lambda point: point.recipe.name):
            for key, row in _study(list(same), device, score_of):
                rows[key] = row
                write_points(path, rows)
                progress.update()
    table = _table([rows[point.key] for point in wanted])
    text = figures.markdown(readable(table).set_index("recipe"), decimals=3)
    (folder / f"{NAME}.md").write_text(text, encoding="utf-8")
    copies = Path(output_dir, "notebooks")
    executed = sorted(copy for copy in copies.glob("[0-9]*.ipynb") if copy.suffixes == [".ipynb"])
    recipes = list(map(Path, recipe_paths))
    write_index(
        Path(output_dir, "index.html"), Path(output_dir).name, executed, copies, folder, recipes
    )
    return table


def show(table: pd.DataFrame, output_dir: str | Path) -> None:
    """The table on the terminal, as wide as it is, and where to read on."""
    table = readable(table)
    shown = Table(title="validation accuracy (%), and what needs no data")
    for name in table:
        text = name in ("recipe", "method", "options")
        shown.add_column(name, justify="left" if text else "right")
    for row in table.itertuples(index=False):
        texts = (f"{x:.4g}" if isinstance(x, float) else str(x) for x in row)
        shown.add_row(*("–" if text == "nan" else text for text in texts))
    Console(width=1000, soft_wrap=True, highlight=False).print(shown)
    print(f"to read: {output_dir}/index.html; all points: {output_dir}/figures")


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """The table with its columns named as in the paper's tables."""
    names = {name: name.replace("_", " ") for name in DATA_FREE}
    return table.rename(columns=names | {"scaling_coefficient": "λ"})


def _study(
    pending: list[Point], device: str, score_of: Callable[[Recipe], Score | None]
) -> Iterable[tuple[tuple, dict[str, Any]]]:
    """The rows of one recipe's points, as they are finished."""
    recipe = pending[0].recipe
    study, score = open_study(recipe), score_of(recipe)
    task_vectors = study.task_vectors(device)
    for _, group in itertools.groupby(pending, key=lambda point: point.key[:3]):
        group = list(group)
        method, options = group[0].method, group[0].options
        start = time.perf_counter()
        merged = study.merge_tensors(method, method_options=options, device=device)
        seconds = time.perf_counter() - start
        measure = _data_free(task_vectors, merged)
        for point in group:
            scores = score(study.base, merged, point.scaling_coefficient) if score else {}
            row = dict(zip([*KEYS, "settings"], point.key, strict=True)) | dict(scores)
            yield point.key, row | measure(point.scaling_coefficient) | {"seconds": seconds}


def _data_free(task_vectors: TaskVectors, merged: Weights) -> Callable[[float], dict[str, float]]:
    """λ -> interference_loss and norm of λ·τm: the loss is quadratic in λ, so read once for all."""
    quadratic = linear = constant = square = 0.0
    for name in tqdm(task_vectors, desc="interference", unit="parameter", leave=False):
        tau = merged[name].to(task_vectors.device)
        square += torch.sum(tau.double() ** 2).item()
        if tau.ndim == 2:
            stack = task_vectors[name]
            form = interference(stack, stack, stack)
            quadratic += torch.sum(tau * form.times_C(tau)).item()
            linear += torch.sum(tau * form.D).item()
            constant += form.constant
    return lambda scaling: {
        "interference_loss": scaling**2 * quadratic - 2 * scaling * linear + constant,
        "norm": abs(scaling) * square**0.5,
    }


def _settings(path: Path) -> str:
    """A hash of what the recipe says but for its method, options and scaling coefficients."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    swept = ("merge_method", "parameters", "method_options", "scaling_coefficients", "dtype")
    rest = {key: value for key, value in content.items() if key not in swept}
    text = json.dumps(rest, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def read_points(path: Path) -> dict[tuple, dict[str, Any]]:
    """The finished points: key -> row. A file that is none of ours is a `ValueError`."""
    if not path.is_file():
        return {}
    texts = dict.fromkeys(["recipe", "method", "options", "settings"], str)
    try:
        table = pd.read_csv(path, dtype=texts)
        table[list(texts)] = table[list(texts)].fillna("")
        keys = list(table[[*KEYS, "settings"]].itertuples(index=False, name=None))
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: not the table of a sweep; move it away") from error
    rows = [row.dropna().to_dict() for _, row in table.iterrows()]
    return dict(zip(keys, rows, strict=True))


def write_points(path: Path, rows: Mapping[tuple, dict[str, Any]]) -> None:
    """Replaced at once, so that an interruption leaves a whole file."""
    partial = path.with_suffix(".partial")
    _table(rows.values(), keep=("settings",)).to_csv(partial, index=False)
    partial.replace(path)


def _table(rows: Iterable[dict[str, Any]], keep: Sequence[str] = ()) -> pd.DataFrame:
    """Columns in their order: what a point is, its accuracies, what needs no data."""
    table = pd.DataFrame(list(rows))
    fixed = {*KEYS, *DATA_FREE, "settings", "Avg"}
    tasks = [name for name in table if name not in fixed]
    average = ["Avg"] if "Avg" in table else []
    return table[[*KEYS, *tasks, *average, *DATA_FREE, *keep]]
