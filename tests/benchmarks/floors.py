"""What this machine can do at best: bytes copied and products multiplied per second."""

import time
from collections.abc import Callable

import torch


def best_seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """The shortest of several runs: on a shared machine the others measure the neighbours."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def copy_bandwidth(megabytes: int = 256) -> float:
    """Bytes read plus bytes written per second, in memory."""
    source = torch.ones(megabytes * 10**6 // 4)
    target = torch.empty_like(source)
    return 2 * source.nbytes / best_seconds(lambda: target.copy_(source))


def matmul_rate(size: int = 2048, dtype: torch.dtype = torch.float32) -> float:
    """Floating-point operations per second of a product of two square matrices."""
    a, b = torch.randn(2, size, size, dtype=dtype)
    return 2 * size**3 / best_seconds(lambda: a @ b)
