"""SVC: how often a merge counts a direction, and its singular values divided by it.

Singular value calibration of the result of any merge method (arXiv 2602.05536).
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from optmerge_core.methods.contract import Matrices, Matrix, Stack, check_task_vectors
from optmerge_core.methods.svd import gram, truncated_svd

EQUAL = 1e-6
"""Singular values are one where they differ by less, relatively: float32 moves them by 1e-7."""
NOTHING = 1e-6
"""Of an expert's norm: a component below is its rounding, and counts as none."""


class Counted(NamedTuple):
    """The singular triplets of a merged task vector, and the experts' components along them."""

    U: Float64[Tensor, "m r"]
    S: Float64[Tensor, " r"]
    Vh: Float64[Tensor, "r n"]
    energy: Float64[Tensor, "experts r"]
    """‖ai‖², ai = urᵀ τi"""
    inner: Float64[Tensor, "experts r"]
    """⟨urᵀ M, ai⟩"""


@torch.no_grad()
def svc(
    merged_task_vector: Float[Tensor, "*shape"], task_vectors: Stack, alpha: float = 1.0
) -> Float[Tensor, "*shape"]:
    """The merged task vector with calibrated singular values: (*shape), (experts, *shape).

    M = U Σ Vᵀ is merged of the τi. How often it counts expert i along ur is the over-accumulation
    si = ⟨urᵀ M, urᵀ τi⟩ / ‖urᵀ τi‖², 0 where the expert has nothing there (`NOTHING`), and

        σr ← γr σr,    γr = experts / Σi max(alpha, si)

    alpha is the least that counts; published are 1 after TSV and Iso-CTS, 1 / experts after sums.
    Equal singular values (all of Iso-C's) do not tell their directions: among them ur are those of
    Σ τi. A mixture's matrices (matrices, m, n) are calibrated one by one; what is no matrix stays
    as it is. Same dtype and device; computed in float64.

    Raises ValueError for an alpha that is not positive, other shapes, and as methods do.
    """
    check_task_vectors(task_vectors)
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha is {alpha}; it must be a positive number")
    if merged_task_vector.shape != task_vectors.shape[1:]:
        raise ValueError(
            f"merged_task_vector has shape {tuple(merged_task_vector.shape)}, the task vectors "
            f"{tuple(task_vectors.shape[1:])}; give those that it was merged of"
        )
    if merged_task_vector.ndim == 3:
        pairs = zip(merged_task_vector, task_vectors.unbind(1), strict=True)
        return torch.stack([svc(matrix, own, alpha) for matrix, own in pairs])
    if merged_task_vector.ndim != 2:
        return merged_task_vector
    U, S, Vh, energy, inner = counted(merged_task_vector, task_vectors)
    s = inner / torch.where(energy > 0, energy, 1)
    calibrated = len(task_vectors) / s.clamp(min=alpha).sum(dim=0) * S
    return (U * calibrated @ Vh).to(merged_task_vector.dtype)


def counted(merged_task_vector: Matrix, task_vectors: Matrices) -> Counted:
    """(m, n) and (experts, m, n) -> the triplets of singular values above 0, and components."""
    U, S, Vh = _directions(merged_task_vector.double(), task_vectors)
    energy = U.new_zeros(len(task_vectors), len(S))
    inner = torch.zeros_like(energy)
    for expert, task_vector in enumerate(task_vectors):
        own = U.mT @ task_vector.double()
        squares = own.square().sum(dim=1)
        there = squares > (NOTHING * torch.linalg.matrix_norm(task_vector).double()) ** 2
        energy[expert] = squares * there
        inner[expert] = (own * Vh).sum(dim=1) * S * there
    return Counted(U, S, Vh, energy, inner)


def _directions(
    merged: Float64[Tensor, "m n"], task_vectors: Matrices
) -> tuple[Float64[Tensor, "m r"], Float64[Tensor, " r"], Float64[Tensor, "r n"]]:
    """Its singular triplets but for those of 0; among equal ones, those of Σ τi."""
    U, S, Vh = truncated_svd(merged)
    kept = S > 0
    U, S, Vh = U[:, kept], S[kept], Vh[kept]
    total = task_vectors.sum(dim=0, dtype=torch.float64)
    ends = (S[:-1] - S[1:] > EQUAL * S[:-1]).nonzero().flatten() + 1
    for same in torch.arange(len(S)).tensor_split(ends.cpu()):
        if len(same) > 1:
            turned = torch.linalg.eigh(gram((U[:, same].mT @ total).mT))[1]
            U[:, same], Vh[same] = U[:, same] @ turned, turned.mT @ Vh[same]
    return U, S, Vh
