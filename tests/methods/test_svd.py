"""Singular value decompositions against torch's."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from optmerge_core.methods.svd import (
    filled_svd,
    gram,
    low_rank,
    polar,
    row_space,
    singular_values,
    truncated_svd,
)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


MATRICES = {
    "tall": randn(30, 12),
    "wide": randn(12, 30),
    "square": randn(16, 16),
    "batch": randn(3, 2, 9, 14),
    "decaying": randn(40, 20) * torch.logspace(0, -5, 20, dtype=torch.float64),
    "one column": randn(8, 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("matrix", MATRICES.values(), ids=list(MATRICES))
def test_svd_equals_torchs(matrix, dtype):
    matrix = matrix.to(dtype)
    U, S, Vh = truncated_svd(matrix)
    assert U.dtype == S.dtype == Vh.dtype == dtype
    expected = torch.linalg.svdvals(matrix)
    largest = expected.amax().item()
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-10}[dtype] * largest
    torch.testing.assert_close(S, expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(singular_values(matrix), expected, rtol=0, atol=tolerance)
    torch.testing.assert_close((U * S.unsqueeze(-2)) @ Vh, matrix, rtol=0, atol=10 * tolerance)
    identity = torch.eye(S.shape[-1], dtype=dtype).expand(*S.shape, -1)
    torch.testing.assert_close(U.mT @ U, identity, rtol=0, atol=1e-5)
    torch.testing.assert_close(Vh @ Vh.mT, identity, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["tall", "wide", "batch"])
def test_truncation_is_the_best_approximation(name):
    matrix = MATRICES[name]
    for rank in (1, 4, 100):
        U, S, Vh = truncated_svd(matrix, rank)
        kept = min(rank, *matrix.shape[-2:])
        assert (U.shape[-1], S.shape[-1], Vh.shape[-2]) == (kept, kept, kept)
        error = torch.linalg.matrix_norm(matrix - (U * S.unsqueeze(-2)) @ Vh)
        tail = torch.linalg.svdvals(matrix)[..., rank:].square().sum(-1).sqrt()
        torch.testing.assert_close(error, tail, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="rank is 0"):
        truncated_svd(matrix, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("matrix", MATRICES.values(), ids=list(MATRICES))
def test_low_rank_equals_torchs_svd(matrix, dtype):
    matrix = matrix.to(dtype)
    largest = torch.linalg.svdvals(matrix).amax().item()
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-9}[dtype] * largest
    for rank in (1, 5, 100):
        T, SVh = low_rank(matrix, rank)
        assert T.dtype == SVh.dtype == dtype
        U, S, Vh = (x.double() for x in torch.linalg.svd(matrix.double(), full_matrices=False))
        U, S, Vh = U[..., :rank], S[..., :rank, None], Vh[..., :rank, :]
        torch.testing.assert_close(T.double(), U @ (S * Vh), rtol=0, atol=10 * tolerance)
        squares = (SVh.mT @ SVh).double()  # singular vectors have no sign of their own
        torch.testing.assert_close(
            squares, (S * Vh).mT @ (S * Vh), rtol=0, atol=10 * tolerance * largest
        )
        norms = torch.linalg.vector_norm(SVh, dim=-1).double()
        torch.testing.assert_close(norms, S[..., 0], rtol=0, atol=tolerance)
    for part in low_rank(torch.zeros_like(matrix), 3):
        assert torch.equal(part, torch.zeros_like(part))


@pytest.mark.parametrize("shape", [(20, 12), (12, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_is_not_resolved_is_exactly_zero(shape, dtype):
    matrix = (randn(shape[0], 3) @ randn(3, shape[1], seed=1)).to(dtype)
    U, S, Vh = truncated_svd(matrix)
    assert S.count_nonzero() == singular_values(matrix).count_nonzero() == 3
    assert torch.equal(U[:, 3:], torch.zeros_like(U[:, 3:]))
    assert torch.equal(Vh[3:], torch.zeros_like(Vh[3:]))
    torch.testing.assert_close(U * S @ Vh, matrix)
    for part in truncated_svd(torch.zeros(2, *shape, dtype=dtype)):
        assert torch.equal(part, torch.zeros_like(part))


@pytest.mark.parametrize("shape", [(100, 3), (3, 100)])
def test_what_is_resolved_is_all_above_the_documented_share(shape):
    """Of the largest, √(100·2.2e-16) = 1.5e-7: twice as much is a direction, half as much is 0."""
    matrix = torch.zeros(shape, dtype=torch.float64)
    for place, value in enumerate((1.0, 3e-7, 0.75e-7)):
        matrix[place, place] = value
    _, S, _ = truncated_svd(matrix)
    for values in (S, singular_values(matrix)):
        assert values.tolist() == pytest.approx([1, 3e-7, 0], rel=1e-2, abs=0)


def test_svd_leaves_its_input():
    matrix = MATRICES["tall"].clone()
    truncated_svd(matrix)
    singular_values(matrix)
    assert torch.equal(matrix, MATRICES["tall"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (600, 127), (511, 129), (3, 513, 256), (40, 300)])
def test_gram_is_the_product(shape, dtype):
    """Across the borders of stripes (128 columns) and slabs (512 rows), of strided views too."""
    matrix = randn(*shape).to(dtype)
    expected = matrix.double().mT @ matrix.double()
    for product in (gram(matrix), gram(matrix.mT.contiguous().mT)):
        assert product.dtype == torch.float64
        torch.testing.assert_close(product, expected, rtol=1e-13, atol=1e-11)


def test_gram_multiplies_about_half():
    """With s stripes (s + 1) / 2s of 2mn², here 7 stripes: 4/7."""
    rows, columns = 600, 7 * 128

    def addmm_flop(own, left, right, **_):
        return 2 * left[0] * left[1] * right[1]

    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flop})
    with counter:
        gram(torch.zeros(rows, columns))
    assert counter.get_total_flops() == 2 * rows * columns**2 * 4 // 7


@pytest.mark.parametrize("name", ["tall", "wide", "square", "decaying", "one column"])
def test_polar_equals_torchs(name):
    matrix = MATRICES[name]
    turned, S = polar(matrix)
    P, expected, Qh = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(turned, P @ Qh, rtol=0, atol=1e-5)
    torch.testing.assert_close(S, expected, rtol=0, atol=1e-10 * expected[0].item())


def test_polar_is_the_nearest_with_orthonormal_columns():
    matrix = randn(9, 4)
    nearest, _ = polar(matrix)
    torch.testing.assert_close(nearest.mT @ nearest, torch.eye(4).double())
    torch.testing.assert_close(polar(matrix.mT)[0], nearest.mT)
    for seed in range(20):
        other = torch.linalg.qr(nearest + 0.1 * randn(9, 4, seed=seed)).Q
        assert (other - matrix).norm() > (nearest - matrix).norm()


@pytest.mark.parametrize("matrix", MATRICES.values(), ids=list(MATRICES))
def test_the_row_space_is_that_of_the_low_rank_approximation(matrix):
    assert torch.equal(row_space(matrix, 3), low_rank(matrix, 3)[1])


@pytest.mark.parametrize("shape", [(30, 12), (12, 30), (16, 16)])
@pytest.mark.parametrize("rank", [None, 8])
@pytest.mark.parametrize("own", [0, 1, 5, 12])
def test_a_filled_svd_has_orthonormal_vectors_for_null_directions(shape, rank, own):
    matrix = randn(shape[0], own) @ randn(own, shape[1], seed=1)
    U, S, Vh = filled_svd(matrix, rank)
    count = rank or min(shape)
    identity = torch.eye(count, dtype=torch.float64)
    torch.testing.assert_close(U.mT @ U, identity, rtol=0, atol=1e-10)
    torch.testing.assert_close(Vh @ Vh.mT, identity, rtol=0, atol=1e-10)
    torch.testing.assert_close(S, torch.linalg.svdvals(matrix)[:count], rtol=0, atol=1e-6)
    expected = low_rank(matrix, count)[0]
    torch.testing.assert_close((U * S) @ Vh, expected, rtol=0, atol=1e-10)


def test_what_fills_null_directions_hangs_on_the_others_span_and_the_seed_alone():
    left, right = randn(30, 3), randn(3, 12, seed=1)
    turned = filled_svd(left @ randn(3, 3, seed=2) @ right)
    U, _, Vh = filled_svd(left @ right)
    torch.testing.assert_close(turned[0][:, 3:], U[:, 3:])
    torch.testing.assert_close(turned[2][3:], Vh[3:])
    other = filled_svd(left @ right, seed=1)
    assert (other[0][:, 3:] - U[:, 3:]).norm() > 1 and (other[2][3:] - Vh[3:]).norm() > 1
    assert torch.equal(filled_svd(left @ right)[0], U)
