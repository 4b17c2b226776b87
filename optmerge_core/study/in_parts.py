"""One merge by many processes that share a folder: optmerge plan | part | join, and who does it.

The commands are for schedulers that start and retry them: each ends with 0 when what it was asked
for is done, by itself or before; with 75 when the same command may succeed later; with 1 when it
will not.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optmerge_core.study.shares import ALL_GPUS, share_of

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

    from optmerge_core.merging.report import MergeReport
    from optmerge_core.study.recipe import Recipe


def add_options(plan: ArgumentParser, commands: Any) -> None:
    """What `plan` takes beside what `merge` does, and the commands that follow it."""
    plan.add_argument("--plan", metavar="FILE", help="to write (default: DIR.plan.json)")
    plan.add_argument("--max-part-size", metavar="SIZE", help="of a part's file (default: 256MB)")
    text = "merge a part of a plan, or worker I's of N; what is finished is not done again"
    sub = commands.add_parser("part", help=text, description=text)
    sub.set_defaults(command=lambda o: merge_parts(o.plan, o.worker, o.workers))
    sub.add_argument("plan", metavar="PLAN", help="a file that `plan` wrote")
    sub.add_argument("worker", metavar="I", type=int, help="from 0")
    sub.add_argument("workers", metavar="N", type=int, nargs="?", help="how many workers there are")
    text = "put a plan's finished parts together: the output folder appears, whole"
    sub = commands.add_parser("join", help=text, description=text)
    sub.set_defaults(command=lambda o: join_parts(o.plan))
    sub.add_argument("plan", metavar="PLAN", help="a file that `plan` wrote")


def plan_recipe(recipe: Recipe, options: Namespace, settings: dict[str, Any]) -> Path:
    """Decide a recipe's merge into `options.output` and write the plan, beside it if not told."""
    from optmerge_core.merging.plan import plan_merge

    if recipe.merges == "modalities":
        raise ValueError(
            f"{recipe.name} merges modalities, whose specialists have no plan: use `merge` alone"
        )
    if options.max_part_size is not None:
        settings["max_part_size"] = options.max_part_size
    models = (recipe.base_model, recipe.experts, options.output)
    plan = plan_merge(*models, **settings, stream=options.stream)
    return plan.save(options.plan or f"{options.output}.plan.json")


def merge_by_many(recipe: Recipe, options: Namespace, settings: dict[str, Any]) -> MergeReport:
    """Plan, parts and join at once: on a cluster, or on all GPUs of this machine."""
    if options.cluster is not None:
        from optmerge_core.study.cluster import merge_on_cluster
        from optmerge_core.study.engine import check_device

        merge: Callable[[str], MergeReport] = partial(merge_on_cluster, address=options.cluster)
        check_device(options.device)
    else:
        from optmerge_core.runtime import all_gpus
        from optmerge_core.study.gpus import merge_on_gpus

        merge, settings = partial(merge_on_gpus, gpus=all_gpus()), settings | {"device": "cuda"}
    path = plan_recipe(recipe, options, settings)
    try:
        return merge(str(path))
    finally:
        path.unlink(missing_ok=True)


def check_one_device(device: str) -> None:
    """Raise `ValueError` for all GPUs, where notebooks and sweeps work on one."""
    if device == ALL_GPUS:
        raise ValueError(
            "--device cuda:all is for `merge` alone; give cuda, which with --cluster is a GPU for "
            "each task"
        )


def tell(path: Path) -> None:
    """What a plan holds, and how to go on with it."""
    from optmerge_core.merging.plan import load_plan

    plan = load_plan(path)
    count = len(plan.parts)
    print(
        f"{path}: {len(plan.parameters)} parameters in {count} parts. Where its inputs and "
        f"{plan.parts_folder} are seen, in any order: part {path} I, for I = 0 to {count - 1}, or "
        f"part {path} I N for each I of N workers; then once: join {path}"
    )


def merge_parts(path: str, worker: int, workers: int | None) -> None:
    """One part of a plan, number `worker`, or the share of one of `workers`: `share_of`."""
    from optmerge_core.merging.merge import joined, merge_part
    from optmerge_core.merging.plan import load_plan

    plan = load_plan(path)
    if workers is None and not 0 <= worker < len(plan.parts):
        raise ValueError(f"part {worker}: the plan has parts 0 to {len(plan.parts) - 1}")
    numbers = [worker] if workers is None else share_of(plan, worker, workers)
    if joined(plan) is not None:
        print(f"{plan.output_dir}: joined already")
        return
    for number in numbers:
        merge_part(plan, number)
    print(f"{plan.output_dir}: parts {', '.join(map(str, numbers)) or 'none'} are finished")


def join_parts(path: str) -> None:
    """The output folder of a plan whose parts are finished."""
    from optmerge_core.merging.merge import join
    from optmerge_core.merging.plan import load_plan

    report = join(load_plan(path))
    print(f"{report.output_dir}: {len(report.parameters)} parameters merged by {report.method}")
