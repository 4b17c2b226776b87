"""DC-Merge: experts' directions in one cover space, where few entries count (arXiv 2603.06242)."""

import torch
from jaxtyping import Float64
from torch import Tensor

from optmerge_core.methods.contract import (
    Matrices,
    Matrix,
    check_choice,
    check_share,
    merge_method,
)
from optmerge_core.methods.svc import EQUAL, NOTHING
from optmerge_core.methods.svd import Triplets, polar, truncated_svd
from optmerge_core.methods.ties import mean_of_sign


@merge_method(matrices_only=True)
def dc_merge(
    task_vectors: Matrices,
    *,
    rank: int | None = None,
    spectrum: str | None = None,
    ramp: float = 5.0,
    density: float = 1e-3,
) -> Matrix:
    """Directionally consistent merging: (experts, m, n) -> (m, n).

    "DC-Merge: improving model merging with directional consistency" (2026), as the released code.
    1. The k leading singular triplets of each τi.
    2. Cover space: the nearest orthonormal matrices Ũ, Ṽ to the experts' vectors beside each other.
    3. In it Mi = Ũᵀ τi Ṽ. Of each Mi the largest entries are kept, a share `density` of all, one at
       least, and with the smallest of them those that are equal to it but for rounding.
    4. Signs are elected by the sum, what agrees is averaged, and of the result the experts' own
       diagonal blocks are kept: back by Ũ · Ṽᵀ.
    λ scales the result, in which a direction counts as in an average.

    rank        k, by default min(m, n) // experts. Directions below 1e-6 of an expert's norm are
                none, so that a LoRA's k is its rank
    spectrum    "kept", or an expert's singular values evened out with their sum kept: "mean" of
                them, or a "ramp" from s to 1, s = min(ramp, S1 / Sk). By default that of the
                released code for either kind: "mean" where fewer than k directions are there
                (LoRA), else "kept"
    """
    check_share("density", density)
    if rank is not None and rank < 1:
        raise ValueError(f"rank is {rank}; it must be at least 1")
    if spectrum is not None:
        check_choice("spectrum", spectrum, ("kept", "mean", "ramp"))
    if not ramp >= 1:
        raise ValueError(f"ramp is {ramp}; it must be at least 1")
    k = max(min(task_vectors.shape[1:]) // len(task_vectors), 1) if rank is None else rank
    parts = [_directions(task_vector.double(), k, spectrum, ramp) for task_vector in task_vectors]
    ends = torch.tensor([0, *(len(S) for _, S, _ in parts)]).cumsum(0).tolist()
    if not ends[-1]:
        return torch.zeros_like(task_vectors[0])
    U, _ = polar(torch.cat([U for U, _, _ in parts], dim=1))
    Vh, _ = polar(torch.cat([Vh for _, _, Vh in parts]))
    blocks = [slice(*pair) for pair in zip(ends[:-1], ends[1:], strict=True)]
    kept = []
    for left, S, right in parts:
        M = U.mT @ left * S @ (right @ Vh.mT)
        sizes = M.abs().flatten()
        limit = sizes.topk(max(1, int(density * sizes.numel()))).values[-1] * (1 - EQUAL)
        own = M.where(M.abs() >= limit, 0)
        kept.append(torch.cat([own[block, block].flatten() for block in blocks]))
    values = torch.stack(kept)
    entries = mean_of_sign(values, values.sum(dim=0).sign(), None, True)
    merged = torch.zeros_like(task_vectors[0], dtype=torch.float64)
    for block in blocks:
        side = block.stop - block.start
        own, entries = entries[: side**2], entries[side**2 :]
        merged += U[:, block] @ own.view(side, side) @ Vh[block]
    return merged.to(task_vectors.dtype)


def _directions(
    matrix: Float64[Tensor, "m n"], most: int, spectrum: str | None, ramp: float
) -> Triplets:
    """An expert's leading triplets, with its spectrum evened out or not."""
    U, S, Vh = truncated_svd(matrix, most)
    there = S > NOTHING * torch.linalg.matrix_norm(matrix)
    U, S, Vh = U[:, there], S[there], Vh[there]
    if spectrum is None:
        spectrum = "kept" if len(S) == min(most, *matrix.shape) else "mean"
    if spectrum == "kept" or not len(S):
        return U, S, Vh
    most_by = min(ramp, (S[0] / S[-1]).item()) if spectrum == "ramp" else 1.0
    shape = torch.linspace(most_by, 1, len(S)).to(S)
    return U, S.sum() * shape / shape.sum(), Vh
