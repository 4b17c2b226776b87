"""Weight averaging (arXiv 2203.05482) and task arithmetic (arXiv 2212.04089)."""

import torch
from jaxtyping import Float
from torch import Tensor

from optmerge_core.methods.contract import Stack, Weights, check_choice, merge_method, per_expert


@merge_method()
def weight_average(task_vectors: Stack, *, weights: Weights = None) -> Float[Tensor, "*shape"]:
    """The mean of the experts: (experts, *shape) -> (*shape), weighted where `weights` are given.

    Wortsman et al., "Model soups" (2022). Raises `ValueError` if the weights add up to 0.
    """
    if weights is None:
        return task_vectors.mean(dim=0)
    if abs(total := sum(per_expert("weights", weights, len(task_vectors)))) < 1e-8:
        raise ValueError(f"weights {list(weights)} add up to 0: they have no mean")
    return _weighted_sum(task_vectors, weights) / total


@merge_method()
def task_arithmetic(
    task_vectors: Stack, *, weights: Weights = None, normalize: bool = False
) -> Float[Tensor, "*shape"]:
    """The sum of the task vectors, each times its weight if given: (experts, *shape) -> (*shape).

    Ilharco et al., "Editing models with task arithmetic" (2023). With `normalize`, mergekit's, it
    is divided by the sum of the weights, unless that is 0.
    """
    return normalized(_weighted_sum(task_vectors, weights), weights, len(task_vectors), normalize)


def normalized(
    total: Float[Tensor, "*shape"], weights: Weights, experts: int, normalize: bool
) -> Float[Tensor, "*shape"]:
    """A weighted sum, or with `normalize` divided by the sum of its weights, unless that is 0."""
    check_choice("normalize", normalize, (True, False))
    divisor = sum(per_expert("weights", 1.0 if weights is None else weights, experts))
    return total / divisor if normalize and abs(divisor) >= 1e-8 else total


def _weighted_sum(task_vectors: Stack, weights: Weights) -> Float[Tensor, "*shape"]:
    if weights is None:
        return task_vectors.sum(dim=0)
    factors = task_vectors.new_tensor(per_expert("weights", weights, len(task_vectors)))
    merged: Tensor = torch.tensordot(factors, task_vectors, dims=1)
    return merged
