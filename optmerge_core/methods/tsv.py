"""Task singular vectors, decorrelated (arXiv 2412.00081)."""

import torch

from optmerge_core.methods.contract import Matrices, Matrix, merge_method
from optmerge_core.methods.svd import polar, truncated_svd


@merge_method(matrices_only=True)
def tsv(task_vectors: Matrices) -> Matrix:
    """Task singular vectors, decorrelated: (experts, m, n) -> (m, n).

    Gargiulo et al., "Task singular vectors" (2025).
    1. Truncate each task vector to rank k = min(m, n) // experts, at least 1.
    2. Concatenate: U (m, experts·k), S, V (n, experts·k).
    3. Replace U and V by the nearest matrices with orthonormal columns, and multiply back.
    """
    experts, rows, columns = task_vectors.shape
    # In float64, as step 3 tells dependent directions from independent ones.
    rank = max(min(rows, columns) // experts, 1)
    triplets = [truncated_svd(task_vector.double(), rank) for task_vector in task_vectors]
    U, _ = polar(torch.cat([U for U, _, _ in triplets], dim=1))
    Vh, _ = polar(torch.cat([Vh for _, _, Vh in triplets]))
    return (U * torch.cat([S for _, S, _ in triplets]) @ Vh).to(task_vectors.dtype)
