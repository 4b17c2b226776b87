"""SSAM by hand, against the reference, and on task vectors of low rank."""

import pytest
import reference_methods as reference
import torch
from cases import CASES, distance, experts, randn

from optmerge_core.methods.ssam import ssam


def test_ssam_by_hand():
    """Σ τi τiᵀ = diag(10, 4, 1), the same on the right: with k = 1 the first direction is left."""
    task_vectors = torch.diag_embed(torch.tensor([[3.0, 2, 0], [1, 0, 1]]))
    for ratio, values in ((0.4, [4.0, 0, 0]), (0.7, [4.0, 2, 0]), (1.0, [4.0, 2, 1])):
        merged = ssam(task_vectors, rank_ratio=ratio)
        torch.testing.assert_close(merged, torch.diag(torch.tensor(values)))


def test_what_is_shared_may_differ_from_side_to_side():
    """The outputs share e1, the inputs f2: what meets both is left."""
    task_vectors = torch.zeros(2, 3, 3)
    task_vectors[0, 0, 0], task_vectors[0, 1, 1], task_vectors[1, 0, 1] = 3, 4, 2
    merged = ssam(task_vectors, rank_ratio=0.4)
    expected = torch.zeros(3, 3)
    expected[1, 1] = 4  # outputs 13, 16; inputs 9, 20
    torch.testing.assert_close(merged, expected)


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("ratio", [None, 0.4])
@pytest.mark.parametrize("name", CASES)
def test_ssam_equals_the_reference(name, ratio, sequential):
    options = {"rank_ratio": ratio, "sequential": sequential}
    expected = reference.ssam(CASES[name], **options)
    assert distance(ssam(CASES[name], **options), expected) < 1e-6
    assert distance(ssam(CASES[name].float(), **options).double(), expected) < 1e-3


@pytest.mark.parametrize("sequential", [False, True])
def test_what_fits_into_the_rank_is_summed(sequential):
    """Of adapters all, where their ranks together are no more than it; so is one expert."""
    task_vectors = experts((96, 64), rank=7)
    assert distance(ssam(task_vectors, sequential=sequential), task_vectors.sum(0)) < 1e-6
    assert distance(ssam(task_vectors[:1], sequential=sequential), task_vectors[0]) < 1e-6


def test_ssam_follows_rotations():
    task_vectors = experts((24, 16))
    left, right = (torch.linalg.qr(randn(n, n, dtype=torch.float64)).Q for n in (24, 16))
    assert distance(ssam(left @ task_vectors @ right), left @ ssam(task_vectors) @ right) < 1e-6


def test_a_wrong_option_is_named():
    with pytest.raises(ValueError, match="rank_ratio is 0"):
        ssam(torch.zeros(2, 3, 3), rank_ratio=0)
