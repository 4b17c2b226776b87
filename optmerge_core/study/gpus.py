"""A merge on all GPUs of one machine: a process for each, which sees no other.

What a GPU computes is then what one GPU alone would compute, and a process that dies takes nothing
with it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections import Counter, deque
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from optmerge_core.checkpoints.formats import CheckpointError
from optmerge_core.checkpoints.parts import part_file, remove_parts
from optmerge_core.merging.merge import join, joined, merge_part
from optmerge_core.merging.plan import MergePlan, load_plan
from optmerge_core.study.shares import largest_first, work_of

if TYPE_CHECKING:
    from optmerge_core.merging.report import MergeReport

TRIES = 3
"""How often a part is given to a new process after its own has died."""


def merge_on_gpus(path: str, gpus: list[str]) -> MergeReport:
    """Merge a plan's unfinished parts on all GPUs, then join them.

    path: a plan's file, of the device cuda; gpus: as `all_gpus` names them. The costliest part goes
    first, each to the GPU that is free first. Byte for byte what one GPU makes. Raises as
    `merge_part` and `join` do, and `ChildProcessError` where processes die; what is finished stays,
    and the same call goes on from there.
    """
    plan = load_plan(path)
    if joined(plan) is None:
        done = [n for n in range(len(plan.parts)) if part_file(plan.parts_folder, n).is_file()]
        todo = deque(n for n in largest_first(work_of(plan)) if n not in done)
        label = f"merging ({plan.method}) on {len(gpus)} GPUs"
        with tqdm(total=len(plan.parts), initial=len(done), desc=label, unit="part") as bar:
            try:
                _share_out(path, todo, gpus, bar)
            except ValueError as error:
                if not isinstance(error, CheckpointError):  # what others finished since
                    remove_parts(plan.parts_folder)
                raise
    return join(plan)


class Worker:
    """The process of one GPU, and the part that it merges."""

    def __init__(self, path: str, gpu: str):
        spawning = multiprocessing.get_context("spawn")  # CUDA outlives no fork
        self.gpu, self.part = gpu, -1
        self.connection, other = spawning.Pipe()
        self.process = spawning.Process(target=_work, args=(other, path, gpu), daemon=True)
        self.process.start()
        other.close()

    def give(self, part: int) -> None:
        self.part = part
        with suppress(BrokenPipeError):  # it has died, which `_share_out` sees
            self.connection.send(part)

    def end(self) -> None:
        self.process.kill()  # what it has half done is no part
        self.process.join()
        self.connection.close()


def _share_out(path: str, todo: deque[int], gpus: list[str], bar: tqdm) -> None:
    """`todo` in its order, each to the first that is free."""
    workers: dict[Connection, Worker] = {}
    died: Counter[int] = Counter()

    def start(gpu: str) -> None:
        worker = Worker(path, gpu)
        workers[worker.connection] = worker
        worker.give(todo.popleft())

    try:
        for gpu in gpus[: len(todo)]:
            start(gpu)
        while workers:
            for connection in map(_connection, wait(list(workers))):
                worker = workers[connection]
                try:
                    error = connection.recv()
                except (EOFError, ConnectionResetError):
                    worker.process.join(10)
                    workers.pop(connection).end()
                    died[worker.part] += 1
                    _check_died(worker, died[worker.part])
                    todo.appendleft(worker.part)
                    start(worker.gpu)
                    continue
                if error is not None:
                    raise error
                bar.update()
                if todo:
                    worker.give(todo.popleft())
                else:
                    workers.pop(connection).end()
    finally:
        for worker in workers.values():
            worker.end()


def _connection(ready: object) -> Connection:
    assert isinstance(ready, Connection)
    return ready


def _check_died(worker: Worker, times: int) -> None:
    if times > TRIES:
        raise ChildProcessError(
            f"GPU {worker.gpu}: the process of part {worker.part} died {times} times, last with "
            f"{worker.process.exitcode} (-9: killed, perhaps for its memory); what is finished is "
            "kept: start the command again"
        )


def _work(connection: Connection, path: str, gpu: str) -> None:
    """Merge the parts that come until none does, or whoever sends them has died."""
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # before CUDA is asked for anything
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's, which ends the one above
    sys.stderr = open(os.devnull, "w")  # its bar and notices are those of the one above
    plan: MergePlan | None = None
    while True:
        try:
            part = connection.recv()
        except EOFError:
            return
        try:
            plan = plan or load_plan(path)
            merge_part(plan, part)
        except Exception as error:
            connection.send(error)
        else:
            connection.send(None)
