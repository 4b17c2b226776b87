"""The speed benchmarks run in one call, at tiny size: they are too slow for every test run."""

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).with_name("benchmarks")
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
