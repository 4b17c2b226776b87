"""SSAM: the sum of the task vectors within the directions that they share (arXiv 2603.21584)."""

import torch
from jaxtyping import Float64
from torch import Tensor

from optmerge_core.methods.contract import Matrices, Matrix, check_share, merge_method
from optmerge_core.methods.svd import eigenpairs, gram, truncated_svd


@merge_method(matrices_only=True)
def ssam(
    task_vectors: Matrices, *, rank_ratio: float | None = None, sequential: bool = False
) -> Matrix:
    """Singular subspace alignment and merging: (experts, m, n) -> (m, n).

    Reza et al., "SSAM: singular subspace alignment for merging multimodal large language models"
    (2026). Uc and Vc are the leading eigenvectors of Σ τi τiᵀ and Σ τiᵀ τi:

        τm = Uc Ucᵀ (Σ τi) Vc Vcᵀ,    times λ

    rank_ratio      how many, as a share of min(m, n). The paper's rule is not known here: choose
                    it on validation questions. None: min(m, n) // experts. Where the experts'
                    ranks, together, are no more than that, the result is their sum
    sequential      take the larger side's vectors from what the smaller side's projection has
                    left of the τi: at most experts·k columns, where the published ones need the
                    Gram matrix of min(m, n, Σ ranks) of the experts beside each other, which for
                    whole models is the larger side's own
    """
    experts, rows, columns = task_vectors.shape
    if rank_ratio is not None:
        check_share("rank_ratio", rank_ratio)
    if rows < columns:
        turned: Matrix = ssam(task_vectors.mT, rank_ratio=rank_ratio, sequential=sequential).mT
        return turned
    rank = columns // experts if rank_ratio is None else int(rank_ratio * columns)
    squares, basis = eigenpairs(gram(task_vectors.flatten(0, 1)), experts * rows)
    right, seen = basis[:, : max(rank, 1)], basis[:, : max(int(squares.count_nonzero()), 1)]
    left = _shared(task_vectors, right if sequential else seen, max(rank, 1))
    total = task_vectors.sum(dim=0, dtype=torch.float64)
    merged = left @ (left.mT @ total @ right) @ right.mT
    return merged.to(task_vectors.dtype)


def _shared(
    task_vectors: Matrices, right: Float64[Tensor, "n _"], rank: int
) -> Float64[Tensor, "m k"]:
    """The leading left singular vectors of all τi V beside each other."""
    parts = [matrix.double() @ right for matrix in task_vectors]
    return truncated_svd(torch.cat(parts, dim=1), rank)[0]
