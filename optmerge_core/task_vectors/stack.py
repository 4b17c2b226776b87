"""Task vectors, tensor by tensor: extraction, algebra, norms and magnitudes.

A task vector is expert - base_model (the paper's tau_i). Nothing here holds more than one parameter
of all experts at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from optmerge_core.checkpoints.layouts import inputs_first
from optmerge_core.checkpoints.names import is_stack
from optmerge_core.checkpoints.weights import as_weights
from optmerge_core.methods.blocks import Blocks

Part = tuple[Tensor, bool]
"""An expert's parameter, and whether it is a task vector, not weights."""


class TaskVectors(Mapping[str, Tensor]):
    """Lazy mapping parameter name -> (experts, *shape) float32 stack of expert - base.

    `base` and each of `experts` (a mapping expert name -> parameters) map parameter name -> tensor:
    `Weights` of any origin, or a state dict. `names` are the parameters to offer. Each access
    computes the stack anew, in float32 on `device`. Raises `ValueError` for no experts, and on
    access for a parameter that an expert lacks or has in another shape.
    """

    def __init__(
        self,
        base: Mapping[str, Tensor],
        experts: Mapping[str, Mapping[str, Tensor]],
        names: Iterable[str],
        device: str | torch.device = "cpu",
    ):
        if not experts:
            raise ValueError("no experts: give at least one (name -> parameters)")
        self.base = as_weights(base)
        self.experts = {name: as_weights(expert) for name, expert in experts.items()}
        self.expert_names = list(self.experts)
        self.names = list(names)
        self.device = torch.device(device)
        self._offered = frozenset(self.names)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._offered:
            raise KeyError(name)
        return self.stack(name, self.base[name])

    def stack(self, name: str, base_tensor: Tensor, parts: list[Part] | None = None) -> Tensor:
        """The same where the base's tensor, or what `read` gives too, is at hand."""
        base = base_tensor.to(self.device, non_blocking=True).float()
        stack = torch.empty((len(self.experts), *base.shape), device=self.device)
        parts = self.read(name, base_tensor) if parts is None else parts
        for task_vector, (tensor, is_task_vector) in zip(stack, parts, strict=True):
            task_vector.copy_(tensor, non_blocking=True)
            if not is_task_vector:
                task_vector.sub_(base)
        return stack

    def blocks(self, name: str, base_tensor: Tensor) -> Blocks:
        """The same in blocks on the CPU: float32 is only what a block needs."""
        base = base_tensor.flatten()
        parts = [(tensor.flatten(), ready) for tensor, ready in self.read(name, base_tensor)]

        def block(entries: slice) -> Tensor:
            weights = base[entries].float()
            rows = torch.empty(len(parts), len(weights))
            for row, (tensor, is_task_vector) in zip(rows, parts, strict=True):
                row.copy_(tensor[entries])
                if not is_task_vector:
                    row.sub_(weights)
            return rows

        return Blocks(block, base.numel())

    def read(self, name: str, base_tensor: Tensor) -> list[Part]:
        """Each expert's parameter as stored; an adapter's is a task vector already."""
        parts = []
        for expert_name, expert in self.experts.items():
            if (exact := expert.task_vector(name, base_tensor)) is not None:
                parts.append((exact, True))
                continue
            tensor, shape = expert.get(name), base_tensor.shape
            if tensor is None or tensor.shape != shape:
                found = "does not have it" if tensor is None else f"has shape {tuple(tensor.shape)}"
                raise ValueError(
                    f"{name}: expert {expert_name} {found}, the base has {tuple(shape)}; "
                    "an expert must be a fine-tuned copy of the base model"
                )
            parts.append((tensor, False))
        return parts

    def numbers(self, name: str) -> Sequence[int | None]:
        """Those of the matrices in a mixture's tensor; None alone for any other parameter."""
        shape = self.base.shape(name)
        return range(shape[0]) if is_stack(name, shape) else [None]

    def matrix(self, name: str, tensor: Tensor, number: int | None) -> Tensor:
        """The matrix of that number, outputs × inputs as of a linear layer; of None, the tensor."""
        if number is not None:
            tensor = tensor[number].mT.contiguous() if name in self._turned else tensor[number]
        return pinned(tensor, self.device)

    def matrices(self, name: str) -> Iterator[tuple[int | None, Tensor, Tensor]]:
        """Number, base (m, n) and stack (experts, m, n) of each matrix, one after the other."""
        tensor = self.base[name]
        parts = self.read(name, tensor)
        for number in self.numbers(name):
            base = self.matrix(name, tensor, number)
            own = [(self.matrix(name, part, number), ready) for part, ready in parts]
            yield number, base, self.stack(name, base, own)

    def place(self, name: str, matrix: Tensor, number: int | None, whole: Tensor) -> None:
        """Put a matrix where it lies in the whole parameter, as `matrix` took it from there."""
        own = whole if number is None else whole[number]
        own.copy_(matrix.mT if number is not None and name in self._turned else matrix)

    @cached_property
    def _turned(self) -> set[str]:
        return inputs_first(self.base)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy in page-locked memory, which a GPU fetches while it computes; for a CPU the same."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def apply(
    base_tensor: Tensor,
    merged_task_vector: Tensor,
    scaling_coefficient: float,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """base + scaling_coefficient * merged_task_vector, computed in float32, or float64 as that is.

    Same shape for both; the result has `dtype` (default: the base tensor's) and the merged task
    vector's device.
    """
    precision = torch.promote_types(merged_task_vector.dtype, torch.float32)
    base = base_tensor.to(merged_task_vector.device, precision)
    merged = base + scaling_coefficient * merged_task_vector
    return merged.to(dtype or base_tensor.dtype)


def derive_seed(seed: int, *parts: str) -> int:
    """A 63-bit seed that hangs on `seed` and `parts` only, not on the order of work."""
    digest = hashlib.sha256("\0".join([str(seed), *parts]).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
