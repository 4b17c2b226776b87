"""What a merge refuses, and what it only remarks upon, before it writes anything."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from optmerge_core.checkpoints.formats import dtype_name, side_files
from optmerge_core.checkpoints.weights import Weights
from optmerge_core.merging.licences import tell_licences
from optmerge_core.merging.varied import Settings, varied
from optmerge_core.methods.contract import check_option_names
from optmerge_core.methods.registry import METHODS, check_options
from optmerge_core.runtime import FLOAT_DTYPES, in_order
from optmerge_core.task_vectors.stack import TaskVectors


class NotFinite(ValueError):
    """A parameter of an input has NaN or Inf; the message names parameter and owner."""


class NothingChanges(ValueError):
    """All experts equal the base model in all that merges."""


TRIMMING = ("ties", "dare_ties")
"""The methods that trim: per tensor, or over the whole model."""


def check_request(
    experts: Mapping[str, Any],
    method: str,
    options: dict[str, Any],
    scaling_coefficient: float,
    trim: str,
    seed: int = 0,
    family: str | None = None,
) -> None:
    """Raise `ValueError` for arguments of `merge` that no checkpoint could make right."""
    if not isinstance(experts, Mapping) or not experts:
        raise ValueError("experts: give at least one, as a mapping name -> folder or hub id")
    check_method(method, options, len(experts))
    if not isinstance(scaling_coefficient, int | float) or not math.isfinite(scaling_coefficient):
        raise ValueError(f"scaling_coefficient {scaling_coefficient!r}: give a finite number")
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ValueError(f"seed {seed!r}: give a whole number")
    if not isinstance(family, str | None):
        raise ValueError(f"family {family!r}: give a model type as config.json names it, or None")
    if trim not in ("tensor", "model"):
        raise ValueError(f"trim {trim!r}: give 'tensor' or 'model'")
    if trim == "model" and method not in TRIMMING:
        raise ValueError(f"trim='model' is for {' and '.join(TRIMMING)}; {method} does not trim")
    if trim == "model" and isinstance(options.get("density"), list | tuple):
        raise ValueError(
            "trim='model' takes one density for all experts, layers and tensors; use trim='tensor'"
        )


def with_preset(method: str, options: Mapping[str, Any] | None, preset: str) -> dict[str, Any]:
    """The options, OptMerge's with this preset unless they name one: others may be given beside.

    None is the word of OptMerge's options for what the preset says.
    """
    if method != "optmerge":
        return dict(options or {})
    return {"preset": preset} | {k: v for k, v in (options or {}).items() if v is not None}


def check_method(method: str, options: Mapping[str, Any], experts: int | None = None) -> None:
    """Raise `ValueError` for a method or option that does not exist, or a value that is none.

    With `experts`, their number, also for a list of values that is not as long. What differs by
    layer is tried at each layer there is a value for; by filter, in `check_settings`.
    """
    set_by_merge = {"thresholds": "trim", "generator": "seed", "base": "base_model"}
    for name in options.keys() & set_by_merge.keys():
        raise ValueError(f"{method}: {name} follows from {set_by_merge[name]}; give that")
    settings = Settings(options)
    check_option_names(METHODS[method], settings.options)
    for own in settings.examples():
        _try(method, own, experts)


def check_settings(
    method: str, options: Mapping[str, Any], base: Iterable[str], names: Iterable[str], experts: int
) -> Settings:
    """The settings of the parameters `names` of a base, of which all that are different are tried.

    Raises `ValueError`, and warns of filters that are part of none of these names.
    """
    settings, tried = Settings(options, base), dict[str, None]()
    if not settings.vary:
        return settings
    names = list(names)
    for name in names:
        try:
            own, _ = settings.of(name)
            if (text := repr(own)) not in tried:
                _try(method, own, experts)
                tried[text] = None
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    filters = {(key, entry.get("filter", "*")) for key, v in varied(options) for entry in v}
    for key, text in sorted(filters):
        if text != "*" and not any(text in name for name in names):
            notice(f"{key}: the filter {text!r} is part of the name of nothing that merges")
    return settings


def _try(method: str, options: Mapping[str, Any], experts: int | None) -> None:
    try:
        check_options(method, options, experts)
        if not callable(options.get("on_step", print)):
            raise TypeError("on_step is no function")
    except (TypeError, ArithmeticError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"{method}: an option of {dict(options)} has a wrong type ({error})"
        ) from error


def check_folders(
    base: Weights, experts: Mapping[str, Weights], output_dir: Path, processor: Path | None = None
) -> None:
    """Warn of a folder given twice and of licences; raise `ValueError` if the output is an input's.

    Also raised, as `CheckpointError`: what `side_files` finds wrong with the base's, or with those
    of the folder that the processor is from.
    """
    tell_licences(base, experts)
    folders = {"the base model": base.folder} | expert_folders(experts)
    for folder in filter(None, {base.folder, processor}):
        side_files(folder)
    check_apart(folders, output_dir)
    if processor not in folders.values():
        check_apart({"the processor": processor}, output_dir)


def expert_folders(experts: Mapping[str, Weights]) -> dict[str, Path | None]:
    return {f"expert {name}": expert.folder for name, expert in experts.items()}


def check_apart(folders: Mapping[str, Path | None], output_dir: Path) -> None:
    """The same for what is called so -> its folder, None in memory."""
    seen: dict[Path, str] = {}
    for owner, given in folders.items():
        if given is None:
            continue
        folder = given.resolve()
        if folder in seen:
            notice(f"{owner} is the same folder as {seen[folder]}: {given}")
        seen.setdefault(folder, owner)
    for folder, owner in seen.items():
        output = output_dir.resolve()
        if output in (folder, *folder.parents):
            raise ValueError(f"{output_dir} holds {owner}: choose another output folder")
        if folder in output.parents:
            raise ValueError(f"{output_dir} is inside {owner}: choose another output folder")


def check_unchanged(unchanged: list[str], experts: int, parameters: int) -> None:
    """Warn of these experts, which equal the base; raise `ValueError` if there are no others."""
    if len(unchanged) == experts:
        raise NothingChanges(
            f"every expert ({', '.join(unchanged)}) equals the base model in all {parameters} "
            "parameters that merge, so the merged model would be the base model; give models that "
            "were trained further from it"
        )
    for name in unchanged:
        notice(
            f"expert {name} equals the base model in all {parameters} parameters that merge: its "
            "task vector is zero"
        )


def check_finite(
    base: Weights, experts: Mapping[str, Weights], names: Iterable[str], sources: Mapping[str, str]
) -> None:
    """Raise one `NotFinite` that lists what has NaN or Inf, of these parameters of the base.

    sources: those that merge -> the parameter of the experts that is looked at.
    """
    names = list(names)
    merging = dict.fromkeys(sources[name] for name in names if name in sources)
    readings = [("the base", base, name) for name in names]
    readings += [(f"expert {e}", x, n) for e, x in experts.items() for n in merging if n in x]

    def problem(reading: tuple[str, Weights, str]) -> str | None:
        owner, weights, name = reading
        return _not_finite_text(name, owner, weights[name])

    problems = [text for text in in_order(problem, tqdm(readings, desc="checking")) if text]
    if problems:
        raise NotFinite(
            f"{len(problems)} parameters are not finite:\n  "
            + "\n  ".join(problems)
            + "\nUse an earlier or undamaged checkpoint, or leave the expert out."
        )


def check_finite_tensor(name: str, owner: str, tensor: Tensor) -> None:
    """As `check_finite`, for a tensor that was just read. Raises `NotFinite`."""
    if text := _not_finite_text(name, owner, tensor):
        raise NotFinite(f"{text}; use an earlier or undamaged checkpoint, or leave the expert out")


def check_finite_stack(name: str, task_vectors: TaskVectors, measured: Tensor) -> None:
    """Raise `NotFinite` where a parameter's stack, or what was `measured` of it, is not finite.

    It names whose NaN or Inf it is. If it is nobody's, finite numbers overflow, which shows later.
    """
    if not_finite(measured):
        owners = {f"expert {expert}": x for expert, x in task_vectors.experts.items()}
        for owner, weights in {"the base": task_vectors.base, **owners}.items():
            check_finite_tensor(name, owner, weights[name])


def check_in_range(name: str, tensor: Tensor) -> Tensor:
    """The tensor itself; the inputs are finite, so what is not finite now is an overflow."""
    if not_finite(tensor):
        raise ValueError(
            f"{name}: the result is out of the range of {dtype_name(tensor.dtype)}; use a smaller "
            "scaling_coefficient, or dtype='bfloat16' or 'float32'"
        )
    return tensor


def not_finite(tensor: Tensor) -> bool:
    """Whether there is NaN or Inf in it, without a second tensor to write and read.

    A scalar merges in no scope and may be infinite: a bound, of what Gemma-4's tower clips.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return False
    if not tensor.ndim:
        return bool(tensor.isnan())
    low, high = torch.aminmax(_comparable(tensor))  # NaN if there is one
    return not bool(torch.isfinite(low) and torch.isfinite(high))


def _not_finite_text(name: str, owner: str, tensor: Tensor) -> str | None:
    if not not_finite(tensor):
        return None
    return f"{name}: {owner} has {int((~_comparable(tensor).isfinite()).sum())} NaN or Inf"


def _comparable(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in FLOAT_DTYPES.values() else tensor.float()  # of 8 bits


def notice(text: str) -> None:
    warnings.warn(text, stacklevel=3)
