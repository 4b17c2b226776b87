"""Spectra, effective ranks, overlaps and noise floors against torch, by hand and as published."""

import math

import pytest
import reference
import torch

from optmerge_core.task_vectors.spectra import (
    cosine_matrix,
    energy_kept,
    entropy_rank,
    gavish_donoho_threshold,
    rounding_noise,
    sign_conflict_matrix,
    stable_rank,
    subspace_overlap,
)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_effective_ranks_by_hand():
    flat, steep = torch.tensor([2.0, 2, 2, 2, 0]), torch.tensor([2.0, 1, 1, 0, 0])
    spectra = torch.stack([flat, steep, torch.zeros(5)])
    torch.testing.assert_close(stable_rank(spectra), torch.tensor([4.0, 1.5, 0.0]))
    entropy = -(4 / 6) * math.log(4 / 6) - 2 * (1 / 6) * math.log(1 / 6)
    torch.testing.assert_close(entropy_rank(spectra), torch.tensor([4.0, math.exp(entropy), 0.0]))
    expected = torch.tensor([[0.25, 0.5, 0.75, 1, 1], [4 / 6, 5 / 6, 1, 1, 1], [1.0, 1, 1, 1, 1]])
    torch.testing.assert_close(energy_kept(spectra), expected)


def test_cosines_by_hand():
    task_vectors = torch.tensor([[1.0, 0], [1, 1], [-2, 0], [0, 0]]).view(4, 1, 2)
    half = math.sqrt(0.5)
    expected = torch.tensor([[1, half, -1, 0], [half, 1, -half, 0], [-1, -half, 1, 0], [0] * 4])
    torch.testing.assert_close(cosine_matrix(task_vectors), expected)


def test_sign_conflicts_by_hand():
    """Experts 0 and 1 share three nonzero entries and differ in one; 2 shares none with 1."""
    task_vectors = torch.tensor([[1.0, -2, 3, 4, 0], [2, -1, -3, 0, 5], [0, 0, 0, -1e-30, 0]])
    expected = torch.tensor([[0, 1 / 3, 1], [1 / 3, 0, 0], [1, 0, 0]])
    torch.testing.assert_close(sign_conflict_matrix(task_vectors), expected)


def test_subspace_overlap_by_hand():
    """Input directions e1, (e1 + e2)/√2, e3; all outputs e1."""
    task_vectors = torch.zeros(3, 4, 3)
    task_vectors[0, 0, 0] = 2
    task_vectors[1, 0, :2] = 5
    task_vectors[2, 0, 2] = 1
    expected = torch.tensor([[1, 0.5, 0], [0.5, 1, 0], [0, 0, 1]])
    torch.testing.assert_close(subspace_overlap(task_vectors, 1), expected)
    torch.testing.assert_close(subspace_overlap(task_vectors, 1, side="output"), torch.ones(3, 3))
    torch.testing.assert_close(subspace_overlap(task_vectors, 2), expected / 2)
    with pytest.raises(ValueError, match="side is 'both'; valid are 'input', 'output'"):
        subspace_overlap(task_vectors, 1, side="both")


def test_random_subspaces_overlap_by_chance():
    overlap = subspace_overlap(randn(12, 60, 40), rank=10)
    off_diagonal = overlap[~torch.eye(12, dtype=torch.bool)]
    assert off_diagonal.mean().item() == pytest.approx(10 / 40, abs=0.01)
    torch.testing.assert_close(overlap.diagonal(), torch.ones(12).double())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_rounding_noise_is_what_rounding_does(dtype):
    """Ideal weights, rounded: the expected norm is the measured one to a percent or two."""
    base = randn(400, 300) * 0.02
    expert = base + randn(400, 300, seed=1) * 1e-3
    stored_base, stored_expert = base.to(dtype), expert.to(dtype)
    error = (stored_expert.double() - stored_base.double()) - (expert - base)
    expected = rounding_noise(stored_base, stored_expert)
    assert expected.shape == base.shape
    assert expected.norm().item() == pytest.approx(error.norm().item(), rel=0.02)
    own_share = rounding_noise(base, stored_expert)
    error = stored_expert.double() - expert
    assert own_share.norm().item() == pytest.approx(error.norm().item(), rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_rounding_noise_by_hand(dtype):
    """From 1 to below 2 the spacing is eps; zeros and subnormals have the smallest there is."""
    grid = torch.finfo(dtype)
    values = torch.tensor([1.0, -1.9, 2.0, 0.75, 0.0, grid.smallest_normal / 4]).to(dtype)
    smallest = grid.smallest_normal * grid.eps
    ulps = torch.tensor([1, 1, 2, 0.5]).double() * grid.eps
    ulps = torch.cat([ulps, torch.tensor([smallest, smallest]).double()])
    torch.testing.assert_close(
        rounding_noise(values, values), ulps * math.sqrt(2 / 12), rtol=1e-12, atol=0
    )


def test_gavish_donoho_published_values():
    assert gavish_donoho_threshold(100, 100, noise=1.0) == pytest.approx(10 * 4 / math.sqrt(3))
    # Over the median singular value, √(max(m, n)·median(β)), λ becomes ω: 2.858 for a square
    # matrix, else the paper's cubic approximation, good to 0.02.
    for beta in (0.05, 0.1, 0.25, 0.5, 0.75, 1.0):
        rows, columns = round(400 * beta), 400
        threshold = gavish_donoho_threshold(rows, columns, noise=1.0)
        omega = threshold / math.sqrt(columns * reference.marchenko_pastur_median(beta))
        published = 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43
        assert omega == pytest.approx(published, abs=0.021)
        assert threshold == gavish_donoho_threshold(columns, rows, noise=1.0)
    assert omega == pytest.approx(2.858, abs=5e-4)


@pytest.mark.parametrize("shape", [(200, 200), (300, 100)])
def test_gavish_donoho_separates_signal_from_noise(shape):
    noise = 0.3 * randn(*shape)
    signal = 20 * torch.linalg.qr(randn(shape[0], 3, seed=1)).Q @ randn(3, shape[1], seed=2)
    values = torch.linalg.svdvals(noise + signal)
    beta, longer = min(shape) / max(shape), max(shape)
    estimated = values.median() / math.sqrt(longer * reference.marchenko_pastur_median(beta))
    assert estimated.item() == pytest.approx(0.3, rel=0.05)
    for deviation in (0.3, estimated.item()):
        assert (values > gavish_donoho_threshold(*shape, noise=deviation)).sum() == 3
