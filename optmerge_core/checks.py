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

from optmerge_core.checkpoints import Checkpoint
from optmerge_core.methods import check_options
from optmerge_core.parallel import in_order
from optmerge_core.parameters import merges

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


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
    check_method(method, options)
    if not math.isfinite(scaling_coefficient):
        raise ValueError(f"scaling_coefficient {scaling_coefficient}: give a finite number")
    if trim not in ("tensor", "model"):
        raise ValueError(f"trim {trim!r}: give 'tensor' or 'model'")
    if trim == "model" and method not in ("ties", "dare_ties"):
        raise ValueError(f"trim='model' is for ties and dare_ties; {method} does not trim")


def check_method(method: str, options: Mapping[str, Any]) -> None:
    """Raise `ValueError` for a method or option that does not exist, or a value that is none."""
    set_by_merge = {"thresholds": "trim", "generator": "seed"}
    for name in options.keys() & set_by_merge.keys():
        raise ValueError(f"{method}: {name} follows from {set_by_merge[name]}; give that")
    try:
        check_options(method, options)
    except TypeError as error:
        raise ValueError(
            f"{method}: an option of {dict(options)} has a wrong type ({error})"
        ) from error


def check_experts(
    base: Checkpoint, experts: Mapping[str, Checkpoint], names: list[str], model_type: str | None
) -> None:
    """Raise one `ValueError` that lists every merging parameter which does not match the base.

    Where parameters outside `names` differ in name or shape, a warning says that the base's values
    are kept.
    """
    problems, merging, base_shapes = [], set(names), base.shapes()
    for name in names:
        if base.dtype(name) not in DTYPES.values():
            problems.append(f"{name}: quantised to {dtype_name(base.dtype(name))} in the base")
    for expert_name, expert in experts.items():
        outside, expert_shapes = [], expert.shapes()
        for name in sorted({*base, *expert}):
            ours, theirs = _shape_and_dtype(base, name), _shape_and_dtype(expert, name)
            found = f"{name}: expert {expert_name} has {theirs}, the base {ours}"
            if name in merging and ours != theirs:
                problems.append(found)
            elif name not in base and merges(name, expert_shapes[name], model_type):
                problems.append(found)
            elif name not in merging and base_shapes.get(name) != expert_shapes.get(name):
                outside.append(found)
        changed = [n for n in getattr(expert, "modules", {}) if n not in merging]
        if changed:
            _notice(
                f"expert {expert_name} adapts {len(changed)} parameters outside the merge; the "
                f"base's are kept ({changed[0]})"
            )
        if outside:
            _notice(
                f"{len(outside)} parameters outside the merge differ in name or shape; the base's "
                f"are kept ({outside[0]})"
            )
    if problems:
        raise ValueError(
            f"{len(problems)} parameters cannot be merged with the base model {base.folder}:\n  "
            + "\n  ".join(problems)
            + "\nAn expert must be a fine-tuned copy of this base model, saved unquantised in the "
            "same dtype: correct base_model, save the expert again, or leave it out."
        )


def check_folders(base: Checkpoint, experts: Mapping[str, Checkpoint], output_dir: Path) -> None:
    """Warn of a folder given twice; raise `ValueError` if the output would replace an input."""
    seen = {base.folder.resolve(): "the base model"}
    for name, expert in experts.items():
        folder = expert.folder.resolve()
        if folder in seen:
            _notice(f"expert {name} is the same folder as {seen[folder]}: {expert.folder}")
        seen.setdefault(folder, f"expert {name}")
    for folder, owner in seen.items():
        if output_dir.resolve() in (folder, *folder.parents):
            raise ValueError(f"{output_dir} holds {owner}: choose another output folder")


def check_finite(base: Checkpoint, experts: Mapping[str, Checkpoint], names: list[str]) -> None:
    """Raise one `ValueError` that lists every parameter with NaN or Inf: reads all that is used."""
    readings = [("the base", base, name) for name in base]
    readings += [(f"expert {n}", expert, name) for n, expert in experts.items() for name in names]

    def problem(reading: tuple[str, Checkpoint, str]) -> str | None:
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


def in_range(name: str, tensor: Tensor) -> Tensor:
    """The tensor itself; the inputs are finite, so what is not finite now is an overflow."""
    if _count_not_finite(tensor):
        raise ValueError(
            f"{name}: the result is out of the range of {dtype_name(tensor.dtype)}; use a smaller "
            "scaling_coefficient, or dtype='bfloat16' or 'float32'"
        )
    return tensor


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or dtype in DTYPES.values():
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: give {', '.join(DTYPES)} or None (the base's)")
    return DTYPES[dtype]


def parse_device(device: str | torch.device) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device {device!r}: give 'auto', 'cpu' or 'cuda'") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda': this torch sees no CUDA device; use 'auto' or 'cpu'")
    return device


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape_and_dtype(checkpoint: Checkpoint, name: str) -> str:
    if name not in checkpoint:
        return "no such parameter"
    return f"shape {checkpoint.shape(name)} {dtype_name(checkpoint.dtype(name))}"


def _count_not_finite(tensor: Tensor) -> int:
    if not tensor.is_floating_point() or not tensor.numel():
        return 0
    if tensor.dtype not in DTYPES.values():
        tensor = tensor.float()  # 8-bit floats have no isfinite
    low, high = torch.aminmax(tensor)  # NaN if there is one: no second tensor to write and read
    return 0 if torch.isfinite(low) and torch.isfinite(high) else int((~tensor.isfinite()).sum())


def _notice(text: str) -> None:
    warnings.warn(text, stacklevel=3)
