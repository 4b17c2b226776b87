"""Singular value decompositions by the Gram matrix of the smaller side."""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

STRIPE, SLAB = 128, 512
"""Columns and rows of a matrix that are multiplied at a time: see `gram`."""
Triplets = tuple[Float64[Tensor, "m k"], Float64[Tensor, " k"], Float64[Tensor, "k n"]]
"""Of a matrix in float64: U, S and Vh."""


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
    if rank is not None and rank < 1:
        raise ValueError(f"rank is {rank}; it must be at least 1")
    if _is_wide(matrix):
        V, S, Uh = truncated_svd(matrix.mT, rank)
        return Uh.mT, S, V.mT
    squares, V = eigenpairs(gram(matrix), matrix.shape[-2])
    S, V = squares[..., :rank].sqrt(), V[..., :rank]
    U = matrix.double() @ V / torch.where(S > 0, S, 1).unsqueeze(-2)
    return U.to(matrix.dtype), S.to(matrix.dtype), V.mT.to(matrix.dtype)


def filled_svd(
    matrix: Float[Tensor, "m n"], rank: int | None = None, seed: int = 0, floor: float = 0.0
) -> tuple[Float[Tensor, "m k"], Float[Tensor, " k"], Float[Tensor, "k n"]]:
    """`truncated_svd` in float64 with singular vectors for what is not resolved, too.

    Singular values up to `floor` count as not resolved.

    Which null directions those are is arbitrary: an SVD in float32 has what rounding gives. Here
    they are what Gram-Schmidt leaves of Gaussian columns drawn by 2·seed for U and 2·seed + 1 for
    V, on the CPU: they hang on the spans of the other vectors alone, not on device or threads.
    """
    U, S, Vh = truncated_svd(matrix.double(), rank)
    there = floor < S
    U, Vh = U * there, Vh * there.unsqueeze(-1)
    return _completed(U, 2 * seed), S * there, _completed(Vh.mT, 2 * seed + 1).mT


def _completed(basis: Float64[Tensor, "m k"], seed: int) -> Float64[Tensor, "m k"]:
    """The same columns but for those of zeros, in whose place there are orthonormal ones."""
    given = basis[:, basis.any(dim=0)]
    missing, generator = basis.shape[1] - given.shape[1], torch.Generator().manual_seed(seed)
    drawn = torch.randn(len(basis), missing, generator=generator, dtype=torch.float64)
    Q, R = torch.linalg.qr(torch.cat([given, drawn.to(basis.device)], dim=1))
    completed: Tensor = Q * R.diagonal().sign()
    return completed


def polar(
    matrix: Float[Tensor, "m n"], *, fill: bool = False, seed: int = 0
) -> tuple[Float[Tensor, "m n"], Float[Tensor, " r"]]:
    """P Qᵀ of matrix = P Σ Qᵀ, and Σ: (m, n) -> (m, n), (min(m, n)) descending.

    The nearest matrix with orthonormal columns, or rows if there are fewer (Procrustes), made as
    A V S⁻¹ Vᵀ; accuracy as in `truncated_svd`, and what is not resolved is 0 here too, or with
    `fill` the directions of `filled_svd`.
    """
    if fill:
        P, S, Qh = filled_svd(matrix, seed=seed)
        return (P @ Qh).to(matrix.dtype), S.to(matrix.dtype)
    if _is_wide(matrix):
        turned, S = polar(matrix.mT)
        return turned.mT, S
    squares, V = eigenpairs(gram(matrix), len(matrix))
    S = squares.sqrt()
    turned = matrix.double() @ (V / torch.where(S > 0, S, 1) @ V.mT)
    return turned.to(matrix.dtype), S.to(matrix.dtype)


def low_rank(
    matrix: Float[Tensor, "*batch m n"], rank: int
) -> tuple[Float[Tensor, "*batch m n"], Float[Tensor, "*batch k n"]]:
    """The best rank-k approximation T and S Vh of it: (..., m, n) -> (..., m, n), (..., k, n).

    As `truncated_svd` gives them, k = min(rank, m, n), but as projections on the singular vectors
    of the smaller side, T = A V Vᵀ or U Uᵀ A: nothing is divided, and only Gram matrix and
    eigenvectors are in float64. |S Vh| is good to the eps of the matrix's own dtype times S1.
    """
    basis, SVh = _leading(matrix, rank)
    return basis @ SVh if _is_wide(matrix) else matrix @ basis @ basis.mT, SVh


def row_space(matrix: Float[Tensor, "*batch m n"], rank: int) -> Float[Tensor, "*batch k n"]:
    """S Vh of `low_rank` alone: (..., m, n) -> (..., k, n)."""
    return _leading(matrix, rank)[1]


def _leading(
    matrix: Float[Tensor, "*batch m n"], rank: int
) -> tuple[Float[Tensor, "*batch _ k"], Float[Tensor, "*batch k n"]]:
    """The leading singular vectors of the smaller side, in columns, and S Vh.

    Of a batch one matrix after the other, so that no more than one is ever in float64.
    """
    if matrix.ndim > 2:
        parts = [_leading(part, rank) for part in matrix]
        return torch.stack([basis for basis, _ in parts]), torch.stack([SVh for _, SVh in parts])
    wide = _is_wide(matrix)
    squares, vectors = torch.linalg.eigh(gram(matrix.mT if wide else matrix))
    basis = vectors[:, -rank:].flip(-1).to(matrix.dtype)
    if wide:
        return basis, basis.mT @ matrix
    S = squares[-rank:].clamp(min=0).sqrt().flip(-1).to(matrix.dtype)
    return basis, S.unsqueeze(-1) * basis.mT


def _is_wide(matrix: Tensor) -> bool:
    return matrix.shape[-2] < matrix.shape[-1]


def gram(matrix: Float[Tensor, "*batch m n"]) -> Float64[Tensor, "*batch n n"]:
    """AᵀA in float64: (..., m, n) -> (..., n, n).

    Of `STRIPE` columns after the other only what lies on and left of the diagonal is multiplied,
    about half of it all, and mirrored. `SLAB` rows at a time are converted, which the cache holds.
    """
    if matrix.ndim > 2:
        return torch.stack([gram(part) for part in matrix])
    rows, columns = matrix.shape
    product = torch.zeros(columns, columns, dtype=torch.float64, device=matrix.device)
    stripes = [slice(start, start + STRIPE) for start in range(0, columns, STRIPE)]
    for start in range(0, rows, SLAB):
        slab = matrix[start : start + SLAB].double()
        for own in stripes:
            product[own, : own.stop].addmm_(slab[:, own].mT, slab[:, : own.stop])
    for own in stripes:
        product[: own.start, own] = product[own, : own.start].mT
    return product


def singular_values(matrix: Float[Tensor, "*batch m n"]) -> Float[Tensor, "*batch r"]:
    """All singular values (..., min(m, n)), descending; accuracy as in `truncated_svd`."""
    squares = torch.linalg.eigvalsh(gram(matrix.mT if _is_wide(matrix) else matrix))
    return _resolved(squares, max(matrix.shape[-2:])).flip(-1).sqrt().to(matrix.dtype)


def eigenpairs(
    gram: Float64[Tensor, "*batch r r"], terms: int
) -> tuple[Float64[Tensor, "*batch r"], Float64[Tensor, "*batch r r"]]:
    """Eigenvalues, descending, and eigenvectors, in columns, of Gram matrices of `terms` rows.

    What their sums do not resolve is exactly 0, eigenvalues and vectors alike.
    """
    squares, vectors = torch.linalg.eigh(gram)
    squares = _resolved(squares, terms).flip(-1)
    return squares, vectors.flip(-1) * (squares > 0).unsqueeze(-2)


def _resolved(squares: Float64[Tensor, "*batch r"], terms: int) -> Float64[Tensor, "*batch r"]:
    """A float64 Gram matrix's eigenvalues, 0 below what sums of `terms` terms resolve."""
    floor = squares.amax(-1, keepdim=True) * terms * torch.finfo(torch.float64).eps
    return torch.where(squares > floor, squares, 0)
