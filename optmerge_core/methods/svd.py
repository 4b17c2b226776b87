"""Singular value decompositions by the Gram matrix of the smaller side."""

import torch
from jaxtyping import Float, Float64
from torch import Tensor


def truncated_svd(
    matrix: Float[Tensor, "*batch m n"], rank: int | None = None
) -> tuple[Float[Tensor, "*batch m k"], Float[Tensor, "*batch k"], Float[Tensor, "*batch k n"]]:
    """The `rank` largest singular triplets, from the Gram matrix of the smaller side.

    matrix (..., m, n) -> U (..., m, k), S (..., k) descending, Vh (..., k, n), in its dtype,
    k = min(rank, m, n), all of them by default. U diag(S) Vh is the best rank-k approximation.

    With AᵀA = V S² Vᵀ the vectors of the other side are U = A V / S: one symmetric eigenproblem
    of the smaller side instead of an SVD. Squaring costs half the digits, so it is done in
    float64: singular values are good to about 1e-16·S1²/S, the side that is divided is
    orthonormal to about 1e-16·(S1/S)². What lies below S1·√(max(m, n)·2.2e-16), about 1e-7·S1,
    is not resolved: those singular values are exactly 0 and so are their vectors, on both sides
    (U Vh is then the partial isometry, without arbitrary directions).

    Raises ValueError for a rank below 1.
    """
    rows, columns = matrix.shape[-2:]
    if rank is not None and rank < 1:
        raise ValueError(f"rank is {rank}; it must be at least 1")
    if rows < columns:
        V, S, Uh = truncated_svd(matrix.mT, rank)
        return Uh.mT, S, V.mT
    tall = matrix.double()
    squares, V = torch.linalg.eigh(tall.mT @ tall)
    S = _resolved_roots(squares, rows).flip(-1)[..., :rank]
    V = V.flip(-1)[..., :rank] * (S > 0).unsqueeze(-2)
    U = tall @ V / torch.where(S > 0, S, 1).unsqueeze(-2)
    return U.to(matrix.dtype), S.to(matrix.dtype), V.mT.to(matrix.dtype)


def low_rank(
    matrix: Float[Tensor, "*batch m n"], rank: int
) -> tuple[Float[Tensor, "*batch m n"], Float[Tensor, "*batch k n"]]:
    """The best rank-k approximation T and S Vh of it: (..., m, n) -> (..., m, n), (..., k, n).

    As `truncated_svd` gives them, k = min(rank, m, n), but as projections on the singular vectors
    of the smaller side, T = A V Vᵀ or U Uᵀ A: nothing is divided, and only Gram matrix and
    eigenvectors are in float64. |S Vh| is good to the eps of the matrix's own dtype times S1.
    """
    rows, columns = matrix.shape[-2:]
    if rows < columns:
        U = torch.linalg.eigh(_gram(matrix.mT)).eigenvectors[..., -rank:]
        U = U.flip(-1).to(matrix.dtype)
        SVh = U.mT @ matrix
        return U @ SVh, SVh
    squares, V = torch.linalg.eigh(_gram(matrix))
    S = squares[..., -rank:].clamp(min=0).sqrt().flip(-1).to(matrix.dtype)
    V = V[..., -rank:].flip(-1).to(matrix.dtype)
    return matrix @ V @ V.mT, S.unsqueeze(-1) * V.mT


def _gram(matrix: Float[Tensor, "*batch m n"]) -> Float64[Tensor, "*batch n n"]:
    """AᵀA in float64, (..., m, n) -> (..., n, n), of one matrix of the batch after the other.

    So that no more than one matrix is ever held in float64.
    """
    if matrix.ndim > 2:
        return torch.stack([_gram(part) for part in matrix])
    exact = matrix.double()
    return exact.mT @ exact


def singular_values(matrix: Float[Tensor, "*batch m n"]) -> Float[Tensor, "*batch r"]:
    """All singular values (..., min(m, n)), descending; accuracy as in `truncated_svd`."""
    rows, columns = matrix.shape[-2:]
    squares = torch.linalg.eigvalsh(_gram(matrix.mT if rows < columns else matrix))
    return _resolved_roots(squares, max(rows, columns)).flip(-1).to(matrix.dtype)


def _resolved_roots(
    squares: Float64[Tensor, "*batch r"], terms: int
) -> Float64[Tensor, "*batch r"]:
    """Roots of a float64 Gram matrix's eigenvalues, 0 below what sums of `terms` terms resolve."""
    floor = squares.amax(-1, keepdim=True) * terms * torch.finfo(torch.float64).eps
    return torch.where(squares > floor, squares, 0).sqrt()
