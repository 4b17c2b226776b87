"""Iso-C: the sum with an even spectrum (arXiv 2502.04959)."""

import torch

from optmerge_core.methods.contract import Matrices, Matrix, check_choice, fills, merge_method
from optmerge_core.methods.svd import polar


@merge_method(matrices_only=True)
def iso_c(
    task_vectors: Matrices, *, null_directions: str = "zero", mean_over: str = "all"
) -> Matrix:
    """The sum of the task vectors with an even spectrum: (experts, m, n) -> (m, n).

    Marczak et al., "No task left behind: isotropic model merging" (2025): every singular value
    is replaced by the mean of all min(m, n), as in the released code.

    null_directions     where the sum has no direction (of adapters: all but Σ r), it stays 0
                        ("zero"), or "fill": gets the mean too, in the directions of `filled_svd`;
                        the released code does that, in those that rounding in float32 leaves it
    mean_over           "all" min(m, n) singular values, or the "nonzero" ones (Σ r of adapters; all
                        of whole models in half precision, by their rounding), which makes the
                        result longer by min(m, n) / Σ r
    """
    check_choice("mean_over", mean_over, ("all", "nonzero"))
    total = task_vectors.sum(dim=0, dtype=torch.float64)
    even, S = polar(total, fill=fills(null_directions))
    count = S.count_nonzero().clamp(min=1) if mean_over == "nonzero" else len(S)
    return (S.sum() / count * even).to(task_vectors.dtype)
