"""What a merge refuses, and what it only remarks upon, before it writes anything."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from optmerge_core.checkpoints.formats import dtype_name
from optmerge_core.checkpoints.weights import Weights
from optmerge_core.checkpoints.writer import side_files
from optmerge_core.methods.registry import check_options
from optmerge_core.runtime import FLOAT_DTYPES, in_order
from optmerge_core.task_vectors.stack import TaskVectors

TRIMMING = ("ties", "dare_ties")
"""The methods that trim: per tensor, or over the whole model."""


def check_request(
    experts: Mapping[str, Any],
    method: str,
    options: dict[str, Any],
    scaling_coefficient: float,
    trim: str,
) -> None:
    """Raise `ValueError` for arguments of `merge` that no checkpoint could make right."""
    if not isinstance(experts, Mapping) or not experts:
        raise ValueError("experts: give at least one, as a mapping name -> folder or hub id")
    check_method(method, options, len(experts))
    if not math.isfinite(scaling_coefficient):
        raise ValueError(f"scaling_coefficient {scaling_coefficient}: give a finite number")
    if trim not in ("tensor", "model"):
        raise ValueError(f"trim {trim!r}: give 'tensor' or 'model'")
    if trim == "model" and method not in TRIMMING:
        raise ValueError(f"trim='model' is for {' and '.join(TRIMMING)}; {method} does not trim")
    if trim == "model" and isinstance(options.get("density"), list | tuple):
        raise ValueError("trim='model' takes one density for all experts; use trim='tensor'")


def with_preset(method: str, options: Mapping[str, Any] | None, preset: str) -> dict[str, Any]:
    """The options, OptMerge's with this preset unless they name one: others may be given beside."""
    return ({"preset": preset} if method == "optmerge" else {}) | dict(options or {})


def check_method(method: str, options: Mapping[str, Any], experts: int | None = None) -> None:
    """Raise `ValueError` for a method or option that does not exist, or a value that is none.

    With `experts`, their number, also for a list of values that is not as long.
    """
    set_by_merge = {"thresholds": "trim", "generator": "seed"}
    for name in options.keys() & set_by_merge.keys():
        raise ValueError(f"{method}: {name} follows from {set_by_merge[name]}; give that")
    try:
        check_options(method, options, experts)
        if not callable(options.get("on_step", print)):
            raise TypeError("on_step is no function")
    except (TypeError, ArithmeticError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"{method}: an option of {dict(options)} has a wrong type ({error})"
        ) from error


def check_folders(base: Weights, experts: Mapping[str, Weights], output_dir: Path) -> None:
    """Warn of a folder given twice; raise `ValueError` if the output would change an input.

    Also raised, as `CheckpointError`: what `side_files` finds wrong with the base's.
    """
    side_files(base.folder)
    seen = {base.folder.resolve(): "the base model"}
    for name, expert in experts.items():
        folder = expert.folder.resolve()
        if folder in seen:
            _notice(f"expert {name} is the same folder as {seen[folder]}: {expert.folder}")
        seen.setdefault(folder, f"expert {name}")
    for folder, owner in seen.items():
        output = output_dir.resolve()
        if output in (folder, *folder.parents):
            raise ValueError(f"{output_dir} holds {owner}: choose another output folder")
        if folder in output.parents:
            raise ValueError(f"{output_dir} is inside {owner}: choose another output folder")


def check_changes(base: Weights, experts: Mapping[str, Weights], names: list[str]) -> None:
    """Warn of experts that equal the base in all that merges; raise `ValueError` if all do.

    Reads up to the first parameter that differs, so an expert that was trained costs next to
    nothing.
    """
    unchanged, by_size = [], sorted(names, key=lambda name: math.prod(base.shape(name)))
    for expert_name, expert in experts.items():
        task_vectors = TaskVectors(base, {expert_name: expert}, names)
        pieces = (task_vectors.blocks(name, base[name]) for name in by_size)
        if not any(block.any() for blocks in pieces for block in blocks):
            unchanged.append(expert_name)
    check_unchanged(unchanged, len(experts), len(names))


def check_unchanged(unchanged: list[str], experts: int, parameters: int) -> None:
    """Warn of these experts, which equal the base; raise `ValueError` if there are no others."""
    if len(unchanged) == experts:
        raise ValueError(
            f"every expert ({', '.join(unchanged)}) equals the base model in all {parameters} "
            "parameters that merge, so the merged model would be the base model; give models that "
            "were trained further from it"
        )
    for name in unchanged:
        _notice(
            f"expert {name} equals the base model in all {parameters} parameters that merge: its "
            "task vector is zero"
        )


def check_finite(base: Weights, experts: Mapping[str, Weights], names: list[str]) -> None:
    """Raise one `ValueError` that lists every parameter with NaN or Inf.

    Reads all of the base, and of `names` what an expert has.
    """
    readings = [("the base", base, name) for name in base]
    readings += [
        (f"expert {n}", expert, name)
        for n, expert in experts.items()
        for name in names
        if name in expert
    ]

    def problem(reading: tuple[str, Weights, str]) -> str | None:
        owner, checkpoint, name = reading
        count = _count_not_finite(checkpoint[name])
        return f"{name}: {owner} has {count} NaN or Inf" if count else None

    found = in_order(problem, tqdm(readings, desc="checking"))
    problems = [text for text in found if text]
    if problems:
        raise ValueError(
            f"{len(problems)} parameters are not finite:\n  "
            + "\n  ".join(problems)
            + "\nUse an earlier or undamaged checkpoint, or leave the expert out."
        )


def check_read(name: str, owner: str, tensor: Tensor) -> None:
    """As `check_finite`, for a tensor that was just read and cannot be read twice."""
    if count := _count_not_finite(tensor):
        raise ValueError(
            f"{name}: {owner} has {count} NaN or Inf; use an earlier or undamaged checkpoint, or "
            "leave the expert out"
        )


def in_range(name: str, tensor: Tensor) -> Tensor:
    """The tensor itself; the inputs are finite, so what is not finite now is an overflow."""
    if _count_not_finite(tensor):
        raise ValueError(
            f"{name}: the result is out of the range of {dtype_name(tensor.dtype)}; use a smaller "
            "scaling_coefficient, or dtype='bfloat16' or 'float32'"
        )
    return tensor


def _count_not_finite(tensor: Tensor) -> int:
    if not tensor.is_floating_point() or not tensor.numel():
        return 0
    if tensor.dtype not in FLOAT_DTYPES.values():
        tensor = tensor.float()  # 8-bit floats have no isfinite
    low, high = torch.aminmax(tensor)  # NaN if there is one: no second tensor to write and read
    return 0 if torch.isfinite(low) and torch.isfinite(high) else int((~tensor.isfinite()).sum())


def _notice(text: str) -> None:
    warnings.warn(text, stacklevel=3)
