"""Averages and sums by hand."""

import torch

from optmerge_core.methods.averages import task_arithmetic, weight_average


def test_average_and_sum_by_hand():
    task_vectors = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
    assert weight_average(task_vectors).tolist() == [2, 1]
    assert task_arithmetic(task_vectors).tolist() == [4, 2]
