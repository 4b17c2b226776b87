"""Two experts whose task vectors are known by hand."""

import pytest
import torch
from cases import NAME

from optmerge_core.task_vectors.stack import TaskVectors


@pytest.fixture
def toy() -> TaskVectors:
    base = {NAME: torch.tensor([[3.0, 4.0]]), "x": torch.zeros(2, 2)}
    experts = {
        "a": {NAME: torch.tensor([[3.0, 5.0]]), "x": torch.ones(2, 2)},
        "b": {NAME: torch.tensor([[6.0, 0.0]]), "x": -torch.ones(2, 2)},
    }
    return TaskVectors(base, experts, [NAME])
