"""The one loop: read a parameter of all experts, stack, merge, add to the base; then the next.

The only place where files (`checkpoints`) and mathematics (`methods`) meet.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from optmerge_core.checkpoints.weights import Weights
from optmerge_core.merging.checks import (
    NotFinite,
    check_finite,
    check_finite_stack,
    check_finite_tensor,
    check_in_range,
    check_request,
    check_settings,
)
from optmerge_core.merging.report import Record, joined, record_of
from optmerge_core.merging.varied import Settings
from optmerge_core.methods import BASED, DRAWN
from optmerge_core.methods.dare import dare
from optmerge_core.methods.registry import METHODS, merge_blocks, merges_in_blocks
from optmerge_core.runtime import in_order, parse_device
from optmerge_core.task_vectors.stack import Part, TaskVectors, apply, derive_seed, pinned

AVERAGES = ("weight_average", "task_arithmetic")  # to them all matrices are as one
Merged = tuple[str, Tensor, Record | None]
"""A parameter of the output: name, value as stored, the report's record if it was merged."""
Piece = tuple[str, int | None, tuple[Tensor, list[Part]] | None]
"""A parameter as it is; or the number of a matrix in a mixture's tensor, which is read already."""


class ParameterMerger:
    """What `results` gives for some parameters of the base, the same bits on any number of threads.

    sources: name -> the parameter whose task vectors are merged for it, for those that merge;
    dtypes: name -> the dtype to store. `thresholds` (experts,) are of trimming over the model. Of
    the `averaged` the experts' mean is taken, by no method, without scaling and record. `hashed`:
    the CPU takes the hashes of input files for the report as it goes, while it has them at hand.
    """

    def __init__(
        self,
        base: Weights,
        experts: Mapping[str, Weights],
        sources: Mapping[str, str],
        dtypes: Mapping[str, torch.dtype],
        *,
        method: str,
        options: Mapping[str, Any],
        scaling_coefficient: float,
        seed: int,
        device: torch.device,
        thresholds: Tensor | None = None,
        averaged: Collection[str] = (),
        hashed: bool = False,
    ):
        self.base, self.experts, self.sources, self.dtypes = base, experts, sources, dtypes
        self.scaling_coefficient, self.device, self.averaged = scaling_coefficient, device, averaged
        self.task_vectors = TaskVectors(base, experts, dict.fromkeys(sources.values()), device)
        self.method, self.settings, self.seed = method, Settings(options, base), seed
        self.thresholds = {} if thresholds is None else {"thresholds": thresholds.to(device)}
        self.hashed = hashed and device.type == "cpu"

    def results(self, names: Iterable[str]) -> Iterator[Merged]:
        """Each parameter's result, in their order. Raises `NotFinite` for NaN and Inf in an input.

        Where inputs can be read again, the error lists all that these parameters have.
        """
        names = list(names)
        try:
            pieces = self._pieces(names)
            if self.device.type == "cuda":  # the next parameters are read while it computes
                loaded = in_order(self._load, pieces, self.device, self._memory)
                work = in_order(lambda read: self._result(*read), loaded, self.device)
            else:
                work = in_order(lambda x: self._result(*self._load(x)), pieces, "cpu", self._memory)
            yield from self._put_together(work)
        except NotFinite:
            if not any(x.streamed(()) for x in (self.base, *self.experts.values())):
                check_finite(self.base, self.experts, names, self.sources)
            raise

    def _pieces(self, names: Iterable[str]) -> Iterator[Piece]:
        for name in names:
            whole = self.method in AVERAGES and self._blocked(name, None)
            apart = name in self.sources and name not in self.averaged and not whole
            read = None
            for number in self.task_vectors.numbers(name) if apart else [None]:
                if number == 0:
                    tensor = self.base[name]
                    read = tensor, self.task_vectors.read(name, tensor)
                yield name, number, read

    def _blocked(self, name: str, number: int | None) -> bool:
        source = self.sources.get(name)
        if source is None or number is not None or name in self.averaged:
            return False
        return self.device.type == "cpu" and merges_in_blocks(self.method, self._of(source)[0])

    def _of(self, source: str) -> tuple[dict[str, Any], float]:
        """The options of a parameter, and its scaling coefficient."""
        options, scaling = self.settings.of(source)
        return options | self.thresholds, self.scaling_coefficient * scaling

    def _load(self, piece: Piece) -> tuple[str, int | None, Tensor, list[Part] | None]:
        name, number, read = piece
        source, tensor = self.sources.get(name), self.base[name] if read is None else read[0]
        if source is None or self._blocked(name, number):
            return name, number, pinned(tensor, self.device), None
        parts = self.task_vectors.read(source, tensor) if read is None else read[1]
        own = partial(self.task_vectors.matrix, source, number=number)
        return name, number, own(tensor), [(own(part), ready) for part, ready in parts]

    def _result(
        self, name: str, number: int | None, tensor: Tensor, parts: list[Part] | None
    ) -> tuple[int | None, Merged]:
        made: Record | None = None
        source, dtype = self.sources.get(name), self.dtypes[name]
        check_finite_tensor(name, "the base", tensor)
        if source is not None and self._blocked(name, number):
            tensor, made = self._in_blocks(name, tensor, source)
        elif source is not None:
            stack = self.task_vectors.stack(source, tensor, parts)
            check_finite_stack(source, self.task_vectors, stack)
            if name in self.averaged:
                tensor = apply(tensor, stack.mean(dim=0), 1.0, dtype)
            else:
                options, scaling = self._of(source)
                options |= generators(self.experts, self.method, self.seed, source, number)
                merged = _merged(self.method, stack, tensor, options)
                made = record_of(name, tensor, stack, merged, self.experts)
                tensor = apply(tensor, merged, scaling, dtype)
        tensor = check_in_range(name, tensor.to("cpu", dtype))
        if self.hashed and (number is None or number == self.base.shape(name)[0] - 1):
            self.base.hash_beside(name)
            if source is not None:
                for expert in self.experts.values():
                    expert.hash_beside(source)
        return number, (name, tensor, made)

    def _put_together(self, work: Iterable[tuple[int | None, Merged]]) -> Iterator[Merged]:
        """Each parameter, whole, once the last of its matrices is done."""
        whole, records = torch.empty(0), list[Record]()
        for number, (name, tensor, made) in work:
            if number is None or made is None:
                yield name, tensor, made
                continue
            if number == 0:
                whole, records = torch.empty(self.base.shape(name), dtype=tensor.dtype), []
            self.task_vectors.place(name, tensor, number, whole)
            records.append(made)
            if number == len(whole) - 1:
                yield name, whole, joined(name, whole.shape, records)

    def _in_blocks(self, name: str, tensor: Tensor, source: str) -> tuple[Tensor, Record]:
        """The same values, with no more of the task vectors in memory than a block."""
        dtype = self.dtypes[name]
        blocks = self.task_vectors.blocks(source, tensor)
        weights, changed = tensor.flatten(), torch.empty(tensor.numel(), dtype=dtype)
        squares = torch.zeros(2 + len(self.experts), dtype=torch.float64)
        options, scaling = self._of(source)
        options |= generators(self.experts, self.method, self.seed, source)
        for entries, block, merged in merge_blocks(self.method, blocks, **options):
            own = weights[entries]
            changed[entries] = apply(own, merged, scaling, dtype)
            squares[1] += torch.linalg.vector_norm(merged).double().square()
            if block is not None:
                squares[0] += torch.linalg.vector_norm(own.float()).double().square()
                squares[2:] += torch.linalg.vector_norm(block, dim=1).double().square()
        check_finite_stack(source, self.task_vectors, squares)
        base_norm, merged_norm, *norms = squares.sqrt().tolist()
        made = Record(
            name=name, shape=list(tensor.shape), base_norm=base_norm, merged_norm=merged_norm,
            expert_norms=dict(zip(self.experts, norms, strict=True)),
        )  # fmt: skip
        return changed.view(tensor.shape), made

    def _memory(self, piece: Piece) -> int:
        """Bytes that a piece takes at most while it is merged: some ten stacks in float32."""
        name, number, _ = piece
        if name not in self.sources:
            return 0
        shape = self.base.shape(name)[number is not None :]
        experts = len(self.experts)
        return 4 * math.prod(shape) if self._blocked(name, number) else memory(shape, experts)


def memory(shape: Sequence[int], experts: int) -> int:
    """Bytes that merging one parameter of this shape takes at most: ten stacks in float32."""
    return 40 * experts * math.prod(shape)


def merge_tensors(
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    names: Iterable[str],
    *,
    method: str = "optmerge",
    method_options: Mapping[str, Any] | None = None,
    seed: int = 0,
    device: str = "auto",
    trim: str = "tensor",
) -> dict[str, Tensor]:
    """Merged task vectors, name -> (*shape) float32 on the CPU, by the loop body of `merge`.

    For trying many scaling coefficients in memory: the merged model has `task_vectors.apply(
    base[name], merged[name], scaling_coefficient)` for these names, the base's values elsewhere.
    The option `lambda` (`varied`) is in them. Raises `ValueError` as `merge` does for methods,
    options, shapes, and NaN and Inf.
    """
    options, chosen = dict(method_options or {}), parse_device(device)
    check_request(experts, method, options, 1.0, trim, seed)
    task_vectors = TaskVectors(base, experts, names, chosen)
    settings = check_settings(method, options, base, task_vectors, len(experts))
    thresholds: dict[str, Any] = {}
    if trim == "model":
        limits = trim_thresholds_over_model(task_vectors, method, options, seed)
        thresholds["thresholds"] = limits.to(chosen)

    def merged(name: str) -> Tensor:
        whole = torch.empty(task_vectors.base.shape(name))
        own, scaling = settings.of(name)
        for number, tensor, stack in task_vectors.matrices(name):
            check_finite_stack(name, task_vectors, stack)
            random = generators(task_vectors.experts, method, seed, name, number)
            merged = _merged(method, stack, tensor, own | thresholds | random)
            task_vectors.place(name, merged, number, whole)
        return whole if scaling == 1 else whole * scaling

    progress = tqdm(task_vectors, desc=f"merging ({method})", unit="parameter", leave=False)
    return dict(zip(progress, in_order(merged, task_vectors, chosen), strict=True))


def _merged(method: str, stack: Tensor, base: Tensor, options: dict[str, Any]) -> Tensor:
    """By the method; a convolution, which is no stack of matrices, as one long row of entries."""
    flat = stack.flatten(1) if stack.ndim == 4 else stack
    if method in BASED:
        options["base"] = base.to(stack).reshape(flat.shape[1:])
    return METHODS[method](flat, **options).view(stack.shape[1:])


def generators(
    experts: Iterable[str], method: str, seed: int, name: str, number: int | None = None
) -> dict[str, Any]:
    """Generators, for `DRAWN`; on the CPU on every device, so that the same entries drop."""
    if method not in DRAWN:
        return {}
    more = [str(number)] * (number is not None)
    seeds = [derive_seed(seed, name, expert, *more) for expert in experts]
    return {"generator": [torch.Generator().manual_seed(value) for value in seeds]}


def trim_thresholds_over_model(
    task_vectors: TaskVectors, method: str, options: Mapping[str, Any], seed: int
) -> Tensor:
    """The magnitude each expert's entries must reach, over all names of `task_vectors`: (experts,).

    Reads all of them twice. For "ties" and "dare_ties", there after dropping. The density is one.
    """
    parameters = inspect.signature(METHODS[method]).parameters.values()
    defaults = {parameter.name: parameter.default for parameter in parameters}
    settings = Settings(options, task_vectors.base)

    def before_trimming(name: str) -> Iterator[Tensor]:
        own = defaults | settings.of(name)[0]
        for number, _, stack in task_vectors.matrices(name):
            random = generators(task_vectors.experts, method, seed, name, number)
            yield dare(stack, own["drop_rate"], **random) if random else stack

    density = settings.options.get("density", defaults["density"])
    return model_thresholds(before_trimming, task_vectors, density, task_vectors.device)


def model_thresholds(
    stacks_of: Callable[[str], Iterable[Tensor]],
    names: Iterable[str],
    density: float,
    device: str | torch.device = "cpu",
) -> Tensor:
    """The k-th smallest magnitude of each expert over a whole model, k = int((1 - density) size).

    `stacks_of(name)` are the float32 stacks (experts, *shape) of a parameter, asked for twice.
    Exact, in memory that does not grow with the model: the bits of a non-negative float32 sort like
    the number, so a histogram of their upper halves finds the threshold's upper half, and a second
    one, of the lower halves below that upper half, finds the rest. Returns (experts,), 0 for k = 0.
    """

    def histograms(half: Callable[[Tensor, int], Tensor]) -> Tensor:
        """Counts (experts, 65536) of the 16 bits that `half` takes of an expert's magnitudes."""

        def count(name: str) -> Tensor:
            counts = torch.zeros(1, dtype=torch.int64)
            for stack in stacks_of(name):
                rows = enumerate(stack.flatten(1).abs().view(torch.int32))
                halves = [torch.bincount(half(row, i), minlength=1 << 16) for i, row in rows]
                counts = counts + torch.stack(halves).cpu()
            return counts

        progress = tqdm(list(names), desc="trimming", unit="parameter", leave=False)
        return sum(in_order(count, progress, device), start=torch.zeros(1, dtype=torch.int64))

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
