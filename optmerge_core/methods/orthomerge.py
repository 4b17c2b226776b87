"""OrthoMerge: experts as rotations of the base, and what is left of them (arXiv 2602.05943)."""

import torch
from jaxtyping import Float64
from torch import Tensor

from optmerge_core.methods.averages import task_arithmetic
from optmerge_core.methods.contract import Matrices, Matrix, check_choice, merge_method
from optmerge_core.methods.svd import polar
from optmerge_core.methods.ties import ties
from optmerge_core.methods.tsv import tsv

RESIDUALS = {"task_arithmetic": task_arithmetic, "ties": ties, "tsv": tsv}
HALF_TURN = 1e-10
"""Of 2 + R + Rᵀ, whose eigenvalues are 2 + 2 cos θ: what lies below turns by π, which has no A."""


@merge_method(matrices_only=True)
def orthomerge(
    task_vectors: Matrices,
    *,
    base: Matrix,
    residual: str = "task_arithmetic",
    residual_scale: float = 0.2,
    side: str = "smaller",
) -> Matrix:
    """Orthogonal and residual parts merged apart: (experts, m, n), base (m, n) -> (m, n).

    Yang et al., "Orthogonal model merging" (2026). With W0 the base's matrix and Wi the experts':
    1. Ri, the orthogonal matrix for which W0 Ri is nearest to Wi: Procrustes of W0ᵀ Wi.
    2. Cayley transforms Ai = (Ri + I)⁻¹ (Ri − I), skew, are added and made as long as they are on
       average: A = mean ‖Ai‖F · Σ Ai / ‖Σ Ai‖F; and R = (I − A)⁻¹ (I + A).
    3. τm = W0 R − W0 + residual_scale · merge(Wi − W0 Ri).
    At λ = 1, W0 + τm is the published result.

    residual        the method of step 3: "task_arithmetic", "ties" or "tsv", by its defaults
    side            what turns: the "smaller" side, inputs as in the formula, or outputs where they
                    are fewer (Ri W0); or always the "inputs" as in the released code, where the
                    n×n Procrustes of a wide matrix, of rank m, is arbitrary in the rest
    Where W0ᵀ Wi has no direction, Ri is the nearest to I; an expert without a task vector turns
    nothing, and half a turn, which has no axis, counts as none. In float64.
    """
    check_choice("residual", residual, RESIDUALS)
    check_choice("side", side, ("smaller", "inputs"))
    if side == "smaller" and base.shape[0] < base.shape[1]:
        options = {"residual": residual, "residual_scale": residual_scale, "side": "inputs"}
        turned: Matrix = orthomerge(task_vectors.mT, base=base.mT.contiguous(), **options).mT
        return turned
    W0 = base.double()
    skews = [_skew(W0, task_vector.double()) for task_vector in task_vectors]
    rests = torch.empty_like(task_vectors)
    for rest, task_vector, A in zip(rests, task_vectors, skews, strict=True):
        rest.copy_(task_vector.double() - W0 @ _turn(A))
    length = torch.stack([torch.linalg.matrix_norm(A) for A in skews]).mean()
    total = torch.stack(skews).sum(dim=0)
    norm = torch.linalg.matrix_norm(total)
    merged = W0 @ _turn(total * (length / norm if norm > 0 else 0.0))
    return merged.to(base.dtype) + residual_scale * RESIDUALS[residual](rests)


def _skew(
    W0: Float64[Tensor, "m n"], task_vector: Float64[Tensor, "m n"]
) -> Float64[Tensor, "n n"]:
    """The Cayley transform of Ri, (2 + Ri + Riᵀ)⁻¹ (Ri − Riᵀ)."""
    columns = W0.shape[1]
    if not task_vector.any():
        return W0.new_zeros(columns, columns)
    R, S = polar(W0.mT @ (W0 + task_vector))
    if not S.all():  # complete it by what is nearest to I
        own = torch.eye(columns).to(R)
        R = R + polar((own - R @ R.mT) @ (own - R.mT @ R))[0]
    symmetric = R + R.mT
    symmetric.diagonal().add_(2)
    L, failed = torch.linalg.cholesky_ex(symmetric)
    if failed or L.diagonal().min() < HALF_TURN**0.5:
        A = torch.linalg.pinv(symmetric, atol=HALF_TURN, hermitian=True) @ (R - R.mT)
    else:
        A = torch.cholesky_solve(R - R.mT, L)
    skew: Tensor = (A - A.mT) / 2
    return skew


def _turn(A: Float64[Tensor, "n n"]) -> Float64[Tensor, "n n"]:
    """R − I = 2 (I − A)⁻¹ A of the rotation R whose Cayley transform is A."""
    turn: Tensor = torch.linalg.solve(torch.eye(len(A)).to(A) - A, 2 * A)
    return turn
