"""Work on many parameters at once: several threads, results in order, few of them in memory."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import psutil
import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


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
    them fewer: together they stay below half of what was free (or there is one alone).

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
            while waiting and (len(waiting) > workers or held + needed > free):
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
