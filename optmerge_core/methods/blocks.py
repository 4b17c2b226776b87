"""Entrywise merging in blocks that stay in the cache, so that no float32 stack is ever whole.

Averages, task arithmetic and TIES look at one entry of all experts at a time: a parameter is read
in its own dtype, and only a block of it is in float32 at any moment.
"""

import math
from collections.abc import Callable, Sequence

from torch import Tensor

BLOCK = 1 << 17
"""Entries of each expert in a block."""


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
