"""Merges, sweeps and runs on many machines: what their tasks are, for `engine`.

All that the machines share is a folder, or with streamed inputs the hub.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optmerge_core.checkpoints.parts import part_file
from optmerge_core.merging.merge import join, joined, merge_part
from optmerge_core.merging.plan import MergePlan, load_plan
from optmerge_core.study.engine import Task, run_tasks
from optmerge_core.study.recipe import load_recipe
from optmerge_core.study.shares import work_of
from optmerge_core.study.sweep import NAME, Point, points, read_points, write_points

if TYPE_CHECKING:
    from optmerge_core.merging.report import MergeReport

PROCESS, STUDY = 5 * 10**8, 2 * 10**9
"""Bytes of a worker that has imported torch, and of one with a small study's models."""


def merge_on_cluster(path: str, address: str) -> MergeReport:
    """Merge the parts of a plan that are not finished, then join them.

    path: a plan's file, which all machines see, as they see its inputs and its output's folder.
    Byte for byte what one process makes. Raises as `merge_part` and `join` do; what is finished
    stays, and the same call goes on from there.
    """
    plan = load_plan(path)
    if joined(plan) is None:
        tasks = part_tasks(plan, path)
        run_tasks(tasks, address, f"merging ({plan.method})", plan.device)
    return join(plan)


def part_tasks(plan: MergePlan, path: str) -> list[Task]:
    """A plan's unfinished parts: work by decompositions and bytes, memory by the largest matrix."""
    tasks, work = [], work_of(plan)
    for number in range(len(plan.parts)):
        if part_file(plan.parts_folder, number).is_file():
            continue
        where = f"{merge_planned.__module__}:{merge_planned.__name__}"
        tasks.append(Task(where, (path, number), work[number], plan.memory(number) + PROCESS))
    return tasks


def merge_planned(path: str, number: int) -> None:
    """One part, by whoever reads the plan's file."""
    merge_part(load_plan(path), number)


def sweep_on_cluster(
    share: str,
    recipes: Sequence[str],
    axes: Mapping[str, Sequence[Any]],
    output: str,
    device: str,
    address: str,
) -> None:
    """The points of a sweep that are not finished, those of one merge together as a task.

    share: module:name of what sweeps (recipe, axes, folder, device). Every task has a folder in
    `output`/parts for its table; all rows are then in the sweep's own, which `sweep` reads.
    """
    paths = {load_recipe(path).name: str(path) for path in recipes}
    tables = Path(output, "figures", f"{NAME}.csv")
    rows = read_points(tables)
    groups: dict[tuple[Any, ...], list[Point]] = {}
    for point in points(recipes, axes):
        if point.key not in rows:
            groups.setdefault(point.key[:3], []).append(point)
    tasks, folders = [], []
    for key, group in groups.items():
        own = {name: [group[0].options[name]] for name in axes if name not in ("method", "lambda")}
        own |= {"method": [group[0].method], "lambda": [p.scaling_coefficient for p in group]}
        folders.append(Path(output, "parts", hashlib.sha256(repr(key).encode()).hexdigest()[:12]))
        given = (paths[group[0].recipe.name], own, str(folders[-1]), device)
        tasks.append(Task(share, given, len(group), STUDY))
    run_tasks(tasks, address, "sweep", device)
    for folder in folders:
        rows |= read_points(folder / "figures" / f"{NAME}.csv")
    if tasks:
        tables.parent.mkdir(parents=True, exist_ok=True)
        write_points(tables, rows)
    shutil.rmtree(Path(output, "parts"), ignore_errors=True)


def run_on_cluster(recipes: Sequence[str], output: str | None, device: str, address: str) -> None:
    """The notebooks of several recipes, those of one recipe as a task.

    Where `run` puts them, which then finds them finished and compares the studies.
    """
    several = output is not None and len(recipes) > 1
    tasks = [
        Task(
            "optmerge_core.study.notebooks:run",
            (path, str(Path(output, load_recipe(path).name)) if several else output, device),
            1.0,
            STUDY,
        )
        for path in map(str, recipes)
    ]
    run_tasks(tasks, address, "running", device)
