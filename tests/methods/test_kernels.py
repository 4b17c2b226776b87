"""The Triton kernels against their twins in torch, by Triton's interpreter without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
from itertools import product

import torch
from optmerge_core.methods import kernels
from optmerge_core.methods.blocks import Blocks
from optmerge_core.methods.ties import ties, trim

device = "cuda" if torch.cuda.is_available() else "cpu"
generator = torch.Generator().manual_seed(0)
RULES = ("released", "mergekit")
shapes = [(1, 5), (3, 7, 9), (5, 64, 48), (6, 1, 1), (4, kernels.TILE), (2, 3 * kernels.TILE + 1)]
for shape in shapes:
    numbers = torch.randn(shape, generator=generator)
    for stack in (numbers, (2 * numbers).round(), torch.zeros(shape)):  # the second has many draws
        for density in (0.2, 0.7, 1.0):
            for rule, weighted, normalize in product(RULES, (0, 1), (0, 1)):
                weights = [0.5 - i for i in range(len(stack))] if weighted else None
                options = {"weights": weights, "normalize": normalize > 0, "rule": rule}
                limits, left = trim(Blocks.of(stack), density, rule)
                expected = ties(stack, density=density, **options)
                found = kernels.ties(stack.to(device), limits.to(device), left, **options).cpu()
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        for drop_rate in (0.0, 0.3, 0.9):
            kept = torch.rand(shape, generator=generator) >= drop_rate
            expected = (stack * kept / (1 - drop_rate)).sum(0)
            found = kernels.dare_sum(stack.to(device), kept.to(device), drop_rate).cpu()
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
print("equal")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is made for Linux")
def test_kernels_equal_their_twins():
    """In a process of its own: the interpreter is chosen before triton is imported."""
    import torch

    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    root = Path(__file__).resolve().parents[2]
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, cwd=root
    )
    assert run.stdout.strip() == "equal", run.stderr[-3000:]
