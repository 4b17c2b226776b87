"""WUDI by hand, and where nothing interferes."""

import pytest
import torch
from cases import distance, experts

from optmerge_core.methods.interference import interference
from optmerge_core.methods.wudi import wudi


def test_hand_computed():
    """1×1 matrices 1 and 3: weights 1 and 1/9, so C = 2, D = 1 + 3 = 4, optimum τ = 2."""
    task_vectors = torch.tensor([1.0, 3.0], dtype=torch.float64).view(2, 1, 1)
    form = interference(task_vectors, task_vectors, task_vectors)
    assert form.C.item() == pytest.approx(2) and form.D.item() == pytest.approx(4)
    assert form.loss(torch.full((1, 1), 2.0).double()) == pytest.approx(1 + 1)
    assert form.gradient(torch.full((1, 1), 3.0).double()).item() == pytest.approx(4)
    # One step of SGD from the sum 4 at rate 0.1: 4 − 0.1·2·(4·2 − 4) = 3.2; Adam moves by its rate.
    assert wudi(task_vectors, optimizer="sgd", learning_rate=0.1, steps=1).item() == (
        pytest.approx(3.2)
    )
    assert wudi(task_vectors, learning_rate=0.1, steps=1).item() == pytest.approx(3.9)
    assert wudi(task_vectors, steps=0).item() == 4


def test_experts_in_other_rows_and_columns_do_not_interfere():
    """Then the sum is already the optimum of WUDI, with loss 0, and nothing moves."""
    task_vectors = torch.zeros(2, 8, 6)
    task_vectors[0, :4, :3] = experts((4, 3), count=1, dtype=torch.float32)
    task_vectors[1, 4:, 3:] = experts((4, 3), count=1, seed=1, dtype=torch.float32)
    trace = []
    merged = wudi(task_vectors, on_step=lambda *step: trace.append(step))
    assert distance(merged, task_vectors.sum(0)) < 1e-6
    assert distance(wudi(task_vectors, optimizer="ridge"), task_vectors.sum(0)) < 1e-6
    assert trace[-1][1] == pytest.approx(0, abs=1e-12)
