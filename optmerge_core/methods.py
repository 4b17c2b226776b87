"""Merge methods: pure functions from a stack of task vectors to one merged task vector.

A method takes (experts, *shape) and returns (*shape) in the same dtype, on the same device. It
knows nothing of names, files or models, and scaling the result is not its business:
merged model = base model + scaling coefficient · merged task vector.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from optmerge_core.blocks import BLOCK, Blocks, kth_smallest, ties_blocks
from optmerge_core.contract import check_choice, check_option_names, check_share, merge_method
from optmerge_core.optmerge import aswudi, optmerge, swudi, wudi
from optmerge_core.spectra import truncated_svd

Generators = torch.Generator | Sequence[torch.Generator] | None
Weights = Sequence[float] | None
"""One number for each expert, by which its task vector counts; None: all the same."""


@merge_method()
def weight_average(task_vectors: Tensor, *, weights: Weights = None) -> Tensor:
    """The mean of the experts: (experts, *shape) -> (*shape), weighted where `weights` are given.

    Wortsman et al., "Model soups" (2022). Raises `ValueError` if the weights add up to 0.
    """
    if weights is None:
        return task_vectors.mean(dim=0)
    if abs(total := sum(per_expert("weights", weights, len(task_vectors)))) < 1e-8:
        raise ValueError(f"weights {list(weights)} add up to 0: they have no mean")
    return _weighted_sum(task_vectors, weights) / total


@merge_method()
def task_arithmetic(task_vectors: Tensor, *, weights: Weights = None) -> Tensor:
    """The sum of the task vectors, each times its weight if given: (experts, *shape) -> (*shape).

    Ilharco et al., "Editing models with task arithmetic" (2023).
    """
    return _weighted_sum(task_vectors, weights)


@merge_method()
def ties(
    task_vectors: Tensor,
    *,
    density: float | Sequence[float] = 0.2,
    thresholds: Tensor | None = None,
    weights: Weights = None,
    normalize: bool = True,
    rule: str = "released",
) -> Tensor:
    """Trim, elect a sign, average what agrees: (experts, *shape) -> (*shape).

    Yadav et al., "TIES-Merging" (2023).
    1. Trim: keep an expert's entries whose magnitude reaches its threshold, by default its own
       `trim_thresholds(task_vectors, density)`; `thresholds` (experts,) are for trimming over a
       whole model.
    2. Elect: an entry's sign is that of its sum over the experts. Where the sum is 0, it is the
       sign that most entries of this tensor have, as in the released code; if that is a draw too,
       the merged entry is 0.
    3. Average, entry by entry, the kept values that have the elected sign.

    What mergekit can do besides: a density for each expert; `weights` times which the trimmed task
    vectors are from step 2 on (the average of step 3 is then a weighted one); their sum in step 3
    instead, without `normalize`; and with `rule="mergekit"` exactly int(density·size) entries of an
    expert, at least one, are kept (`keep_largest`), and the sign of a sum of 0 is +.
    """
    check_choice("rule", rule, ("released", "mergekit"))
    check_choice("normalize", normalize, (True, False))
    if thresholds is None and rule == "mergekit":
        task_vectors = keep_largest(task_vectors, density)
        thresholds = task_vectors.new_zeros(len(task_vectors))
    elif thresholds is None:
        thresholds = trim_thresholds(task_vectors, density)
    if thresholds.shape != task_vectors.shape[:1]:
        raise ValueError(
            f"thresholds have shape {tuple(thresholds.shape)}; "
            f"there must be one for each of the {len(task_vectors)} experts"
        )
    if task_vectors.is_cuda and weights is None and normalize and rule == "released":
        from optmerge_core import kernels

        return kernels.ties(task_vectors, thresholds)
    blocks = Blocks.of(task_vectors, BLOCK << (9 * task_vectors.is_cuda))
    merged = task_vectors.new_empty(blocks.entries)
    options = {"weights": weights, "normalize": normalize, "rule": rule}
    for entries, _, result in _ties_blocks(blocks, thresholds.to(task_vectors), **options):
        merged[entries] = result
    return merged.view(task_vectors.shape[1:])


def _ties_blocks(
    blocks: Blocks, thresholds: Tensor, weights: Weights = None, **options: Any
) -> Iterator[tuple[Any, Tensor | None, Tensor]]:
    if weights is not None:
        weights = thresholds.new_tensor(per_expert("weights", weights, len(thresholds)))[:, None]
    return ties_blocks(blocks, thresholds, weights=weights, **options)


def merges_in_blocks(method: str, options: Mapping[str, Any], trim: str = "tensor") -> bool:
    """Whether `merge_blocks` can do what `METHODS[method]` does with these options."""
    if method == "ties":
        return options.get("rule") != "mergekit" or trim == "model"
    return method in ("weight_average", "task_arithmetic")


def merge_blocks(
    method: str, blocks: Blocks, *, density: Any = 0.2, thresholds: Any = None, **options: Any
) -> Iterator[tuple[Any, Tensor | None, Tensor]]:
    """(entries, block, merged entries), the values of `METHODS[method]`, block by block.

    Some entries may come once more at the end, without their block. For what `merges_in_blocks`,
    with checked options.
    """
    if method == "ties":
        thresholds = trim_thresholds(blocks, density) if thresholds is None else thresholds
        return _ties_blocks(blocks, thresholds, **options)
    return (
        (blocks.place(number), block, METHODS[method](block, **options))
        for number, block in enumerate(blocks)
    )


def trim_thresholds(task_vectors: Tensor | Blocks, density: float | Sequence[float]) -> Tensor:
    """The magnitude an expert's entries must reach to be kept: (experts, *shape) -> (experts,).

    The k-th smallest magnitude with k = int((1 − density)·size), so that slightly more than the
    share `density` is kept, ties included; 0, which keeps everything, when k is 0. A sequence holds
    a density for each expert.
    """
    blocks = task_vectors if isinstance(task_vectors, Blocks) else Blocks.of(task_vectors)
    experts = len(blocks.read(slice(0, 0)))
    densities = per_expert("density", density, experts)
    for share in densities:
        check_share("density", share)
    k = [int((1 - share) * blocks.entries) for share in densities]
    if blocks is not task_vectors and task_vectors.is_cuda:
        magnitudes = task_vectors.flatten(1).abs()
        values = [row.kthvalue(max(n, 1)).values for row, n in zip(magnitudes, k, strict=True)]
        thresholds = torch.stack(values)
    else:
        thresholds = kth_smallest(blocks, [max(n, 1) for n in k])
    return thresholds.where(torch.tensor(k, device=thresholds.device) > 0, 0)


def keep_largest(task_vectors: Tensor, density: float | Sequence[float]) -> Tensor:
    """Task vectors with 0 for all but an expert's int(density·size) largest entries, at least one.

    (experts, *shape) -> the same shape: mergekit's count, one or two entries fewer than those that
    reach `trim_thresholds`. Of entries of equal size it is sorting that chooses, as in mergekit.
    """
    kept = torch.zeros_like(task_vectors)
    shares = per_expert("density", density, len(task_vectors))
    for source, target, share in zip(task_vectors, kept, shares, strict=True):
        check_share("density", share)
        flat = source.flatten()
        largest = flat.abs().argsort(descending=True)[: max(1, int(share * flat.numel()))]
        target.view(-1)[largest] = flat[largest]
    return kept


def per_expert(name: str, values: float | Sequence[float], experts: int) -> list[float]:
    """One number for each expert, from one for all or a sequence, which must have that length."""
    values = list(values) if isinstance(values, Sequence) else [values] * experts
    if len(values) != experts:
        raise ValueError(f"{name} has {len(values)} values for {experts} experts")
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"{name} {values}: finite numbers are expected")
    return values


def _weighted_sum(task_vectors: Tensor, weights: Weights) -> Tensor:
    if weights is None:
        return task_vectors.sum(dim=0)
    weights = task_vectors.new_tensor(per_expert("weights", weights, len(task_vectors)))
    return torch.tensordot(weights, task_vectors, dims=1)


@merge_method()
def dare_task_arithmetic(
    task_vectors: Tensor,
    *,
    drop_rate: float | Sequence[float] = 0.2,
    weights: Weights = None,
    generator: Generators = None,
) -> Tensor:
    """Task arithmetic on task vectors with entries dropped by `dare`."""
    if task_vectors.is_cuda and weights is None and not isinstance(drop_rate, Sequence):
        from optmerge_core import kernels

        kept = _draw_kept(task_vectors, drop_rate, generator)
        return kernels.dare_sum(task_vectors, kept, drop_rate)
    return _weighted_sum(dare(task_vectors, drop_rate, generator), weights)


@merge_method()
def dare_ties(
    task_vectors: Tensor,
    *,
    drop_rate: float | Sequence[float] = 0.2,
    density: float | Sequence[float] = 0.2,
    thresholds: Tensor | None = None,
    weights: Weights = None,
    normalize: bool = True,
    rule: str = "released",
    generator: Generators = None,
) -> Tensor:
    """`ties` on task vectors with entries dropped by `dare`; `thresholds` are those after it."""
    dropped = dare(task_vectors, drop_rate, generator)
    options = {"weights": weights, "normalize": normalize, "rule": rule}
    return ties(dropped, density=density, thresholds=thresholds, **options)


def dare(
    task_vectors: Tensor, drop_rate: float | Sequence[float], generator: Generators = None
) -> Tensor:
    """Drop each entry with probability p = drop_rate, rescale the rest by 1 / (1 − p).

    Yu et al., "Language models are super Mario" (2024). (experts, *shape) -> the same shape.
    A sequence of drop rates holds one per expert. So does one of generators, so that what is drawn
    for an expert need not depend on its position; a single one (or None, torch's own) draws for all
    in their order.
    """
    dropped = task_vectors * _draw_kept(task_vectors, drop_rate, generator)
    if not isinstance(drop_rate, Sequence):
        return dropped / (1 - drop_rate)
    shares = task_vectors.new_tensor([1 - rate for rate in drop_rate])
    return dropped / shares.view(-1, *[1] * (task_vectors.ndim - 1))


def _draw_kept(
    task_vectors: Tensor, drop_rate: float | Sequence[float], generator: Generators
) -> Tensor:
    """Where `dare` keeps an entry: bool, (experts, *shape), drawn where the generator lives."""
    rates = per_expert("drop_rate", drop_rate, len(task_vectors))
    for rate in rates:
        check_share("drop_rate", rate, zero=True)
    generators = generator if isinstance(generator, Sequence) else [generator] * len(task_vectors)
    if len(generators) != len(task_vectors):
        raise ValueError(f"{len(generators)} generators for {len(task_vectors)} experts")

    def draw(source: torch.Generator | None, rate: float) -> Tensor:
        place = source.device if source else None
        return torch.rand(task_vectors.shape[1:], generator=source, device=place) >= rate

    drawn = [draw(*pair) for pair in zip(generators, rates, strict=True)]
    return torch.stack(drawn).to(task_vectors.device)


@merge_method(matrices_only=True)
def tsv(task_vectors: Tensor) -> Tensor:
    """Task singular vectors, decorrelated: (experts, m, n) -> (m, n).

    Gargiulo et al., "Task singular vectors" (2025).
    1. Truncate each task vector to rank k = min(m, n) // experts, at least 1.
    2. Concatenate: U (m, experts·k), S, V (n, experts·k).
    3. Replace U and V by the nearest matrices with orthonormal columns, and multiply back.
    """
    experts, rows, columns = task_vectors.shape
    # In float64, as step 3 tells dependent directions from independent ones.
    U, S, Vh = truncated_svd(task_vectors.double(), max(min(rows, columns) // experts, 1))
    U = nearest_orthonormal(torch.cat(U.unbind(), dim=1))
    V = nearest_orthonormal(Vh.flatten(0, 1).mT)
    return (U * S.flatten() @ V.mT).to(task_vectors.dtype)


def nearest_orthonormal(matrix: Tensor) -> Tensor:
    """P Qᵀ for matrix = P Σ Qᵀ (orthogonal Procrustes): (m, n) -> (m, n).

    Its columns (rows, if there are fewer) are orthonormal; directions the matrix does not have,
    which the problem leaves open, stay 0.
    """
    P, _, Qh = truncated_svd(matrix)
    return P @ Qh


@merge_method(matrices_only=True)
def iso_c(task_vectors: Tensor) -> Tensor:
    """The sum of the task vectors with an even spectrum: (experts, m, n) -> (m, n).

    Marczak et al., "No task left behind: isotropic model merging" (2025): every singular value
    is replaced by the mean of all min(m, n). A direction the sum does not have stays 0.
    """
    U, S, Vh = truncated_svd(task_vectors.sum(dim=0, dtype=torch.float64))
    return (S.mean() * U @ Vh).to(task_vectors.dtype)


class _Methods(dict):
    """The methods by name; asking for one that isn't there is a ValueError naming all."""

    def __missing__(self, name: str) -> Callable:
        raise ValueError(f"there is no merge method {name!r}; methods are {', '.join(self)}")


METHODS: Mapping[str, Callable[..., Tensor]] = _Methods(
    (method.__name__, method)
    for method in (
        weight_average,
        task_arithmetic,
        ties,
        dare_task_arithmetic,
        dare_ties,
        tsv,
        iso_c,
        wudi,
        optmerge,
        swudi,
        aswudi,
    )
)


def check_options(method_name: str, options: Mapping[str, Any], experts: int | None = None) -> None:
    """Raise now, before any long work, the ValueError these options would raise in a merge.

    Names are compared with the method's own, values tried on 1×1 matrices of zeros, as many as
    there are values in a list with one for each expert; with `experts`, it must have that length.
    Of many steps, one is tried.
    `thresholds` and `generator`, which depend on the task vectors, are seen by name only.
    """
    method = METHODS[method_name]
    check_option_names(method, options)
    later = ("generator", "thresholds", "on_step")
    tried = {k: v for k, v in options.items() if k not in later}
    if isinstance(tried.get("steps"), int):
        tried["steps"] = min(tried["steps"], 1)
    lengths = [len(value) for value in tried.values() if isinstance(value, list | tuple)]
    count = (experts or max(*lengths, 1)) if lengths else 1
    method(torch.zeros(count, 1, 1), **tried)
