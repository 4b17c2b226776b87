"""WUDI: the merged task vector that interferes least with every expert (arXiv 2503.08099)."""

from optmerge_core.methods.contract import Matrices, Matrix, merge_method
from optmerge_core.methods.interference import Descent, OnStep, minimise_interference


@merge_method(matrices_only=True)
def wudi(
    task_vectors: Matrices,
    *,
    init: str = "sum",
    optimizer: str = "adam",
    learning_rate: float = 1e-5,
    learning_rate_unit: str = "absolute",
    momentum: float = 0.9,
    steps: int = 300,
    shrink: float = 0.1,
    on_step: OnStep = None,
) -> Matrix:
    """Minimise Σi ‖(τ − τi) τiᵀ‖²F / ‖τi‖²F (Eq. 1 of OptMerge): (experts, m, n) -> (m, n).

    Cheng et al., "Whoever started the interference should end it" (2025): the interference with
    the task vectors themselves as targets and subspaces. The options are those of `optmerge`.
    """
    descent = Descent(init, optimizer, learning_rate, learning_rate_unit, momentum, steps, shrink)
    return minimise_interference(task_vectors, task_vectors, task_vectors, descent, on_step)
