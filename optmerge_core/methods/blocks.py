"""Entrywise merging in blocks that stay in the cache, so that no float32 stack is ever whole.

Averages, task arithmetic and TIES look at one entry of all experts at a time: a parameter is read
in its own dtype, and only a block of it is in float32 at any moment.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from optmerge_core.methods.contract import Stack

BLOCK = 1 << 17
"""Entries of each expert in a block."""

SAMPLE = 1 << 16
"""Entries of each expert that a threshold is guessed from, before it is found."""


MergedBlock = tuple[slice | Tensor, Tensor | None, Tensor]
"""Which entries of a parameter, their block (experts, entries) or None, what they merge to."""


class Blocks(Iterable[Tensor]):
    """A parameter's task vectors as blocks (experts, at most `size`), made when they are asked for.

    read: slice of the parameter's entries, in their order in memory -> (experts, entries) float32.
    """

    def __init__(self, read: Callable[[slice], Tensor], entries: int, size: int = BLOCK):
        self.read, self.entries, self.size = read, entries, size

    @classmethod
    def of(cls, task_vectors: Stack, size: int = BLOCK) -> "Blocks":
        """Of a stack (experts, *shape) that is there."""
        flat = task_vectors.flatten(1)
        return cls(lambda entries: flat[:, entries], flat.shape[1], size)

    def places(self) -> Iterator[slice]:
        """The entries of one block after the other."""
        for start in range(0, self.entries, self.size):
            yield slice(start, min(start + self.size, self.entries))

    def __iter__(self) -> Iterator[Tensor]:
        return (self.read(place) for place in self.places())


class Ranked(NamedTuple):
    """A magnitude of each expert, (experts,), and how many of its entries are smaller and equal."""

    values: Tensor
    smaller: list[int]
    equal: list[int]


def kth_smallest(blocks: Blocks, k: Sequence[int]) -> Ranked:
    """The k-th smallest magnitude of each expert, exactly; k (experts,), 1 for the smallest.

    A sample brackets it with a margin of five standard deviations; one pass counts what is below
    and at the ends and collects what lies between. In half precision so many entries are equal that
    it is often one of the ends. Should the sample have misled, all of an expert's entries are
    looked at.
    """
    if not blocks.entries:
        return Ranked(torch.zeros(len(k)), [0] * len(k), [0] * len(k))
    stride = max(1, blocks.entries // SAMPLE) | 1  # odd, as rows are seldom
    sample = blocks.read(slice(0, blocks.entries, stride)).abs()
    if sample.is_cuda:
        whole = blocks.read(slice(0, blocks.entries)).abs()
        values = torch.stack([row.kthvalue(n).values for row, n in zip(whole, k, strict=True)])
        less, same = (f(whole, values[:, None]).sum(dim=1) for f in (torch.lt, torch.eq))
        return Ranked(values, less.tolist(), same.tolist())
    drawn = sample.numpy()
    ends = [_bracket(row, rank / blocks.entries) for row, rank in zip(drawn, k, strict=True)]
    counts = np.zeros((3, len(k)), int)  # of what is below the ends, up to their least and most
    between: list[list[np.ndarray]] = [[] for _ in k]
    for block in blocks:
        for expert, row in enumerate(block.abs().numpy()):  # numpy compares faster than torch
            least, most = ends[expert]
            upto = row <= least
            counts[:, expert] += [np.count_nonzero(x) for x in (row < least, upto, row <= most)]
            if least < most:
                between[expert].append(row[(row < most) & ~upto])
    found = []
    for expert, (rank, (least, most)) in enumerate(zip(k, ends, strict=True)):
        under, first, last = counts[:, expert].tolist()
        inside = np.concatenate([drawn[0, :0], *between[expert]])
        if under < rank <= first:
            found.append((least, under, first - under))
        elif first < rank <= first + len(inside):
            found.append(_ranked(inside, rank, first))
        elif first + len(inside) < rank <= last:
            found.append((most, first + len(inside), last - first - len(inside)))
        else:
            whole = torch.cat([block[expert].abs() for block in blocks])
            found.append(_ranked(whole.numpy(), rank, 0))
    magnitudes, below, equal = zip(*found, strict=True)
    return Ranked(torch.from_numpy(np.array(magnitudes, drawn.dtype)), list(below), list(equal))


def largest(row: Tensor, count: int) -> Tensor:
    """Where the `count` entries of largest magnitude are, (size,) bool; of equal ones the first."""
    if not 0 < count < len(row):
        return torch.full_like(row, count > 0, dtype=torch.bool)
    limit, smaller, equal = kth_smallest(Blocks.of(row[None]), [len(row) - count + 1])
    sizes = row.abs()
    found = sizes > limit.to(row)
    left = count - (len(row) - smaller[0] - equal[0])
    found[(sizes == limit.to(row)).nonzero()[:left, 0]] = True
    return found


def _ranked(entries: np.ndarray, rank: int, before: int) -> tuple[float, int, int]:
    """The value of that rank among these and `before` smaller ones; how many are smaller, equal."""
    place = rank - before - 1
    value = np.partition(entries, place)[place]
    smaller, equal = (int(np.count_nonzero(f(entries, value))) for f in (np.less, np.equal))
    return float(value), before + smaller, equal


def _bracket(sample: np.ndarray, share: float) -> tuple[float, float]:
    """Between which values of a sample the quantile of all entries lies, almost surely."""
    drawn = len(sample)
    margin = 5 * math.sqrt(drawn * share * (1 - share)) + 2
    low, high = int(drawn * share - margin), int(drawn * share + margin)
    sample = np.partition(sample, [place for place in (0, low, high) if 0 <= place < drawn])
    least = float(sample[low]) if low >= 0 else -1.0
    return least, float(sample[high]) if high < drawn else math.inf
