"""Model Breadcrumbs: neither the smallest entries nor the outliers (arXiv 2312.06795)."""

import torch
from jaxtyping import Float
from torch import Tensor

from optmerge_core.methods.averages import task_arithmetic
from optmerge_core.methods.blocks import largest
from optmerge_core.methods.contract import (
    Share,
    Stack,
    Weights,
    check_share,
    merge_method,
    per_expert,
)
from optmerge_core.methods.ties import ties


@merge_method()
def breadcrumbs(
    task_vectors: Stack,
    *,
    density: Share = 0.9,
    gamma: Share = 0.01,
    weights: Weights = None,
    normalize: bool = False,
) -> Float[Tensor, "*shape"]:
    """Task arithmetic on what `crumbs` leaves: (experts, *shape) -> (*shape), times λ.

    Davari and Belilovsky, "Model breadcrumbs" (2023), with mergekit's options and their defaults.
    """
    kept = crumbs(task_vectors, density, gamma)
    return task_arithmetic(kept, weights=weights, normalize=normalize)


@merge_method()
def breadcrumbs_ties(
    task_vectors: Stack,
    *,
    density: Share = 0.9,
    gamma: Share = 0.01,
    weights: Weights = None,
    normalize: bool = False,
) -> Float[Tensor, "*shape"]:
    """`ties` without trimming, by mergekit's rule, on what `crumbs` leaves; without `normalize` the
    sum of what agrees: (experts, *shape) -> (*shape), times λ."""
    kept = crumbs(task_vectors, density, gamma)
    return ties(kept, density=1.0, weights=weights, normalize=normalize, rule="mergekit")


def crumbs(task_vectors: Stack, density: Share, gamma: Share) -> Stack:
    """Of each expert int(density·size) entries: the largest but for int(gamma·size) outliers.

    Fewer outliers go where there would else be too few; all stay at density 1, as in mergekit. Of
    equal magnitudes those first in memory count as larger.
    """
    experts = len(task_vectors)
    densities, gammas = per_expert("density", density, experts), per_expert("gamma", gamma, experts)
    kept = task_vectors.clone(memory_format=torch.contiguous_format)
    for row, share, top in zip(kept.view(experts, -1), densities, gammas, strict=True):
        check_share("density", share)
        check_share("gamma", top, zero=True)
        if share < 1:
            count = int(share * len(row))
            outliers = min(int(top * len(row)), len(row) - count)
            row *= largest(row, count + outliers) & ~largest(row, outliers)
    return kept
