"""Entrywise merging in blocks that stay in the cache, so that no float32 stack is ever whole.

Averages, task arithmetic and TIES look at one entry of all experts at a time: a parameter is read
in its own dtype, and only a block of it is in float32 at any moment.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import hardshrink

BLOCK = 1 << 17
"""Entries of each expert in a block."""
SAMPLE = 1 << 16
"""Entries of each expert that a threshold is guessed from, before it is found."""


class Blocks(Sequence[Tensor]):
    """A parameter's task vectors as blocks (experts, at most `size`), made when they are asked for.

    read: slice of the parameter's entries, in their order in memory -> (experts, entries) float32.
    """

    def __init__(self, read: Callable[[slice], Tensor], entries: int, size: int = BLOCK):
        self.read, self.entries, self.size = read, entries, size

    @classmethod
    def of(cls, task_vectors: Tensor, size: int = BLOCK) -> "Blocks":
        """Of a stack (experts, *shape) that is there."""
        flat = task_vectors.flatten(1)
        return cls(lambda entries: flat[:, entries], flat.shape[1], size)

    def __len__(self) -> int:
        return math.ceil(self.entries / self.size)

    def __getitem__(self, number: int) -> Tensor:
        return self.read(self.place(number))

    def place(self, number: int) -> slice:
        """The entries of a block. Raises `IndexError` after the last."""
        if number >= len(self):
            raise IndexError(number)
        return slice(number * self.size, min((number + 1) * self.size, self.entries))


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
