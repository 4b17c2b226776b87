"""TIES merging: trim, elect a sign, average what agrees (arXiv 2306.01708)."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import hardshrink

from optmerge_core.methods.blocks import BLOCK, Blocks, MergedBlock, kth_smallest
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
    if thresholds is None:
        thresholds = trim_thresholds(blocks, density)
    factors = None
    if weights is not None:
        factors = thresholds.new_tensor(per_expert("weights", weights, len(thresholds)))[:, None]
    # hardshrink keeps what is larger than its limit, in a fifth of the time that masks take.
    limits = thresholds.nextafter(thresholds.new_zeros(())).tolist()
    balance, drawn = thresholds.new_zeros(()), []

    def trimmed(block: Tensor) -> Tensor:
        kept = [hardshrink(row, limit) for row, limit in zip(block, limits, strict=True)]
        return torch.stack(kept) if factors is None else torch.stack(kept) * factors

    for entries in blocks.places():
        block = blocks.read(entries)
        kept = trimmed(block)
        signs = kept.sum(dim=0).sign()
        if rule == "mergekit":
            signs = torch.where(signs == 0, 1, signs)
        balance += signs.sum()
        yield entries, block, _mean_of_sign(kept, signs, factors, normalize)
        cancelled = ((signs == 0) & (kept.amax(dim=0) > 0)).nonzero()[:, 0]
        if len(cancelled):
            drawn.append((entries, cancelled))
    for entries, cancelled in drawn:
        kept = trimmed(blocks.read(entries)[:, cancelled])
        merged = _mean_of_sign(kept, balance.sign(), factors, normalize)
        yield entries.start + cancelled, None, merged


def _mean_of_sign(
    values: Float[Tensor, "experts size"], signs: Tensor, weights: Tensor | None, normalize: bool
) -> Float[Tensor, " size"]:
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
    limits = thresholds.to(task_vectors)
    found = ties_blocks(blocks, thresholds=limits, weights=weights, normalize=normalize, rule=rule)
    for entries, _, result in found:
        merged[entries] = result
    return merged.view(task_vectors.shape[1:])


def trim_thresholds(task_vectors: Stack | Blocks, density: Share) -> Float[Tensor, " experts"]:
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
    thresholds = kth_smallest(blocks, [max(n, 1) for n in k])
    return thresholds.where(torch.tensor(k, device=thresholds.device) > 0, 0)


def keep_largest(task_vectors: Stack, density: Share) -> Stack:
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
