"""SCE: select what differs, weigh experts by size, erase the minority (arXiv 2408.07990)."""

import torch
from jaxtyping import Float
from torch import Tensor

from optmerge_core.methods.blocks import largest
from optmerge_core.methods.contract import Stack, check_choice, merge_method
from optmerge_core.methods.ties import mean_of_sign


@merge_method()
def sce(
    task_vectors: Stack, *, select_topk: float = 1.0, rule: str = "paper"
) -> Float[Tensor, "*shape"]:
    """Select, calculate, erase: (experts, *shape) -> (*shape), times λ.

    Wan et al., "FuseChat: knowledge fusion of chat models" (2024).
    1. Select: entries whose variance among the experts is largest, the share select_topk of those
       that have any; all at 1. Of equal variances those first in memory.
    2. Calculate: an expert's weight is its share of the selected entries' squares.
    3. Erase: per entry, the weighted mean of the experts with the sign of the sum (0 counts as +).

    rule            "mergekit": the weights are equal where the mean squares add up to less than
                    1e-6, which those of most fine-tuned models do
    """
    check_choice("rule", rule, ("paper", "mergekit"))
    if not 0 <= select_topk <= 1:
        raise ValueError(f"select_topk is {select_topk}; it must lie in [0, 1]")
    rows = task_vectors.flatten(1)
    if select_topk < 1:
        variance = rows.var(dim=0, correction=0)
        rows = rows * largest(variance, int(select_topk * int(variance.count_nonzero())))
    squares = rows.double().square().mean(dim=1)
    total = squares.sum()
    least = 1e-6 if rule == "mergekit" else torch.finfo(torch.float64).tiny
    weights = torch.full_like(squares, 1 / len(squares)) if total < least else squares / total
    factors = weights.to(rows).unsqueeze(1)
    signs = torch.ones_like(rows[0]).copysign(rows.sum(dim=0).add_(0.0))
    merged = mean_of_sign(rows * factors, signs, factors, True)
    return merged.view(task_vectors.shape[1:])
