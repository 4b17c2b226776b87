"""Iso-CTS: Iso-C with some directions of each expert's own (arXiv 2502.04959)."""

import torch
from jaxtyping import Float64
from torch import Tensor

from optmerge_core.methods.contract import (
    Matrices,
    Matrix,
    check_choice,
    check_share,
    fills,
    merge_method,
)
from optmerge_core.methods.svc import NOTHING
from optmerge_core.methods.svd import Triplets, filled_svd, polar, singular_values, truncated_svd


@merge_method(matrices_only=True)
def iso_cts(
    task_vectors: Matrices,
    *,
    common_ratio: float = 0.8,
    size: str = "all",
    null_directions: str = "zero",
) -> Matrix:
    """Common and own directions with an even spectrum: (experts, m, n) -> (m, n).

    Marczak et al., "No task left behind: isotropic model merging" (2025), as the released code.
    1. Common: the leading c singular triplets of Σ τi, c about common_ratio of all q.
    2. Own: of each τi, less its part in the span of those c left vectors, the leading
       (q − c) / experts triplets.
    3. Own and common ones beside each other; left and right vectors replaced by the nearest
       orthonormal ones; all singular values by the mean of these q.
    λ scales the result, whose spectral norm is that mean.

    size                q is "all" min(m, n); or of "nonzero" ones, the sum of the experts' ranks
                        (at most min(m, n)). Of adapters' task vectors, "all" leaves nothing to
                        the experts where c is no less than Σ r: then the result is Iso-C's
    null_directions     what `iso_c` says of it
    """
    check_share("common_ratio", common_ratio)
    check_choice("size", size, ("all", "nonzero"))
    fill, q = fills(null_directions), min(task_vectors.shape[1:])
    if size == "nonzero":
        q = min(
            q, max(1, sum(int(singular_values(x.double()).count_nonzero()) for x in task_vectors))
        )
    common, own = counts(q, len(task_vectors), common_ratio)
    return from_counts(task_vectors, common, own, q, fill)


def counts(q: int, experts: int, common_ratio: float) -> tuple[int, int]:
    """How many triplets are common, and how many each expert's own: together q."""
    own = min(round((q - int(common_ratio * q)) / experts), q // experts)
    return q - own * experts, own


def from_counts(
    task_vectors: Matrices, common: int, own: int, q: int, fill: bool = False
) -> Matrix:
    """`iso_cts` with the numbers of triplets; the mean is over q of them, be they 0 or not."""
    total = task_vectors.sum(dim=0, dtype=torch.float64)
    shared = _leading(total, common, fill, len(task_vectors))
    parts = []
    for place, task_vector in enumerate(task_vectors):
        matrix = task_vector.double()
        rest = matrix - shared[0] @ (shared[0].mT @ matrix)
        floor = NOTHING * torch.linalg.matrix_norm(matrix).item()
        parts.append(_leading(rest, own, fill, place, floor))
    parts.append(shared)
    U, _ = polar(torch.cat([U for U, _, _ in parts], dim=1), fill=fill, seed=len(parts))
    Vh, _ = polar(torch.cat([Vh for _, _, Vh in parts]), fill=fill, seed=len(parts) + 1)
    mean = torch.cat([S for _, S, _ in parts]).sum() / q
    return (mean * (U @ Vh)).to(task_vectors.dtype)


def _leading(
    matrix: Float64[Tensor, "m n"], rank: int, fill: bool, seed: int, floor: float = 0.0
) -> Triplets:
    """`rank` leading triplets, which may be none; those up to `floor` are null directions."""
    if rank == 0:
        return matrix[:, :0], matrix[0, :0], matrix[:0]
    if fill:
        return filled_svd(matrix, rank, seed, floor)
    U, S, Vh = truncated_svd(matrix, rank)
    there = floor < S
    return U * there, S * there, Vh * there.unsqueeze(-1)
