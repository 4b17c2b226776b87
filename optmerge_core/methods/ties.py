"""TIES merging: trim, elect a sign, average what agrees (arXiv 2306.01708)."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import hardshrink

from optmerge_core.methods.blocks import Blocks, MergedBlock, kth_smallest
from optmerge_core.methods.contract import (
    Share,
    Stack,
    Weights,
    check_choice,
    check_share,
    merge_method,
    per_expert,
)


def ties_blocks(
    blocks: Blocks,
    *,
    density: Share = 0.2,
    thresholds: Tensor | None = None,
    weights: Weights = None,
    normalize: bool = True,
    rule: str = "released",
) -> Iterator[MergedBlock]:
    """`ties` block by block: (entries, block (experts, size), merged entries (size,)).

    Where experts cancel exactly, the whole parameter's majority decides: such entries come once
    more at the end, by their numbers and without a block.
    """
    left = [] if thresholds is None else [math.inf] * len(thresholds)
    if thresholds is None:
        thresholds, left = trim(blocks, density, rule)
    factors = None
    if weights is not None:
        factors = thresholds.new_tensor(per_expert("weights", weights, len(thresholds)))[:, None]
    limits, balance, drawn = thresholds.tolist(), thresholds.new_zeros(()), []

    def trimmed(block: Tensor) -> Tensor:
        rows = []
        for expert, (row, limit) in enumerate(zip(block, limits, strict=True)):
            kept, left[expert] = _largest(row, limit, left[expert])
            rows.append(kept)
        return torch.stack(rows) if factors is None else torch.stack(rows) * factors

    for entries in blocks.places():
        block = blocks.read(entries)
        kept = trimmed(block)
        sums = kept.sum(dim=0)
        positive = torch.ones_like(sums)
        signs = sums.sign() if rule == "released" else positive.copysign(sums.add_(0.0))  # -0: +
        yield entries, block, mean_of_sign(kept, signs, factors, normalize)
        if rule == "released":
            balance += signs.sum()
            cancelled = (signs.numpy() == 0) & (kept.amax(dim=0).numpy() > 0)
            if cancelled.any():
                drawn.append((entries, torch.from_numpy(cancelled.nonzero()[0])))
    for entries, cancelled in drawn:
        kept = trimmed(blocks.read(entries)[:, cancelled])
        merged = mean_of_sign(kept, balance.sign(), factors, normalize)
        yield entries.start + cancelled, None, merged


def _largest(row: Tensor, limit: float, left: float) -> tuple[Tensor, float]:
    """0 but for entries above the limit and the first `left` equal to it; how many are left now."""
    # hardshrink keeps what is larger than its limit, in a fifth of the time that masks take.
    if not left:
        return hardshrink(row, limit), left
    equal = np.abs(row.numpy()) == limit if left < math.inf else np.zeros(0, bool)
    if (found := int(np.count_nonzero(equal))) > left:
        places = torch.from_numpy(equal.nonzero()[0][: int(left)])
        kept = hardshrink(row, limit)
        kept[places] = row[places]
        return kept, 0
    below = row.new_tensor(limit).nextafter(row.new_zeros(()))
    return hardshrink(row, below.item()), left - found


def mean_of_sign(
    values: Float[Tensor, "experts size"], signs: Tensor, weights: Tensor | None, normalize: bool
) -> Float[Tensor, " size"]:
    """Mean of the values that have an entry's sign: (experts, size), (size,) or () -> (size,).

    `weights` (experts, 1), which the values contain, divide it; without `normalize`, the sum.
    """
    agreeing = (values * signs).clamp_(min=0)
    total = agreeing.sum(dim=0) * signs
    if not normalize:
        return total
    agreeing = agreeing.sign_()
    if weights is None:
        return total.div_(agreeing.sum(dim=0).clamp_(min=1))
    share = agreeing.mul_(weights).sum(dim=0)
    return total.div_(share.masked_fill_(share == 0, 1))


@merge_method()
def ties(
    task_vectors: Stack,
    *,
    density: Share = 0.2,
    thresholds: Tensor | None = None,
    weights: Weights = None,
    normalize: bool = True,
    rule: str = "released",
) -> Float[Tensor, "*shape"]:
    """Trim, elect a sign, average what agrees: (experts, *shape) -> (*shape).

    Yadav et al., "TIES-Merging" (2023).
    1. Trim: keep an expert's entries whose magnitude reaches its threshold, by default that of
       `trim`; `thresholds` (experts,) are for trimming over a whole model.
    2. Elect: an entry's sign is that of its sum over the experts. Where the sum is 0, it is the
       sign that most entries of this tensor have, as in the released code; if that is a draw too,
       the merged entry is 0.
    3. Average, entry by entry, the kept values that have the elected sign.

    What mergekit can do besides: a density for each expert; `weights` times which the trimmed task
    vectors are from step 2 on (the average of step 3 is then a weighted one); their sum in step 3
    instead, without `normalize`; and with `rule="mergekit"` exactly int(density·size) entries of an
    expert, at least one, are kept, and the sign of a sum of 0 is +. Of entries whose magnitude is
    the threshold, that many are kept which are first in memory; in mergekit it is its sort that
    chooses, which differs between devices.
    """
    check_choice("rule", rule, ("released", "mergekit"))
    check_choice("normalize", normalize, (True, False))
    if thresholds is not None and thresholds.shape != task_vectors.shape[:1]:
        raise ValueError(
            f"thresholds have shape {tuple(thresholds.shape)}; "
            f"there must be one for each of the {len(task_vectors)} experts"
        )
    blocks = Blocks.of(task_vectors)
    limits = None if thresholds is None else thresholds.to(task_vectors)
    options: dict[str, Any] = {"weights": weights, "normalize": normalize, "rule": rule}
    if task_vectors.is_cuda:
        from optmerge_core.methods import kernels

        limits, left = (limits, None) if limits is not None else trim(blocks, density, rule)
        return kernels.ties(task_vectors, limits, left, **options)
    merged = task_vectors.new_empty(blocks.entries)
    for entries, _, result in ties_blocks(blocks, density=density, thresholds=limits, **options):
        merged[entries] = result
    return merged.view(task_vectors.shape[1:])


def trim(
    blocks: Blocks, density: Share, rule: str = "released"
) -> tuple[Float[Tensor, " experts"], list[float]]:
    """The magnitudes that entries must reach, and how many that equal them are kept (inf: all).

    The k-th smallest of an expert, k = int((1 − density)·size), so that slightly more than the
    share `density` is kept; 0, which keeps everything, when k is 0. By mergekit's rule as many are
    kept as `ties` says. A sequence holds a density for each expert.
    """
    none = blocks.read(slice(0, 0))
    densities, size = per_expert("density", density, len(none)), blocks.entries
    for share in densities:
        check_share("density", share)
    if rule == "released":
        k = [int((1 - share) * size) for share in densities]
    else:
        kept = [max(1, int(share * size)) for share in densities]
        k = [0 if n >= size else size - n + 1 for n in kept]
    left = [math.inf] * len(k)
    if not any(k):
        return none.new_zeros(len(k)), left
    values, smaller, equal = kth_smallest(blocks, [max(n, 1) for n in k])
    for expert, rank in enumerate(k):
        if rule == "mergekit" and rank - 1 > smaller[expert]:
            left[expert] = smaller[expert] + equal[expert] - rank + 1
    return values.where(torch.tensor(k, device=values.device) > 0, 0), left
