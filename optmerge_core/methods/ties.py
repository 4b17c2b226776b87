"""TIES merging: trim, elect a sign, average what agrees (arXiv 2306.01708)."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from optmerge_core.methods.blocks import BLOCK, Blocks
from optmerge_core.methods.contract import (
    Weights,
    check_choice,
    check_share,
    merge_method,
    per_expert,
)

SAMPLE = 1 << 16
"""Entries of each expert that a threshold is guessed from, before it is found."""


def kth_smallest(blocks: Blocks, k: Sequence[int]) -> Tensor:
    """The k-th smallest magnitude of each expert, exactly; k (experts,), 1 for the smallest.

    A sample brackets it with a margin of five standard deviations; one pass counts what is below
    and collects what is inside. In half precision so many entries are equal that both ends are
    often one number: then counting is enough. Should the sample have misled, all of an expert's
    entries are looked at. Returns (experts,).
    """
    if not blocks.entries:
        return torch.zeros(len(k))
    stride = max(1, blocks.entries // SAMPLE) | 1  # odd, as rows are seldom
    sample = blocks.read(slice(0, blocks.entries, stride)).abs().numpy()
    ends = [_bracket(row, rank / blocks.entries) for row, rank in zip(sample, k, strict=True)]
    below, upto, inside = [0] * len(k), [0] * len(k), [[] for _ in k]
    for block in blocks:
        for expert, row in enumerate(block.abs().numpy()):  # numpy compares faster than torch
            least, most = ends[expert]
            small, large = row < least, row > most
            below[expert] += np.count_nonzero(small)
            upto[expert] += len(row) - np.count_nonzero(large)
            if least < most:
                inside[expert].append(row[~(small | large)])
    values = []
    for expert, rank in enumerate(k):
        found, place = np.full(1, ends[expert][0], sample.dtype), 0
        if not below[expert] < rank <= upto[expert]:
            found, place = torch.cat([x[expert].abs() for x in blocks]).numpy(), rank - 1
        elif inside[expert]:
            found, place = np.concatenate(inside[expert]), rank - below[expert] - 1
        values.append(np.partition(found, place)[place])
    return torch.from_numpy(np.array(values))


def _bracket(sample: np.ndarray, share: float) -> tuple[float, float]:
    """Between which values of a sample the quantile of all entries lies, almost surely."""
    drawn = len(sample)
    margin = 5 * math.sqrt(drawn * share * (1 - share)) + 2
    low, high = int(drawn * share - margin), int(drawn * share + margin)
    sample = np.partition(sample, [place for place in (0, low, high) if 0 <= place < drawn])
    return (
        sample[low] if low >= 0 else -1.0,
        sample[high] if high < drawn else math.inf,
    )


def ties_blocks(
    blocks: Blocks,
    thresholds: Tensor,
    *,
    weights: Tensor | None = None,
    normalize: bool = True,
    rule: str = "released",
) -> Iterator[tuple[Any, Tensor | None, Tensor]]:
    """Steps 2 and 3 of `methods.ties`: (entries, block, merged entries), block by block.

    thresholds (experts,); weights (experts, 1), if any. Where experts cancel exactly, the whole
    parameter's majority decides: such entries come once more at the end, by their numbers and
    without a block.
    """
    # hardshrink keeps what is larger than its limit, in a fifth of the time that masks take.
    limits = thresholds.nextafter(thresholds.new_zeros(())).tolist()
    balance, drawn = thresholds.new_zeros(()), {}

    def trimmed(block: Tensor) -> Tensor:
        kept = [hardshrink(row, limit) for row, limit in zip(block, limits, strict=True)]
        return torch.stack(kept) if weights is None else torch.stack(kept) * weights

    for number, block in enumerate(blocks):
        kept = trimmed(block)
        signs = kept.sum(dim=0).sign()
        if rule == "mergekit":
            signs = torch.where(signs == 0, 1, signs)
        balance += signs.sum()
        yield blocks.place(number), block, _mean_of_sign(kept, signs, weights, normalize)
        cancelled = ((signs == 0) & (kept.amax(dim=0) > 0)).nonzero()[:, 0]
        if len(cancelled):
            drawn[number] = cancelled
    for number, cancelled in drawn.items():
        kept = trimmed(blocks[number][:, cancelled])
        merged = _mean_of_sign(kept, balance.sign(), weights, normalize)
        yield cancelled + blocks.place(number).start, None, merged


def _mean_of_sign(values: Tensor, signs: Tensor, weights: Tensor | None, normalize: bool) -> Tensor:
    """Mean of the values that have an entry's sign: (experts, size), (size,) or () -> (size,).

    `weights` (experts, 1), which the values contain, divide it; without `normalize`, the sum.
    """
    agreeing = (values * signs).clamp_(min=0)
    total = agreeing.sum(dim=0) * signs
    if not normalize:
        return total
    if weights is None:
        return total.div_(agreeing.sign_().sum(dim=0).clamp_(min=1))
    share = ((agreeing > 0) * weights).sum(dim=0)
    return total / torch.where(share == 0, 1, share)


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
        from optmerge_core.methods import kernels

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
