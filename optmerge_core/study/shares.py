"""Who merges which parts of a plan: by what they cost. Imports nothing slow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

ALL_GPUS = "cuda:all"
"""The device that is all GPUs of a machine, which nothing that computes on one takes."""

if TYPE_CHECKING:
    from optmerge_core.merging.plan import MergePlan


def share_of(plan: MergePlan, worker: int, workers: int) -> list[int]:
    """The numbers of the parts that one of `workers`, counted from 0, merges, costly ones first."""
    if not 0 <= worker < workers:
        raise ValueError(f"worker {worker} of {workers}: workers are 0 to {workers - 1}")
    return shared_out(work_of(plan), workers)[worker]


def shared_out(work: Sequence[float], workers: int) -> list[list[int]]:
    """The numbers of each worker: the largest work first, to whoever has least to do."""
    todo, own = [0.0] * workers, [list[int]() for _ in range(workers)]
    for number in largest_first(work):
        least = todo.index(min(todo))
        todo[least] += work[number]
        own[least].append(number)
    return own


def work_of(plan: MergePlan) -> list[float]:
    """How much each part is, by decompositions (min²·max) and bytes."""
    from optmerge_core.merging.plan import MAX_PART_COST

    largest = max((part.bytes for part in plan.parts), default=0) or 1
    return [part.cost / MAX_PART_COST + part.bytes / largest for part in plan.parts]


def largest_first(work: Sequence[float]) -> list[int]:
    """The numbers in this order, so that no large one is begun when all else is done."""
    return sorted(range(len(work)), key=lambda n: (-work[n], n))
