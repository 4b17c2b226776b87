"""DELLA: drop entries at random, small ones rather than large ones (arXiv 2406.11617)."""

import torch
from jaxtyping import Float
from torch import Tensor

from optmerge_core.methods.averages import task_arithmetic
from optmerge_core.methods.contract import (
    Share,
    Stack,
    Weights,
    check_choice,
    check_share,
    merge_method,
    per_expert,
)
from optmerge_core.methods.dare import Generators, draws
from optmerge_core.methods.ties import ties


@merge_method()
def della(
    task_vectors: Stack,
    *,
    density: Share = 0.8,
    epsilon: Share = 0.15,
    rescale: bool = True,
    weights: Weights = None,
    normalize: bool = True,
    generator: Generators = None,
) -> Float[Tensor, "*shape"]:
    """`ties` without trimming, by mergekit's rule, on what `magprune` leaves, times λ.

    (experts, *shape) -> (*shape). Deep et al., "DELLA-merging" (2024), with mergekit's options.
    """
    kept = magprune(task_vectors, density, epsilon, rescale, generator)
    return ties(kept, density=1.0, weights=weights, normalize=normalize, rule="mergekit")


@merge_method()
def della_linear(
    task_vectors: Stack,
    *,
    density: Share = 0.8,
    epsilon: Share = 0.15,
    rescale: bool = True,
    weights: Weights = None,
    normalize: bool = False,
    generator: Generators = None,
) -> Float[Tensor, "*shape"]:
    """Task arithmetic on what `magprune` leaves: (experts, *shape) -> (*shape), times λ."""
    kept = magprune(task_vectors, density, epsilon, rescale, generator)
    return task_arithmetic(kept, weights=weights, normalize=normalize)


def magprune(
    task_vectors: Stack,
    density: Share,
    epsilon: Share,
    rescale: bool = True,
    generator: Generators = None,
) -> Stack:
    """Keep each entry with a probability p by its rank in its row: (experts, *shape) -> the same.

    p rises from density − epsilon for the smallest magnitude to density + epsilon for the largest
    of a row (all entries, of a vector); of equal ones the first ranks lower. What is kept is
    divided by its p, as in the paper, which leaves every entry's expectation; mergekit scales a
    whole tensor to the sum of magnitudes that it had. Without `rescale` it stays. At density 1 all
    is kept. Generators as for `dare`.
    """
    check_choice("rescale", rescale, (True, False))
    experts = len(task_vectors)
    densities = per_expert("density", density, experts)
    windows = per_expert("epsilon", epsilon, experts)
    kept, drawn = task_vectors.clone(), draws(task_vectors, generator)
    for own, p, window, uniform in zip(kept, densities, windows, drawn, strict=True):
        check_share("density", p)
        if p == 1:
            continue
        if not (window >= 0 and p - window > 0 and p + window < 1):
            raise ValueError(
                f"epsilon is {window}; density {p} less and plus it must lie between 0 and 1"
            )
        probabilities = p + window * (2 * _ranks(own) - 1)
        own *= uniform.to(own) < probabilities
        if rescale:
            own /= probabilities
    return kept


def _ranks(tensor: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Of each entry among the magnitudes of its row, from 0 to 1; 1/2 where a row has one entry."""
    rows = tensor.reshape(-1, tensor.shape[-1]) if tensor.ndim else tensor.reshape(1, 1)
    order = rows.abs().argsort(dim=1, stable=True)
    last = rows.shape[1] - 1
    steps = torch.linspace(0, 1, last + 1) if last else torch.full((1,), 0.5)
    ranks = torch.empty_like(rows).scatter_(1, order, steps.to(rows).expand_as(rows))
    return ranks.view(tensor.shape)
