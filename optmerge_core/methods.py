"""Merge methods: pure functions from a stack of task vectors to one merged task vector.

A method takes (experts, *shape) and returns (*shape) in the same dtype, on the same device. It
knows nothing of names, files or models, and scaling the result is not its business:
merged model = base model + scaling coefficient · merged task vector.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from optmerge_core.contract import check_option_names, check_share, merge_method
from optmerge_core.optmerge import aswudi, optmerge, swudi, wudi
from optmerge_core.spectra import truncated_svd

Generators = torch.Generator | Sequence[torch.Generator] | None
BLOCK = 1 << 15
"""Entries that `ties` works on at a time on a CPU, so that what it computes stays in the cache."""


@merge_method()
def weight_average(task_vectors: Tensor) -> Tensor:
    """The mean of the experts: (experts, *shape) -> (*shape).

    Wortsman et al., "Model soups" (2022).
    """
    return task_vectors.mean(dim=0)


@merge_method()
def task_arithmetic(task_vectors: Tensor) -> Tensor:
    """The sum of the task vectors: (experts, *shape) -> (*shape).

    Ilharco et al., "Editing models with task arithmetic" (2023).
    """
    return task_vectors.sum(dim=0)


@merge_method()
def ties(task_vectors: Tensor, *, density: float = 0.2, thresholds: Tensor | None = None) -> Tensor:
    """Trim, elect a sign, average what agrees: (experts, *shape) -> (*shape).

    Yadav et al., "TIES-Merging" (2023).
    1. Trim: keep an expert's entries whose magnitude reaches its threshold, by default its own
       `trim_thresholds(task_vectors, density)`; `thresholds` (experts,) are for trimming over a
       whole model.
    2. Elect: an entry's sign is that of its sum over the experts. Where the sum is 0, it is the
       sign that most entries of this tensor have, as in the released code; if that is a draw too,
       the merged entry is 0.
    3. Average, entry by entry, the kept values that have the elected sign.
    """
    if thresholds is None:
        thresholds = trim_thresholds(task_vectors, density)
    if thresholds.shape != task_vectors.shape[:1]:
        raise ValueError(
            f"thresholds have shape {tuple(thresholds.shape)}; "
            f"there must be one for each of the {len(task_vectors)} experts"
        )
    if task_vectors.is_cuda:
        from optmerge_core import kernels

        return kernels.ties(task_vectors, thresholds)
    thresholds, flat = thresholds.to(task_vectors).unsqueeze(1), task_vectors.flatten(1)
    blocks = flat.split(BLOCK, dim=1)
    merged, balance, drawn = [], flat.new_zeros(()), []
    for number, block in enumerate(blocks):
        kept = block * (block.abs() >= thresholds)
        signs = kept.sum(dim=0).sign()
        balance += signs.sum()
        merged.append(_mean_of_sign(kept, signs))
        if (kept.any(dim=0) & (signs == 0)).any():
            drawn.append(number)
    for number in drawn:
        kept = blocks[number] * (blocks[number].abs() >= thresholds)
        signs = kept.sum(dim=0).sign()
        signs = torch.where(signs == 0, balance.sign(), signs)
        merged[number] = _mean_of_sign(kept, signs)
    return torch.cat(merged).view(task_vectors.shape[1:])


def _mean_of_sign(values: Tensor, signs: Tensor) -> Tensor:
    """Mean of the values that have an entry's sign: (experts, size), (size,) -> (size,)."""
    agreeing = (values * signs).clamp(min=0)
    return agreeing.sum(dim=0) * signs / (agreeing > 0).sum(dim=0).clamp(min=1)


def trim_thresholds(task_vectors: Tensor, density: float) -> Tensor:
    """The magnitude an expert's entries must reach to be kept: (experts, *shape) -> (experts,).

    The k-th smallest magnitude with k = int((1 − density)·size), so that slightly more than the
    share `density` is kept, ties included; 0, which keeps everything, when k is 0.
    """
    check_share("density", density)
    magnitudes = task_vectors.flatten(1).abs()
    k = int((1 - density) * magnitudes.shape[1])
    if k == 0:
        return magnitudes.new_zeros(len(magnitudes))
    if magnitudes.device.type == "cpu":  # selection in place, several times faster than kthvalue
        magnitudes.numpy().partition(k - 1, axis=1)
        return magnitudes[:, k - 1].clone()
    return magnitudes.kthvalue(k, dim=1).values


@merge_method()
def dare_task_arithmetic(
    task_vectors: Tensor, *, drop_rate: float = 0.2, generator: Generators = None
) -> Tensor:
    """Task arithmetic on task vectors with entries dropped by `dare`."""
    if task_vectors.is_cuda:
        from optmerge_core import kernels

        kept = _draw_kept(task_vectors, drop_rate, generator)
        return kernels.dare_sum(task_vectors, kept, drop_rate)
    return dare(task_vectors, drop_rate, generator).sum(dim=0)


@merge_method()
def dare_ties(
    task_vectors: Tensor,
    *,
    drop_rate: float = 0.2,
    density: float = 0.2,
    thresholds: Tensor | None = None,
    generator: Generators = None,
) -> Tensor:
    """TIES on task vectors with entries dropped by `dare`; `thresholds` are those after it."""
    dropped = dare(task_vectors, drop_rate, generator)
    return ties(dropped, density=density, thresholds=thresholds)


def dare(task_vectors: Tensor, drop_rate: float, generator: Generators = None) -> Tensor:
    """Drop each entry with probability p = drop_rate, rescale the rest by 1 / (1 − p).

    Yu et al., "Language models are super Mario" (2024). (experts, *shape) -> the same shape.
    A sequence of generators holds one per expert, so that what is drawn for an expert need not
    depend on its position; a single one (or None, torch's own) draws for all in their order.
    """
    return task_vectors * _draw_kept(task_vectors, drop_rate, generator) / (1 - drop_rate)


def _draw_kept(task_vectors: Tensor, drop_rate: float, generator: Generators) -> Tensor:
    """Where `dare` keeps an entry: bool, (experts, *shape), drawn where the generator lives."""
    check_share("drop_rate", drop_rate, zero=True)
    generators = generator if isinstance(generator, Sequence) else [generator] * len(task_vectors)
    if len(generators) != len(task_vectors):
        raise ValueError(f"{len(generators)} generators for {len(task_vectors)} experts")

    def draw(source: torch.Generator | None) -> Tensor:
        place = source.device if source else None
        return torch.rand(task_vectors.shape[1:], generator=source, device=place) >= drop_rate

    return torch.stack([draw(source) for source in generators]).to(task_vectors.device)


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


def check_options(method_name: str, options: Mapping[str, Any]) -> None:
    """Raise now, before any long work, the ValueError these options would raise in a merge.

    Names are compared with the method's own, values tried on a 1×1 matrix of zeros; what depends
    on the number of experts (`thresholds`, `generator`) is seen by name only.
    """
    method = METHODS[method_name]
    check_option_names(method, options)
    later = ("generator", "thresholds", "on_step")
    method(torch.zeros(1, 1, 1), **{k: v for k, v in options.items() if k not in later})
