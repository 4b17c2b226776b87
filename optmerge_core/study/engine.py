"""Tasks on many machines, by Ray: it starts them, keeps them within each machine's means, retries.

A task is a function of a package that all machines have, with arguments that are plain data; what
it makes lies in files, whole or not there, so that a task can be started twice. Imports no torch:
what a task needs it imports itself.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
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


@dataclass(frozen=True)
class Failed:
    """Why a task failed that may succeed elsewhere, and the node where it did, by Ray's name."""

    reason: str
    node: str


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
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        why = " ".join(str(error).split())
        raise ConnectionError(
            f"--cluster {address}: no cluster of Ray there ({why}); start one with `ray start "
            "--head` and `ray start --address=HOST:6379` elsewhere, or use --cluster local; one "
            "that asks for a token wants RAY_AUTH_MODE=token and the head's ~/.ray/auth_token here"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def run_tasks(tasks: Sequence[Task], address: str, label: str, device: str = "cpu") -> list[Done]:
    """Do all tasks, the largest first, each on one core; returns who did which.

    On the device cuda each has a GPU of its own, which it fills; on auto too, if the cluster has
    any. A task whose process or machine dies is started again elsewhere, as is one that fails by
    its files or its network (`OSError`, `CheckpointError`), on another machine if one has the
    means, RETRIES times; any other error ends the work, and is raised. What hangs is given to
    somebody else as well, see PATIENCE.

    Raises `ValueError` where no machine has the means for a task, for which Ray waits in silence.
    """
    done: dict[int, Done] = {}
    failed: dict[int, list[str]] = defaultdict(list)
    with connected(address) as ray, tqdm(total=len(tasks), desc=label, unit="task") as bar:
        gpus = _gpus(ray, device)
        remote = ray.remote(_call)

        def start(number: int) -> Any:
            task = tasks[number]
            asked = {"num_cpus": 1, "num_gpus": gpus, "memory": task.memory}
            place = _elsewhere(ray, number, asked, failed[number]) if failed[number] else "SPREAD"
            chosen = remote.options(**asked, max_retries=RETRIES, scheduling_strategy=place)
            return chosen.remote(task.function, task.arguments)

        largest = sorted(range(len(tasks)), key=lambda n: (-tasks[n].work, n))
        _check_means(ray, address, tasks, gpus)
        running = {start(number): number for number in largest}
        while len(done) < len(tasks):
            longest = max((x.seconds for x in done.values()), default=0.0)
            ready, _ = ray.wait(list(running), timeout=max(PATIENCE, 5 * longest))
            if not ready:
                left = [number for number in largest if number not in done]
                _check_means(ray, address, [tasks[number] for number in left], gpus)
                running |= {start(number): number for number in left}
            for reference in ready:
                number = running.pop(reference)
                if number in done:
                    continue
                outcome = _result(ray, reference)
                if isinstance(outcome, Done):
                    done[number] = outcome
                    bar.update()
                    continue
                failed[number].append(outcome.node)
                if len(failed[number]) > RETRIES:
                    raise OSError(outcome.reason)
                running[start(number)] = number
        for reference in running:  # what hung
            ray.cancel(reference, force=True)
    return [done[number] for number in range(len(tasks))]


def check_device(device: str) -> None:
    """Raise `ValueError` for a GPU by its number, or all of a machine's."""
    if device.startswith("cuda:"):
        raise ValueError(
            f"--device {device}: on a cluster every task has a GPU of its own; give cuda"
        )


def _gpus(ray: Any, device: str) -> float:
    """How many of them a task is given, so that all tasks find the same device."""
    check_device(device)
    there = ray.cluster_resources().get("GPU", 0) > 0
    return float(device.startswith("cuda") or device == "auto" and there)


def _able(ray: Any, asked: Mapping[str, float]) -> list[str]:
    """The nodes that have what a task asks for, whether or not others use it now."""
    names = {"num_cpus": "CPU", "num_gpus": "GPU", "memory": "memory"}
    return sorted(
        node["NodeID"]
        for node in ray.nodes()
        if node["Alive"]
        and all(node["Resources"].get(names[x], 0) >= amount for x, amount in asked.items())
    )


def _elsewhere(ray: Any, number: int, asked: Mapping[str, float], failed: list[str]) -> Any:
    """A machine with the means where the task has not failed yet; anywhere if there is none."""
    others = [node for node in _able(ray, asked) if node not in failed]
    affinity = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
    return affinity(others[number % len(others)], soft=True) if others else "SPREAD"


def _check_means(ray: Any, address: str, tasks: Sequence[Task], gpus: float) -> None:
    most = max((task.memory for task in tasks), default=0)
    if tasks and not _able(ray, {"num_cpus": 1, "num_gpus": gpus, "memory": most}):
        needed = f"a core, {most / 1e9:.1f} GB of memory" + " and a GPU" * (gpus > 0)
        raise ValueError(
            f"--cluster {address}: no machine there has {needed}, which the largest task needs; "
            "add one that has (`ray start` says with --memory and --num-gpus what there is)"
        )


def _call(function: str, arguments: tuple[Any, ...]) -> Done | Failed:
    """Runs where Ray chooses."""
    with extra("cluster"):
        import ray

    module, name = function.split(":")
    start = time.perf_counter()
    try:
        getattr(import_module(module), name)(*arguments)
    except Exception as error:
        if isinstance(error, OSError) or getattr(error, "again", False):
            return Failed(str(error), ray.get_runtime_context().get_node_id())
        raise
    return Done(worker(), time.perf_counter() - start)


def _result(ray: Any, reference: Any) -> Done | Failed:
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
