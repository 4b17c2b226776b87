"""Triton kernels for entrywise merging on a GPU: every input is read once, the result written once.

A program loads a tile of all experts, (experts, TILE) entries, and leaves only the merged ones. The
same in torch, which is what they are tested against, takes a dozen passes (`ties.ties`,
`dare.dare`). Needs the package triton, which torch brings where it supports CUDA.
"""

import math
from collections.abc import Sequence
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float
from torch import Tensor

from optmerge_core.methods.contract import Stack, Weights, per_expert

TILE = 1024


@triton.jit
@no_type_check
def _ties_kernel(
    stack, thresholds, ends, weights, majority, merged, balances, draws, size,
    NORMALIZE: tl.constexpr, EXPERTS: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    entries = tile.to(tl.int64) * TILE + tl.arange(0, TILE)
    experts = tl.arange(0, PADDED).to(tl.int64)  # experts * size may pass 2^31
    inside = (experts < EXPERTS)[:, None] & (entries < size)[None, :]
    values = tl.load(stack + experts[:, None] * size + entries[None, :], mask=inside, other=0.0)
    limits = tl.load(thresholds + experts, mask=experts < EXPERTS, other=0.0)[:, None]
    last = tl.load(ends + experts, mask=experts < EXPERTS, other=0)[:, None]
    factors = tl.load(weights + experts, mask=experts < EXPERTS, other=0.0)[:, None]
    sizes = tl.abs(values)
    reach = (sizes > limits) | ((sizes == limits) & (entries[None, :] <= last))
    kept = tl.where(reach, values, 0.0) * factors
    total = tl.sum(kept, 0)
    signs = tl.where(total > 0, 1.0, tl.where(total < 0, -1.0, 0.0))
    drawn = (total == 0) & (tl.sum(tl.abs(kept), 0) > 0)
    tl.store(balances + tile, tl.sum(signs, 0))
    tl.store(draws + tile, tl.sum(drawn.to(tl.int32), 0))
    signs = tl.where(drawn, tl.load(majority), signs)
    agreeing = kept * signs[None, :]
    agreeing = tl.where(agreeing > 0, agreeing, 0.0)
    result = tl.sum(agreeing, 0) * signs
    if NORMALIZE:
        share = tl.sum(tl.where(agreeing > 0, factors, 0.0), 0)
        result = result / tl.where(share == 0, 1.0, share)
    tl.store(merged + entries, result, mask=entries < size)


@triton.jit
@no_type_check
def _dare_kernel(
    stack, kept, merged, scale, size,
    EXPERTS: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    entries = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    experts = tl.arange(0, PADDED).to(tl.int64)  # experts * size may pass 2^31
    inside = (experts < EXPERTS)[:, None] & (entries < size)[None, :]
    places = experts[:, None] * size + entries[None, :]
    values = tl.load(stack + places, mask=inside, other=0.0)
    chosen = tl.load(kept + places, mask=inside, other=0)
    total = tl.sum(tl.where(chosen != 0, values, 0.0), 0) * scale
    tl.store(merged + entries, total, mask=entries < size)


def ties(
    task_vectors: Stack,
    thresholds: Float[Tensor, " experts"],
    left: Sequence[float] | None = None,
    *,
    weights: Weights = None,
    normalize: bool = True,
    rule: str = "released",
) -> Float[Tensor, "*shape"]:
    """`ties.ties` with given thresholds (experts,): (experts, *shape) -> (*shape), float32.

    left: how many entries that are equal to an expert's threshold it keeps, all by default (inf).
    Where experts cancel exactly, a second round decides by the whole tensor's majority sign; with
    mergekit's rule it is +.
    """
    flat = task_vectors.flatten(1).contiguous()
    experts, size = flat.shape
    tiles = triton.cdiv(size, TILE)
    merged, balances = flat.new_empty(size), flat.new_empty(tiles)
    draws = torch.empty(tiles, dtype=torch.int32, device=flat.device)
    majority, limits = flat.new_full((1,), float(rule == "mergekit")), thresholds.to(flat)
    factors = flat.new_tensor(per_expert("weights", weights or 1.0, experts))
    ends = torch.full((experts,), size, device=flat.device)
    for expert, count in enumerate(left or []):
        if count < math.inf:
            equal = (flat[expert].abs() == limits[expert]).nonzero()
            ends[expert] = equal[int(count) - 1, 0]

    def run() -> None:
        _ties_kernel[(tiles,)](
            flat, limits, ends, factors, majority, merged, balances, draws, size,
            NORMALIZE=normalize, EXPERTS=experts, PADDED=triton.next_power_of_2(experts), TILE=TILE,
        )  # fmt: skip

    run()
    if rule == "released" and draws.any():
        majority = balances.sum(dtype=torch.float64).sign().to(flat).view(1)
        run()
    return merged.view(task_vectors.shape[1:])


def dare_sum(
    task_vectors: Stack, kept: Bool[Tensor, " experts *shape"], drop_rate: float
) -> Float[Tensor, "*shape"]:
    """The sum of what `dare.dare` leaves: (experts, *shape) and where to keep -> (*shape)."""
    flat, chosen = task_vectors.flatten(1).contiguous(), kept.flatten(1).contiguous()
    experts, size = flat.shape
    merged = flat.new_empty(size)
    _dare_kernel[(triton.cdiv(size, TILE),)](
        flat, chosen.view(torch.uint8), merged, 1 / (1 - drop_rate), size,
        EXPERTS=experts, PADDED=triton.next_power_of_2(experts), TILE=TILE,
    )  # fmt: skip
    return merged.view(task_vectors.shape[1:])
