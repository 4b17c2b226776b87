"""DARE: drop entries at random and rescale the rest (arXiv 2311.03099)."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from optmerge_core.methods.averages import normalized, task_arithmetic
from optmerge_core.methods.contract import (
    Share,
    Stack,
    Weights,
    check_share,
    merge_method,
    per_expert,
)
from optmerge_core.methods.ties import ties

Generators = torch.Generator | Sequence[torch.Generator] | None


@merge_method()
def dare_task_arithmetic(
    task_vectors: Stack,
    *,
    drop_rate: Share = 0.2,
    weights: Weights = None,
    normalize: bool = False,
    generator: Generators = None,
) -> Float[Tensor, "*shape"]:
    """Task arithmetic on what `dare` leaves: (experts, *shape) -> (*shape)."""
    if task_vectors.is_cuda and weights is None and not isinstance(drop_rate, Sequence):
        from optmerge_core.methods import kernels

        kept = _draw_kept(task_vectors, drop_rate, generator)
        total = kernels.dare_sum(task_vectors, kept.bool(), drop_rate)
        return normalized(total, weights, len(task_vectors), normalize)
    kept = dare(task_vectors, drop_rate, generator)
    return task_arithmetic(kept, weights=weights, normalize=normalize)


@merge_method()
def dare_ties(
    task_vectors: Stack,
    *,
    drop_rate: Share = 0.2,
    density: Share = 0.2,
    thresholds: Tensor | None = None,
    weights: Weights = None,
    normalize: bool = True,
    rule: str = "released",
    generator: Generators = None,
) -> Float[Tensor, "*shape"]:
    """`ties` on what `dare` leaves (`thresholds` too): (experts, *shape) -> (*shape)."""
    dropped = dare(task_vectors, drop_rate, generator)
    options = {"weights": weights, "normalize": normalize, "rule": rule}
    return ties(dropped, density=density, thresholds=thresholds, **options)


def dare(task_vectors: Stack, drop_rate: Share, generator: Generators = None) -> Stack:
    """Drop each entry with probability p = drop_rate, rescale the rest by 1 / (1 − p).

    Yu et al., "Language models are super Mario" (2024). (experts, *shape) -> the same shape.
    A sequence of drop rates holds one per expert. So does one of generators, so that what is drawn
    for an expert need not depend on its position; a single one (or None, torch's own) draws for all
    in their order.
    """
    dropped = _draw_kept(task_vectors, drop_rate, generator).mul_(task_vectors)
    if not isinstance(drop_rate, Sequence):
        return dropped.div_(1 - drop_rate)
    shares = task_vectors.new_tensor([1 - rate for rate in drop_rate])
    return dropped.div_(shares.view(-1, *[1] * (task_vectors.ndim - 1)))


def _draw_kept(task_vectors: Stack, drop_rate: Share, generator: Generators) -> Stack:
    """1 where `dare` keeps an entry, else 0: (experts, *shape), drawn where the generator lives."""
    rates = per_expert("drop_rate", drop_rate, len(task_vectors))
    for rate in rates:
        check_share("drop_rate", rate, zero=True)
    drawn = draws(task_vectors, generator)
    kept = [uniform.ge_(rate) for uniform, rate in zip(drawn, rates, strict=True)]
    return torch.stack(kept).to(task_vectors)


def draws(task_vectors: Stack, generator: Generators) -> Iterator[Tensor]:
    """Numbers between 0 and 1 for the entries of one expert after the other, where it lives."""
    generators = generator if isinstance(generator, Sequence) else [generator] * len(task_vectors)
    if len(generators) != len(task_vectors):
        raise ValueError(f"{len(generators)} generators for {len(task_vectors)} experts")
    for source in generators:
        place = source.device if source else None
        yield torch.rand(task_vectors.shape[1:], generator=source, device=place)
