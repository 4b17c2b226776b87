"""The core's types as mypy sees them by pyproject.toml, and the shapes of methods/ as tests do."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jaxtyping import AbstractArray, TypeCheckError

from optmerge_core.methods.registry import METHODS
from optmerge_core.methods.svd import polar

ROOT = Path(__file__).resolve().parents[1]


def test_mypy():
    """Strictly, over the rooms that [tool.mypy] names; what it has seen stays in .mypy_cache."""
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_shapes_are_checked_under_test():
    """By the import hook of conftest.py."""
    with pytest.raises(TypeCheckError, match=r"Float\[Tensor, 'm n'\]"):
        polar(torch.zeros(2, 3, 4))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_its_shapes(name):
    annotations = METHODS[name].__annotations__
    for value in ("task_vectors", "return"):
        assert issubclass(annotations[value], AbstractArray), value
