"""Iso-C: the sum with an even spectrum (arXiv 2502.04959)."""

import torch

from optmerge_core.methods.contract import Matrices, Matrix, merge_method
from optmerge_core.methods.svd import polar


@merge_method(matrices_only=True)
def iso_c(task_vectors: Matrices) -> Matrix:
    """The sum of the task vectors with an even spectrum: (experts, m, n) -> (m, n).

    Marczak et al., "No task left behind: isotropic model merging" (2025): every singular value
    is replaced by the mean of all min(m, n). A direction the sum does not have stays 0.
    """
    even, S = polar(task_vectors.sum(dim=0, dtype=torch.float64))
    return (S.mean() * even).to(task_vectors.dtype)
