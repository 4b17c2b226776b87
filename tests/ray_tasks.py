"""What tests let a cluster do: tasks that die, hang or fail, each the first time only or always."""

import os
import resource
import signal
import time
from pathlib import Path


def first_time(path: str) -> bool:
    if Path(path).exists():
        return False
    Path(path).write_text(str(os.getpid()))
    return True


def note(path: str, number: int) -> None:
    """Says who did what."""
    time.sleep(0.05)
    Path(path, f"{number}").write_text(str(os.getpid()))


def die_once(path: str) -> None:
    if first_time(path):
        os.kill(os.getpid(), signal.SIGKILL)
    Path(f"{path}.done").touch()


def hang_once(path: str) -> None:
    if first_time(path):
        time.sleep(3600)
    Path(f"{path}.done").touch()


def full_once(path: str) -> None:
    if first_time(path):
        raise OSError(28, "No space left on device", path)
    Path(f"{path}.done").touch()


def refuse(path: str) -> None:
    raise ValueError(f"{path}: expert A has NaN")


def note_gpus(path: str) -> None:
    """Says which GPUs it has, from when to when."""
    start = time.time()
    time.sleep(0.1)
    Path(path).write_text(f"{os.environ['CUDA_VISIBLE_DEVICES']} {start} {time.time()}")


def merge_where_there_is_room(path: str, number: int) -> None:
    """A part, for which the machine with FULL in its environment has a kilobyte."""
    from optmerge_core.study.cluster import merge_planned

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    full = "FULL" in os.environ
    if full:
        Path(f"{path}.full-{number}").touch()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000 if full else soft, hard))
        merge_planned(path, number)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
