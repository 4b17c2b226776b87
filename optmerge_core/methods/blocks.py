"""Entrywise merging in blocks that stay in the cache, so that no float32 stack is ever whole.

Averages, task arithmetic and TIES look at one entry of all experts at a time: a parameter is read
in its own dtype, and only a block of it is in float32 at any moment.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float
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


def kth_smallest(blocks: Blocks, k: Sequence[int]) -> Float[Tensor, " experts"]:
    """The k-th smallest magnitude of each expert, exactly; k (experts,), 1 for the smallest.

    A sample brackets it with a margin of five standard deviations; one pass counts what is below
    and collects what is inside. In half precision so many entries are equal that both ends are
    often one number: then counting is enough. Should the sample have misled, all of an expert's
    entries are looked at. Returns (experts,).
    """
    if not blocks.entries:
        return torch.zeros(len(k))
    stride = max(1, blocks.entries // SAMPLE) | 1  # odd, as rows are seldom
    sample = blocks.read(slice(0, blocks.entries, stride)).abs()
    if sample.is_cuda:
        whole = blocks.read(slice(0, blocks.entries)).abs()
        return torch.stack([row.kthvalue(n).values for row, n in zip(whole, k, strict=True)])
    drawn = sample.numpy()
    ends = [_bracket(row, rank / blocks.entries) for row, rank in zip(drawn, k, strict=True)]
    below, upto = np.zeros((2, len(k)), int)
    inside: list[list[np.ndarray]] = [[] for _ in k]
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
        found, place = np.array([ends[expert][0]], drawn.dtype), 0
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
    least = float(sample[low]) if low >= 0 else -1.0
    return least, float(sample[high]) if high < drawn else math.inf
