"""Task singular vectors by hand and in special cases; the reference is in test_registry.py."""

import reference
import torch
from cases import randn

from optmerge_core.methods.tsv import tsv


def test_tsv_by_hand():
    """Rank 1 each. The outputs e1 and (e1 + e2)/√2 turn by 22.5° to be orthogonal."""
    task_vectors = torch.zeros(2, 2, 2, dtype=torch.float64)
    task_vectors[0, 0, 0] = 2.0
    task_vectors[1, :, 1] = 3 / 2**0.5
    cos, sin = torch.tensor(torch.pi / 8).double().cos(), torch.tensor(torch.pi / 8).double().sin()
    expected = torch.stack([torch.stack([2 * cos, 3 * sin]), torch.stack([-2 * sin, 3 * cos])])
    torch.testing.assert_close(tsv(task_vectors), expected)


def test_tsv_of_orthogonal_experts_is_their_sum():
    task_vectors = torch.zeros(2, 8, 6)
    task_vectors[0, :4, :3], task_vectors[1, 4:, 3:] = randn(4, 3), randn(4, 3, seed=1)
    torch.testing.assert_close(tsv(task_vectors), task_vectors.sum(0))


def test_tsv_counts_a_shared_direction_once():
    """Equal experts: the one that is left has no arbitrary partner."""
    expert = randn(8, 6)
    U, S, Vh = reference.svd(expert, 3)
    once = U @ torch.diag(S) @ Vh
    for factor in (1, 3, -1):
        merged = tsv(torch.stack([expert, factor * expert]))
        torch.testing.assert_close(merged, (1 + factor) / 2 * once, rtol=1e-4, atol=1e-5)
