"""The speed benchmarks run in one call, at tiny size: they are too slow for every test run."""

import hashlib
import io
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from optmerge_core.methods.registry import METHODS

FOLDER = Path(__file__).with_name("benchmarks")
sys.path.insert(0, str(FOLDER))
CALLS = {
    "answers": ["--questions", "2"],
    "layer": ["--scales", "0.05", "--steps", "3"],
    "models": ["--scale", "0.05"],
    "mergekit_files": ["--scale", "0.05"],
    "scaling": ["--small"],
    "device": ["--device", "cpu", "--scale", "0.01", "--methods", "ties", "optmerge"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_a_benchmark_ends_with_its_table(name):
    recorded = FOLDER / "results.csv"
    before = recorded.read_bytes()
    call = [sys.executable, FOLDER / f"{name}.py", *CALLS[name]]
    run = subprocess.run(call, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "ours / floor" in run.stdout and "└" in run.stdout.splitlines()[-1]
    assert recorded.read_bytes() == before  # a try is not a measurement


def test_shares_tell_what_threads_do():
    """A hash, then a method, then waiting: each is seen as what it is."""
    from shares import KINDS, Shares

    def seen_while(work, seconds=0.2):
        shares, end = Shares(0.001), time.perf_counter() + seconds
        while time.perf_counter() < end:
            work()
        found = shares.read()
        assert list(found) == [f"{kind} (%)" for kind in KINDS]
        return {name: share for name, share in found.items() if share}

    stack = torch.randn(3, 200, 200)
    stream = io.BytesIO(bytes(10**7))
    assert seen_while(lambda: hashlib.file_digest(stream, "sha256")) == {"hash (%)": 100}
    assert seen_while(lambda: METHODS["tsv"](stack)) == {"computing (%)": 100}
    assert seen_while(lambda: threading.Event().wait(0.01)) == {}


def test_the_readmes_costs_are_the_measured_ones():
    import readme

    results = pd.read_csv(FOLDER / "results.csv")
    assert readme.BLOCK.search(readme.README.read_text()).group() == readme.block(results)
    row = {"case": readme.ON_A_GPU, "device": "A GPU", "floor (s)": 45, "ours (s)": 90}
    on_a_gpu = readme.block(pd.concat([results, pd.DataFrame([row])]))
    assert "none was at hand" not in on_a_gpu and "scale 1 | A GPU | 90 | 2 |" in on_a_gpu


def test_the_readmes_first_sentences_are_the_notebooks():
    import readme

    said = readme.OUTCOME.search(readme.README.read_text()).group()
    assert said == readme.outcome_block() and said.count("\n") == 5


def test_the_readmes_hours_are_the_estimated_ones_and_say_what_was_measured():
    import readme

    measured = pd.read_csv(readme.TABLE) if readme.TABLE.exists() else None
    assert readme.SCALE.search(readme.README.read_text()).group() == readme.scale_block(measured)
    rows = [
        {"device": "A core", "workers": workers, "all (s)": seconds, "part (s)": 9.0,
         "expected (s)": 10.0}
        for workers, seconds in ((1, 40.0), (1, 40.0), (2, 25.0))
    ]  # fmt: skip
    said = " ".join(readme.scale_block(pd.DataFrame(rows)).split())
    assert "A run of 2 parts (A core) took 40 s with one worker, 0.90 of what was expected" in said
    assert "25 s with two: an efficiency of 0.80." in said


def test_workers_says_who_merged_what_beside_what_was_expected(monkeypatch, capsys):
    """All but Ray: whoever it would start is this process, which merges part after part."""
    import workers

    from optmerge_core.study.cluster import merge_planned
    from optmerge_core.study.engine import Done

    started = []
    ray = SimpleNamespace(init=lambda **given: started.append(given), shutdown=lambda: None)
    monkeypatch.setitem(sys.modules, "ray", ray)

    def run_tasks(tasks, address, label):
        for task in tasks:
            assert task.function.endswith(f":{merge_planned.__name__}")
            merge_planned(*task.arguments)
        return [Done("here", 0.5) for _ in tasks]

    monkeypatch.setattr(workers, "run_tasks", run_tasks)
    before = workers.TABLE.exists()
    assert workers.main(scale=0.05, folder=None) == 0
    said = capsys.readouterr().out
    assert [given["num_cpus"] for given in started] == [1, 2]
    assert "0, 1, 2" in said and "efficiency of two workers: " in said
    assert workers.TABLE.exists() == before  # a try is not a measurement
    rows = [(1, 30.0), (2, 20.0)]
    table = pd.DataFrame(rows, columns=["workers", "all (s)"])
    assert workers.efficiency(table) == 0.75


@pytest.mark.slow
def test_two_workers_write_what_one_writes():
    call = [sys.executable, FOLDER / "workers.py", "--scale", "0.05"]
    run = subprocess.run(call, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert re.search(r"efficiency of two workers: [\d.]+, at least 0.8 is wanted", run.stdout)


def test_a_trace_tells_what_is_done_beside_kernels():
    """Two kernels, 0 to 4 and 3 to 6 µs; of a read from 5 to 9 a quarter is beside the second."""
    from device import beside_kernels, within_limits

    kernels = [{"cat": "kernel", "name": "k", "ts": s, "dur": d} for s, d in ((3, 3), (0, 4))]
    read = {"cat": "cpu_op", "name": "aten::_pin_memory", "ts": 5, "dur": 4}
    copy = {"cat": "gpu_memcpy", "name": "Memcpy HtoD (Pinned -> Device)", "ts": 1, "dur": 2}
    pageable = copy | {"name": "Memcpy HtoD (Pageable -> Device)", "ts": 7}
    found = beside_kernels([*kernels, read, copy, pageable, {"ph": "M", "name": "process_name"}])
    assert found == {"reading beside computing (%)": 25, "copying beside computing (%)": 100}
    assert set(beside_kernels([read, copy]).values()) == {None}
    row = {"case": "seven", "floor (s)": 30.0, "ours (s)": 60.0, "ours (GB)": 7.9}
    assert within_limits(row) == "seven: 60.0 s of 120, 7.9 GB of 8, 50% of it the floor: kept"
    assert within_limits(row | {"ours (GB)": 8.1}).endswith("MISSED")


@pytest.mark.slow
def test_a_trace_sees_every_thread():
    """What the workers compute too, which are not the thread that is traced."""
    from device import traced_merge

    assert any(event.get("name") == "aten::_linalg_eigh" for event in traced_merge("cpu", 0.02))
