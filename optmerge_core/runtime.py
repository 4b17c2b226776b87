"""Devices, dtypes, threads, memory: work on many parameters at once, and what it takes."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

FLOAT_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def in_order(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    device: str | torch.device = "cpu",
    memory: Callable[[Item], int] = lambda item: 0,
) -> Iterator[Result]:
    """`work(item)` of every item, in their order, by as many workers as torch has threads.

    Each worker computes on one thread of its own: a result then has the same bits however many
    there are, and small decompositions, which gain nothing from a second thread, fill all cores.
    One worker feeds a GPU. At most workers + 1 results are waiting or under way: what comes next is
    read and computed while the caller writes. `memory`, the bytes that an item's work takes, makes
    them fewer: together they stay below half of what was free (or there is one alone). Behind one
    that takes long, as much more may be done as takes less memory than it.

    An error in `work` is raised here, and the rest is not started.
    """
    threads = torch.get_num_threads()
    workers = 1 if torch.device(device).type == "cuda" else threads
    free, held = psutil.virtual_memory().available / 2, 0
    waiting: deque[tuple[Future[Result], int]] = deque()
    # One thread each, in torch's and in BLAS's count, which both belong to the calling thread.
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        for item in items:
            needed = memory(item)
            while waiting and (
                held + needed > free
                or len(waiting) > workers
                and held - waiting[0][1] + needed >= waiting[0][1]
            ):
                result, own = waiting.popleft()
                yield result.result()
                held -= own
            waiting.append((pool.submit(work, item), needed))
            held += needed
        for result, _ in waiting:
            yield result.result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or dtype in FLOAT_DTYPES.values():
        return dtype
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"dtype {dtype!r}: give {', '.join(FLOAT_DTYPES)} or None (the base's)")
    return FLOAT_DTYPES[dtype]


def parse_device(device: str | torch.device) -> torch.device:
    """One device of this machine. Raises `ValueError` where it has none of that kind."""
    chosen = named_device(device)
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda': this torch sees no CUDA device; use 'auto' or 'cpu'")
    return chosen


def named_device(device: str | torch.device) -> torch.device:
    """What a name means, whether this machine has it or another that does the work."""
    if device == "cuda:all":
        raise ValueError(
            "device 'cuda:all': all GPUs are for the command `merge` alone; give one here, such as "
            "'cuda'"
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device {device!r}: give 'auto', 'cpu' or 'cuda'") from error


def all_gpus() -> list[str]:
    """The GPUs that this process sees, by their names in CUDA_VISIBLE_DEVICES.

    Raises `ValueError` for none.
    """
    parse_device("cuda")
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    return [name.strip() for name in named.split(",")][:count]


def reset_peak_memory(device: torch.device) -> None:
    """Start a new measurement of `peak_memory`, where the system lets a process do so (Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # then the peak is that of the whole process so far


def peak_memory(device: torch.device) -> tuple[int, int | None]:
    """Peak resident bytes of this process, and peak bytes allocated on a CUDA device (or None)."""
    on_device = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024, on_device
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, on_device  # macOS counts bytes


class Meter:
    """Seconds and memory that work takes, from when this is made."""

    def __init__(self, device: torch.device):
        self.device, self.started = device, time.perf_counter()
        reset_peak_memory(device)

    def read(self) -> dict[str, Any]:
        """seconds; peak_memory_bytes, resident, of this process; peak_device_memory_bytes, that
        torch has allocated on a CUDA device, else None; and device, its name."""
        cuda = self.device.type == "cuda"
        resident, allocated = peak_memory(self.device)
        return {
            "device": torch.cuda.get_device_name(self.device) if cuda else str(self.device),
            "seconds": time.perf_counter() - self.started,
            "peak_memory_bytes": resident,
            "peak_device_memory_bytes": allocated,
        }
