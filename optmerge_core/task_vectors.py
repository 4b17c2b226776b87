"""Task vectors, tensor by tensor: extraction, algebra, norms and magnitudes.

A task vector is expert - base_model (the paper's tau_i). Nothing here holds more than one parameter
of all experts at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from optmerge_core.blocks import Blocks
from optmerge_core.parallel import in_order
from optmerge_core.parameters import layer_index, module_kind

Part = tuple[Tensor, bool]
"""An expert's parameter, and whether it is a task vector, not weights."""


class TaskVectors(Mapping[str, Tensor]):
    """Lazy mapping parameter name -> (experts, *shape) float32 stack of expert - base.

    `base` and each of `experts` (a mapping expert name -> parameters) map parameter name -> tensor:
    a `Checkpoint`, an `Adapter`, a state dict. `names` are the parameters to offer. Each access
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
        self.base = base
        self.experts = dict(experts)
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
            if hasattr(expert, "task_vector"):
                parts.append((pinned(expert.task_vector(name), self.device), True))
                continue
            tensor, shape = expert.get(name), base_tensor.shape
            if tensor is None or tensor.shape != shape:
                found = "does not have it" if tensor is None else f"has shape {tuple(tensor.shape)}"
                raise ValueError(
                    f"{name}: expert {expert_name} {found}, the base has {tuple(shape)}; "
                    "an expert must be a fine-tuned copy of the base model"
                )
            parts.append((pinned(tensor, self.device), False))
        return parts

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
    """base + scaling_coefficient * merged_task_vector, computed in float32.

    Same shape for both; the result has `dtype` (default: the base tensor's) and the merged task
    vector's device.
    """
    base = base_tensor.to(merged_task_vector.device, torch.float32)
    merged = base + scaling_coefficient * merged_task_vector
    return merged.to(dtype or base_tensor.dtype)


def model_thresholds(
    stack_of: Callable[[str], Tensor], names: Iterable[str], density: float, device: str = "cpu"
) -> Tensor:
    """The k-th smallest magnitude of each expert over a whole model, k = int((1 - density) size).

    `stack_of(name)` is the float32 stack (experts, *shape) of a parameter; each is asked for twice.
    Exact, in memory that does not grow with the model: the bits of a non-negative float32 sort like
    the number, so a histogram of their upper halves finds the threshold's upper half, and a second
    one, of the lower halves below that upper half, finds the rest. Returns (experts,), 0 for k = 0.
    """

    def histograms(half: Callable[[Tensor, int], Tensor]) -> Tensor:
        """Counts (experts, 65536) of the 16 bits that `half` takes of an expert's magnitudes."""

        def count(name: str) -> Tensor:
            rows = stack_of(name).flatten(1).abs().view(torch.int32)
            halves = [torch.bincount(half(row, i), minlength=1 << 16) for i, row in enumerate(rows)]
            return torch.stack(halves).cpu()

        progress = tqdm(list(names), desc="trimming", unit="parameter", leave=False)
        return sum(in_order(count, progress, device))

    upper = histograms(lambda bits, expert: bits >> 16)
    k = int((1 - density) * int(upper[0].sum()))
    if k == 0:
        return torch.zeros(len(upper))
    cumulative = upper.cumsum(1)
    halves = (cumulative < k).sum(1)
    below = (cumulative - upper).gather(1, halves[:, None])
    lower = histograms(lambda bits, expert: bits[bits >> 16 == halves[expert].item()] & 0xFFFF)
    rest = (lower.cumsum(1) < k - below).sum(1)
    return (halves << 16 | rest).to(torch.int32).view(torch.float32)


def layer_norms(task_vectors: TaskVectors) -> pd.DataFrame:
    """One row per parameter and expert: the Frobenius norms behind the paper's Fig. 2c.

    Columns: parameter, layer, kind, expert, size (number of entries), base_norm, norm,
    norm_per_parameter (norm / size, the paper's measure) and relative_norm (norm / base_norm).
    """
    rows = []
    for name in task_vectors:
        base_norm = _norm(task_vectors.base[name])
        for expert, task_vector in zip(task_vectors.expert_names, task_vectors[name], strict=True):
            rows.append(
                {
                    "parameter": name,
                    "layer": layer_index(name),
                    "kind": module_kind(name),
                    "expert": expert,
                    "size": task_vector.numel(),
                    "base_norm": base_norm,
                    "norm": _norm(task_vector),
                }
            )
    table = pd.DataFrame(rows)
    table["norm_per_parameter"] = table["norm"] / table["size"]
    table["relative_norm"] = table["norm"] / table["base_norm"]
    return table


def magnitudes(task_vectors: TaskVectors, sample: int = 2000, seed: int = 0) -> pd.DataFrame:
    """A sample of |entries| of the task vectors, for distributions as in the paper's Fig. 2a.

    At most `sample` entries of each parameter, the same ones for all experts. Columns: parameter,
    layer, kind, expert, magnitude, weight (how many entries of the parameter one row stands for:
    weigh a histogram over several parameters by it).
    """
    frames = []
    for name in task_vectors:
        stack = task_vectors[name].flatten(1)
        size = stack.shape[1]
        drawn = min(sample, size)
        generator = np.random.default_rng(derive_seed(seed, name))
        index = torch.from_numpy(generator.choice(size, drawn, replace=False))
        values = stack[:, index.to(stack.device)].abs().cpu().numpy()
        frames.append(
            pd.DataFrame(
                {
                    "parameter": name,
                    "layer": layer_index(name),
                    "kind": module_kind(name),
                    "expert": np.repeat(task_vectors.expert_names, drawn),
                    "magnitude": values.reshape(-1),
                    "weight": size / drawn,
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def derive_seed(seed: int, *parts: str) -> int:
    """A 63-bit seed that hangs on `seed` and `parts` only, not on the order of work."""
    digest = hashlib.sha256("\0".join([str(seed), *parts]).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _norm(tensor: Tensor) -> float:
    return torch.linalg.vector_norm(tensor.to(torch.float32), dtype=torch.float64).item()
