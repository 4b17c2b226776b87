"""Task singular vectors, decorrelated (arXiv 2412.00081)."""

import torch

from optmerge_core.methods.contract import Matrices, Matrix, fills, merge_method
from optmerge_core.methods.svd import filled_svd, polar, truncated_svd


@merge_method(matrices_only=True)
def tsv(task_vectors: Matrices, *, null_directions: str = "zero") -> Matrix:
    """Task singular vectors, decorrelated: (experts, m, n) -> (m, n).

    Gargiulo et al., "Task singular vectors" (2025).
    1. Truncate each task vector to rank k = min(m, n) // experts, at least 1.
    2. Concatenate: U (m, experts·k), S, V (n, experts·k).
    3. Replace U and V by the nearest matrices with orthonormal columns, and multiply back.

    Of a task vector of rank below k, U and V have columns of 0 ("zero"), or with the
    null_directions "fill" those of `filled_svd`, drawn by the expert's place. They count for
    nothing in step 1 but take room in step 3, where the others turn away from them; the released
    code does that, with those that rounding in float32 leaves it.
    """
    experts, rows, columns = task_vectors.shape
    fill = fills(null_directions)
    # In float64, as step 3 tells dependent directions from independent ones.
    rank = max(min(rows, columns) // experts, 1)
    triplets = [
        filled_svd(matrix, rank, seed=place) if fill else truncated_svd(matrix.double(), rank)
        for place, matrix in enumerate(task_vectors)
    ]
    U, S = torch.cat([U for U, _, _ in triplets], dim=1), torch.cat([S for _, S, _ in triplets])
    Vh = torch.cat([Vh for _, _, Vh in triplets])
    if not fill and S.any():  # columns of 0 stay 0, and step 3 grows with their number cubed
        U, S, Vh = U[:, S > 0], S[S > 0], Vh[S > 0]
    U, _ = polar(U, fill=fill, seed=experts)
    Vh, _ = polar(Vh, fill=fill, seed=experts + 1)
    return (U * S @ Vh).to(task_vectors.dtype)
