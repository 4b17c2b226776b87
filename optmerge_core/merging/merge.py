"""The one loop: read a parameter of all experts, stack, merge, write; then the next.

The only place where files (`checkpoints`) and mathematics (`methods`) meet. Everything that can be
refused is refused before anything is written.
"""

from __future__ import annotations

import inspect
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from optmerge_core.checkpoints.formats import URL, dtype_name
from optmerge_core.checkpoints.open import open_checkpoint, open_expert
from optmerge_core.checkpoints.writer import CheckpointWriter, check_output
from optmerge_core.merging.card import model_card
from optmerge_core.merging.checks import (
    check_changes,
    check_finite,
    check_folders,
    check_read,
    check_request,
    check_unchanged,
    in_range,
)
from optmerge_core.merging.families import mergeable
from optmerge_core.merging.plan import check_experts, tied_head
from optmerge_core.merging.report import MergeReport, _record, describe, record_of
from optmerge_core.methods.blocks import Blocks
from optmerge_core.methods.dare import dare
from optmerge_core.methods.registry import METHODS, merge_blocks, merges_in_blocks
from optmerge_core.runtime import (
    in_order,
    parse_device,
    parse_dtype,
    peak_memory,
    reset_peak_memory,
)
from optmerge_core.task_vectors.stack import Part, TaskVectors, apply, derive_seed, pinned

Result = tuple[Tensor, dict[str, Any] | None]


def merge(
    base_model: str | Path,
    experts: Mapping[str, str | Path],
    output_dir: str | Path,
    *,
    method: str = "optmerge",
    method_options: Mapping[str, Any] | None = None,
    scaling_coefficient: float = 1.0,
    device: str = "auto",
    dtype: str | torch.dtype | None = None,
    trim: str = "tensor",
    seed: int = 0,
    overwrite: bool = False,
    family: str | None = None,
    scope: str = "linear",
    max_shard_size: int | str = "400MB",
    stream: bool = False,
) -> MergeReport:
    """Merge fine-tuned experts of one base model into a complete Hugging Face folder.

    `base_model` and the values of `experts` (name -> location) are folders or hub ids
    (`owner/name@revision`), an expert's also a PEFT LoRA adapter's. A parameter that merges (see
    `parameters.mergeable`; `family` replaces config.json's model type) becomes
    base + scaling_coefficient * METHODS[method](stack of task vectors), computed in float32 on
    `device` and stored in the base's dtype. All else is the base's, byte for byte. With `dtype`,
    every floating-point parameter is stored in that dtype. With `scope="all"` every floating-point
    parameter merges that all experts have in the base's shape, not the language model's linear
    layers alone; methods for matrices take the mean of all others. `trim="model"` lets the TIES
    methods trim over the whole model instead of per tensor, at the cost of two more readings.

    Memory: one parameter of all experts with the method's workspace, and one output shard. Besides
    the merge itself every input is read twice: before it to look for NaN and Inf, after it to hash
    the files for the report. With `stream`, inputs may stay on the hub or a web server (URLs), and
    are read once, over the network: NaN and Inf are looked for in what has just come, and hashes
    are those the hub tells. `trim="model"` then needs local inputs.

    Raises `ValueError` (`CheckpointError` for files), and nothing is left at `output_dir`.
    """
    started = time.perf_counter()
    options = dict(method_options or {})
    check_request(experts, method, options, scaling_coefficient, trim)
    check_output(output_dir, overwrite=overwrite)
    device, dtype = parse_device(device), parse_dtype(dtype)
    reset_peak_memory(device)

    base = open_checkpoint(base_model, stream=stream)
    opened = {name: open_expert(location, base, stream) for name, location in experts.items()}
    remote = [x.source for x in (base, *opened.values()) if URL.match(x.source)]
    if remote and trim == "model":
        raise ValueError(
            f"trim='model' reads all weights three times, too often for {remote[0]}; download the "
            "models first (no stream), or use trim='tensor'"
        )
    model_type = family or base.config().get("model_type")
    tied = tied_head(base) if scope == "all" else {}
    names = [name for name in mergeable(base.shapes(), model_type, scope) if name not in tied]
    names = check_experts(base, opened, names, model_type)
    check_folders(base, opened, Path(output_dir))
    stored = {
        name: dtype if dtype and base.dtype(name).is_floating_point else base.dtype(name)
        for name in base
    }
    expected_bytes = sum(math.prod(base.shape(name)) * stored[name].itemsize for name in base)
    writer = CheckpointWriter(
        output_dir, max_shard_size, overwrite=overwrite, expected_bytes=expected_bytes
    )
    task_vectors = TaskVectors(base, opened, names, device)
    merging, records = frozenset(names), []
    in_blocks = device.type == "cpu" and merges_in_blocks(method, options, trim)

    def load(name: str) -> tuple[str, Tensor, list[Part] | None]:
        tensor = pinned(base[name], device)
        whole = tied.get(name, name) in merging and not in_blocks
        return name, tensor, task_vectors.read(tied.get(name, name), tensor) if whole else None

    def result(name: str, tensor: Tensor, parts: list[Part] | None) -> Result:
        record, source = None, tied.get(name, name)  # a tied head stays what its embeddings become
        if stream:
            check_read(name, "the base", tensor)
        if source in merging and in_blocks:
            tensor, record = change_in_blocks(name, tensor, source)
        elif source in merging:
            stack, merged = merge_parameter(source, task_vectors.stack(source, tensor, parts))
            if stream:
                for expert, task_vector in zip(opened, stack, strict=True):
                    check_read(name, f"expert {expert}", task_vector)
            record = record_of(name, tensor, stack, merged, task_vectors.expert_names)
            tensor = apply(tensor, merged, scaling_coefficient, stored[name])
        return in_range(name, tensor.to("cpu", stored[name])), record

    def change_in_blocks(name: str, tensor: Tensor, source: str) -> tuple[Tensor, dict[str, Any]]:
        """The same values, with no more of the task vectors in memory than a block."""
        _, results = merge_parameter(source, task_vectors.blocks(source, tensor))
        weights, changed = tensor.flatten(), torch.empty(tensor.numel(), dtype=stored[name])
        squares = torch.zeros(2 + len(opened), dtype=torch.float64)
        for entries, block, merged in results:
            own = weights[entries]
            changed[entries] = apply(own, merged, scaling_coefficient, stored[name])
            squares[1] += torch.linalg.vector_norm(merged).double().square()
            if block is not None:
                squares[0] += torch.linalg.vector_norm(own.float()).double().square()
                squares[2:] += torch.linalg.vector_norm(block, dim=1).double().square()
        if stream and not squares.isfinite().all():
            for expert, tensors in opened.items():
                check_read(name, f"expert {expert}", tensors[source])
        norms = squares.sqrt().tolist()
        record = _record(name, tensor.shape, *norms[:2], opened, norms[2:])
        return changed.view(tensor.shape), record

    def memory(name: str) -> int:
        """Bytes that a parameter takes at most while it is merged: some ten stacks in float32."""
        stacks = 1 if in_blocks else 10 * len(opened)
        return 4 * stacks * math.prod(base.shape(name)) if name in merging else 0

    merged_names = [source for name in base if (source := tied.get(name, name)) in merging]
    readings = [(base, base), *((x, merged_names) for x in opened.values())]
    with writer, _streaming(readings) if stream else nullcontext():
        if not stream:
            check_changes(base, opened, names)
            check_finite(base, opened, names)
        merge_parameter = parameter_merger(task_vectors, method, options, seed, trim)
        if device.type == "cuda":  # the next parameters are read while it computes
            loaded = in_order(load, base, device, memory)
            results = in_order(lambda item: result(*item), loaded, device)
        else:
            results = in_order(lambda name: result(*load(name)), base, device, memory)
        progress = tqdm(base, desc=f"merging ({method})", unit="parameter")
        for name, (tensor, record) in zip(progress, results, strict=True):
            writer.add(name, tensor)
            if record:
                records.append(record)
        if stream:
            norms = {x: [record["expert_norms"][x] for record in records] for x in opened}
            check_unchanged([x for x in opened if not any(norms[x])], len(opened), len(names))
        writer.copy_side_files(base.folder)
        if dtype is not None:
            config = _with_dtype(base.config() | {"dtype": ""}, dtype_name(dtype))
            writer.write_text("config.json", json.dumps(config, indent=2) + "\n")
        inputs = [(base_model, base), *((experts[name], opened[name]) for name in opened)]
        described = list(in_order(lambda pair: describe(*pair), inputs))
        peak_memory_bytes, peak_device_memory_bytes = peak_memory(device)
        report = MergeReport(
            output_dir=str(output_dir),
            method=method,
            method_options=options,
            scaling_coefficient=scaling_coefficient,
            trim=trim,
            scope=scope,
            seed=seed,
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
            dtype=dtype and dtype_name(dtype),
            model_type=model_type,
            base_model=described[0],
            experts=dict(zip(opened, described[1:], strict=True)),
            parameters=records,
            parameters_kept=len(base) - len(records),
            seconds=time.perf_counter() - started,
            peak_memory_bytes=peak_memory_bytes,
            peak_device_memory_bytes=peak_device_memory_bytes,
            versions={name: version(name) for name in ("torch", "safetensors")},
            family=family,
        )
        writer.write_text("merge_report.json", report.to_json())
        writer.write_text("README.md", model_card(report, base.config(), base.folder))
    return report


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
    Raises `ValueError` as `merge` does for methods, options and shapes.
    """
    options = dict(method_options or {})
    check_request(experts, method, options, 1.0, trim)
    device = parse_device(device)
    task_vectors = TaskVectors(base, experts, names, device)
    merge_parameter = parameter_merger(task_vectors, method, options, seed, trim)
    results = in_order(lambda name: merge_parameter(name)[1].cpu(), task_vectors, device)
    progress = tqdm(task_vectors, desc=f"merging ({method})", unit="parameter", leave=False)
    return dict(zip(progress, results, strict=True))


def parameter_merger(
    task_vectors: TaskVectors, method: str, options: dict[str, Any], seed: int, trim: str
) -> Callable[..., tuple[Tensor, Tensor]]:
    """The loop body: name -> (stack (experts, *shape), merged task vector (*shape)).

    Its second argument is the stack, where the caller has it already, or the same as `Blocks`: then
    the second result is what `merge_blocks` gives.
    """

    def random(name: str) -> dict[str, list[torch.Generator]]:
        if not method.startswith("dare_"):
            return {}
        # CPU generators on every device: the same entries are dropped wherever the merge runs.
        seeds = [derive_seed(seed, name, expert) for expert in task_vectors.expert_names]
        return {"generator": [torch.Generator().manual_seed(value) for value in seeds]}

    def before_trimming(name: str) -> Tensor:
        stack = task_vectors[name]
        if method == "dare_ties":
            stack = dare(stack, settings["drop_rate"], **random(name))
        return stack

    if trim == "model":
        parameters = inspect.signature(METHODS[method]).parameters.values()
        settings = {parameter.name: parameter.default for parameter in parameters} | options
        thresholds = model_thresholds(
            before_trimming, task_vectors, settings["density"], task_vectors.device
        )
        options = options | {"thresholds": thresholds}

    def merge_parameter(name: str, stack: Tensor | Blocks | None = None) -> tuple[Any, Any]:
        stack = task_vectors[name] if stack is None else stack
        if isinstance(stack, Blocks):
            return stack, merge_blocks(method, stack, **options)
        return stack, METHODS[method](stack, **options, **random(name))

    return merge_parameter


def _streaming(readings: list[tuple[Mapping[str, Tensor], Iterable[str]]]) -> Any:
    from optmerge_core.checkpoints.remote import streaming  # only here: it takes a while to import

    return streaming(readings)


def _with_dtype(config: dict, dtype: str) -> dict:
    """config.json of a model stored in another dtype: its dtype entries at any depth replaced."""
    changed = {key: _with_dtype(x, dtype) for key, x in config.items() if isinstance(x, dict)}
    changed |= dict.fromkeys(config.keys() & {"dtype", "torch_dtype"}, dtype)
    return config | changed


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
