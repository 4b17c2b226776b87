import threading
import time
from types import SimpleNamespace

import pytest
import torch

from optmerge_core.methods.optmerge import optmerge
from optmerge_core.runtime import in_order


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


class Watch:
    """Work that counts how much of it runs at a time, and how many threads each of it has."""

    def __init__(self, barrier=None):
        self.now = self.most = 0
        self.threads, self.lock = set(), threading.Lock()
        self.barrier = barrier

    def __call__(self, item):
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
            self.threads.add(torch.get_num_threads())
        if self.barrier:
            self.barrier.wait(timeout=30)
        time.sleep(0.01 * (item % 2))
        with self.lock:
            self.now -= 1
        return 10 * item


def test_results_come_in_order_from_as_many_workers_as_torch_has_threads(threads):
    work = Watch(threading.Barrier(threads))  # every worker must be there at once
    assert list(in_order(work, range(12))) == [10 * item for item in range(12)]
    assert work.most == threads and work.threads == {1}
    assert torch.get_num_threads() == threads
    assert list(in_order(work, [])) == []


def test_one_worker_feeds_a_gpu(threads):
    work = Watch()
    assert list(in_order(work, range(6), "cuda")) == [10 * item for item in range(6)]
    assert work.most == 1


def test_what_does_not_fit_into_memory_waits(threads):
    work = Watch()
    assert list(in_order(work, range(6), memory=lambda item: 2**60)) == [0, 10, 20, 30, 40, 50]
    assert work.most == 1


@pytest.mark.parametrize(("memory", "fit"), [(25, 2), (26, 1), (50, 1), (16, 3)])
def test_what_is_under_way_stays_below_half_of_the_free_memory(monkeypatch, memory, fit):
    """100 bytes are free and four workers ready: as many items run as fit into 50 bytes."""
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=100))
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    work = Watch(threading.Barrier(fit))  # so many must be there at once
    try:
        assert list(in_order(work, range(6), memory=lambda item: memory)) == list(range(0, 60, 10))
    finally:
        torch.set_num_threads(before)
    assert work.most == fit


def test_behind_a_large_item_as_much_is_done_as_takes_less_memory(threads):
    """The first takes 10 bytes, others 3: three fit behind it, or one for each worker."""
    done, behind = [], max(3, threads)

    def work(item):
        if item == 0:
            deadline = time.monotonic() + 20
            while threads > 1 and len(done) < behind and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0.1)
        done.append(item)
        return item

    results = in_order(work, range(100), memory=lambda item: 3 if item else 10)
    assert next(results) == 0
    time.sleep(0.1)
    assert len(done) == 1 + behind
    results.close()


def test_few_results_wait_for_the_reader(threads):
    started = []
    results = in_order(lambda item: started.append(item) or item, range(100))
    assert next(results) == 0
    time.sleep(0.2)
    assert len(started) <= threads + 1
    results.close()


def test_an_error_comes_through_and_ends_it(threads):
    started = []

    def work(item):
        started.append(item)
        if item == 4:
            raise ValueError("item 4")
        return item

    with pytest.raises(ValueError, match="item 4"):
        list(in_order(work, range(1000)))
    assert len(started) < 4 + 3 * (threads + 1)
    assert torch.get_num_threads() == threads


def test_bits_do_not_depend_on_the_number_of_workers():
    generator = torch.Generator().manual_seed(0)
    stacks = [torch.randn(3, 120, 90, generator=generator) for _ in range(6)]
    found, before = {}, torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        found[count] = list(in_order(lambda stack: optmerge(stack, preset="lora"), stacks))
    torch.set_num_threads(before)
    assert all(torch.equal(*pair) for pair in zip(found[1], found[2], strict=True))


def test_one_reads_ahead_while_the_other_computes():
    """As `merge` feeds a GPU: what is read next does not wait for what is computed."""
    read, may_go = [], threading.Event()

    def load(item):
        read.append(item)
        return item

    def compute(item):
        if item == 0:
            deadline = time.monotonic() + 20
            while len(read) < 3 and time.monotonic() < deadline:
                time.sleep(0.01)
            may_go.set()
        return item, len(read)

    results = list(in_order(compute, in_order(load, range(20), "cuda"), "cuda"))
    assert may_go.is_set() and results[0][1] >= 3
    assert [item for item, _ in results] == list(range(20))
