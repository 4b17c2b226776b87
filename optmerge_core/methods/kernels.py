"""Triton kernels for entrywise merging on a GPU: every input is read once, the result written once.

A program loads a tile of all experts, (experts, TILE) entries, and leaves only the merged ones. The
same in torch, which is what they are tested against, takes a dozen passes (`ties.ties`,
`dare.dare`). Needs the package triton, which torch brings where it supports CUDA.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float
from torch import Tensor

from optmerge_core.methods.contract import Stack

TILE = 1024


@triton.jit
@no_type_check
def _ties_kernel(
    stack, thresholds, majority, merged, balances, draws, size,
    EXPERTS: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    entries = tile.to(tl.int64) * TILE + tl.arange(0, TILE)
    experts = tl.arange(0, PADDED).to(tl.int64)  # experts * size may pass 2^31
    inside = (experts < EXPERTS)[:, None] & (entries < size)[None, :]
    values = tl.load(stack + experts[:, None] * size + entries[None, :], mask=inside, other=0.0)
    limits = tl.load(thresholds + experts, mask=experts < EXPERTS, other=0.0)
    kept = tl.where(tl.abs(values) >= limits[:, None], values, 0.0)
    total = tl.sum(kept, 0)
    signs = tl.where(total > 0, 1.0, tl.where(total < 0, -1.0, 0.0))
    drawn = (total == 0) & (tl.sum(tl.abs(kept), 0) > 0)
    tl.store(balances + tile, tl.sum(signs, 0))
    tl.store(draws + tile, tl.sum(drawn.to(tl.int32), 0))
    signs = tl.where(drawn, tl.load(majority), signs)
    agreeing = kept * signs[None, :]
    agreeing = tl.where(agreeing > 0, agreeing, 0.0)
    count = tl.sum((agreeing > 0).to(tl.float32), 0)
    mean = tl.sum(agreeing, 0) * signs / tl.where(count > 0, count, 1.0)
    tl.store(merged + entries, mean, mask=entries < size)


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


def ties(task_vectors: Stack, thresholds: Float[Tensor, " experts"]) -> Float[Tensor, "*shape"]:
    """`ties.ties` with given thresholds (experts,): (experts, *shape) -> (*shape), float32.

    Where experts cancel exactly, which is rare, a second round decides by the whole tensor's
    majority sign.
    """
    flat = task_vectors.flatten(1).contiguous()
    experts, size = flat.shape
    tiles = triton.cdiv(size, TILE)
    merged, balances = flat.new_empty(size), flat.new_empty(tiles)
    draws = torch.empty(tiles, dtype=torch.int32, device=flat.device)
    majority = flat.new_zeros(1)

    def run() -> None:
        _ties_kernel[(tiles,)](
            flat, thresholds.to(flat), majority, merged, balances, draws, size,
            EXPERTS=experts, PADDED=triton.next_power_of_2(experts), TILE=TILE,
        )  # fmt: skip

    run()
    if draws.any():
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
