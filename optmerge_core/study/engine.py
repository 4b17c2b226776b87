"""Tasks on many machines, by Ray: it starts them, keeps them within each machine's means, retries.

A task is a function of a package that all machines have, with arguments that are plain data; what
it makes lies in files, whole or not there, so that a task can be started twice. Imports no torch:
what a task needs it imports itself.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from socket import create_connection
from typing import Any

from tqdm.auto import tqdm

from optmerge_core.errors import extra
from optmerge_core.places import worker

RETRIES = 3
PATIENCE = 900.0
"""Seconds without any task finished after which all that are left are given to others as well; five
times as long as the longest task, if that is more."""


class TryAgain(OSError):
    """What a task failed by, which may succeed elsewhere."""


@dataclass(frozen=True)
class Task:
    """A call of a function of this package that a machine with the means for it can do."""

    function: str
    """module:name"""
    arguments: tuple[Any, ...]
    work: float
    """in any unit; the largest are started first"""
    memory: int
    """bytes"""


@dataclass(frozen=True)
class Done:
    """Who did a task, and how long it took."""

    worker: str
    """machine:process"""
    seconds: float


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """Ray on a cluster: its address, "auto" for the one this machine is part of, or "local".

    The second starts as many workers here as the machine has cores. Raises `ConnectionError` where
    there is none.
    """
    with extra("cluster"):
        import ray
    if ray.is_initialized():  # by the caller, who ends it too
        yield ray
        return
    place = {} if address == "local" else {"address": address}
    try:
        if host_and_port := re.fullmatch(r"([^/]+):(\d+)", address):  # Ray itself waits for minutes
            create_connection((host_and_port[1], int(host_and_port[2])), 10).close()
        ray.init(**place, log_to_driver=False, logging_level="ERROR", include_dashboard=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConnectionError(
            f"--cluster {address}: no cluster of Ray there ({error}); start one with `ray start "
            "--head` and `ray start --address=HOST:6379` elsewhere, or use --cluster local"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def run_tasks(tasks: Sequence[Task], address: str, label: str, gpus: float = 0) -> list[Done]:
    """Do all tasks, the largest first, each on one core (and `gpus` GPUs); returns who did which.

    A task whose process or machine dies is started again elsewhere, as is one that fails by its
    files or its network (`OSError`, `CheckpointError`), RETRIES times; any other error ends the
    work, and is raised. What hangs is given to somebody else as well, see PATIENCE.
    """
    done: dict[int, Done] = {}
    with connected(address) as ray, tqdm(total=len(tasks), desc=label, unit="task") as bar:
        remote = ray.remote(_call)

        def start(number: int) -> Any:
            task = tasks[number]
            asked = {"num_cpus": 1, "num_gpus": gpus, "memory": task.memory}
            again = {"max_retries": RETRIES, "retry_exceptions": [TryAgain]}
            chosen = remote.options(**asked, **again, scheduling_strategy="SPREAD")
            return chosen.remote(task.function, task.arguments)

        largest = sorted(range(len(tasks)), key=lambda n: (-tasks[n].work, n))
        running = {start(number): number for number in largest}
        while len(done) < len(tasks):
            longest = max((x.seconds for x in done.values()), default=0.0)
            ready, _ = ray.wait(list(running), timeout=max(PATIENCE, 5 * longest))
            if not ready:
                left = [number for number in largest if number not in done]
                running |= {start(number): number for number in left}
            for reference in ready:
                number = running.pop(reference)
                if number not in done:
                    done[number] = Done(*_result(ray, reference))
                    bar.update()
        for reference in running:  # what hung
            ray.cancel(reference, force=True)
    return [done[number] for number in range(len(tasks))]


def _call(function: str, arguments: tuple[Any, ...]) -> tuple[str, float]:
    """Runs where Ray chooses; returns who did it, and its seconds."""
    module, name = function.split(":")
    start = time.perf_counter()
    try:
        getattr(import_module(module), name)(*arguments)
    except Exception as error:
        if isinstance(error, OSError) or getattr(error, "again", False):
            raise TryAgain(str(error)) from error
        raise
    return worker(), time.perf_counter() - start


def _result(ray: Any, reference: Any) -> tuple[str, float]:
    """Raises a task's own error rather than Ray's account of it."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise ChildProcessError(
            f"a worker died {RETRIES + 1} times ({type(error).__name__}); what is finished is "
            "kept: start the command again"
        ) from error
