"""The speed benchmarks run in one call, at tiny size: they are too slow for every test run."""

import hashlib
import io
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from optmerge_core.methods.registry import METHODS

FOLDER = Path(__file__).with_name("benchmarks")
sys.path.insert(0, str(FOLDER))
CALLS = {
    "layer": ["--scales", "0.05", "--steps", "3"],
    "models": ["--scale", "0.05"],
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
