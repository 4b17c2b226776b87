"""What a merge refuses, and what it only remarks upon, before it writes anything."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from optmerge_core.checkpoints import HUB_ID, Checkpoint
from optmerge_core.methods import check_options
from optmerge_core.parallel import in_order
from optmerge_core.parameters import merges
from optmerge_core.task_vectors import TaskVectors
from optmerge_core.writer import side_files

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
HEAD = "lm_head.weight"
EMBEDDINGS = re.compile(r"(?:embed_tokens|tok_embeddings)\.weight$")


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
    if trim == "model" and method not in ("ties", "dare_ties"):
        raise ValueError(f"trim='model' is for ties and dare_ties; {method} does not trim")
    if trim == "model" and isinstance(options.get("density"), list | tuple):
        raise ValueError("trim='model' takes one density for all experts; use trim='tensor'")


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


def check_experts(
    base: Checkpoint, experts: Mapping[str, Checkpoint], names: list[str], model_type: str | None
) -> list[str]:
    """The names that merge: `names`, less what only some checkpoints have (scope "all").

    What the family's rule merges must match the base in name and shape, and be unquantised: else
    one `ValueError` lists it. Any other parameter of `names` keeps the base's value where it does
    not match, with a warning that names it. Warnings also tell of experts in another dtype, and of
    parameters outside `names` that differ in name or shape.
    """
    ruled = {n for n in names if merges(n, base.shape(n), model_type)}
    problems = [
        f"{name}: quantised to {dtype_name(base.dtype(name))} in the base"
        for name in names
        if name in ruled and base.dtype(name) not in DTYPES.values()
    ]
    notices, agreeing = [], {name for name in names if base.dtype(name) in DTYPES.values()}
    base_shapes = base.shapes()
    for expert_name, expert in experts.items():
        shapes, dropped, outside, dtypes = expert.shapes(), [], [], {}
        tied = _ties(base) and _ties(expert)
        for name in sorted({*base_shapes, *shapes}):
            if tied and name.endswith(HEAD) and name not in agreeing:
                continue  # the embeddings, saved twice or once
            match = base_shapes.get(name) == shapes.get(name)
            usable = match and expert.dtype(name) in DTYPES.values()
            differs = (
                f"{name}: expert {expert_name} has {_shape_and_dtype(expert, shapes, name)}, "
                f"the base {_shape_and_dtype(base, base_shapes, name)}"
            )
            new = name not in base_shapes and merges(name, shapes[name], model_type)
            if (name in ruled or new) and not usable:
                problems.append(differs)
            elif name in agreeing and not usable:
                dropped.append(differs)
                agreeing.discard(name)
            elif name in agreeing and expert.dtype(name) != base.dtype(name):
                dtypes[expert.dtype(name), base.dtype(name)] = None
            elif not match:
                outside.append(differs)
        changed = [name for name in getattr(expert, "modules", {}) if name not in agreeing]
        if changed:
            notices.append(
                f"expert {expert_name} adapts {len(changed)} parameters outside the merge; the "
                f"base's are kept ({changed[0]})"
            )
        named = str(getattr(expert, "named_base", ""))
        if HUB_ID.fullmatch(named) and named.split("/")[1].lower() not in str(base.folder).lower():
            notices.append(
                f"expert {expert_name} says in adapter_config.json that it is an adapter of "
                f"{named}; it is taken as one of {base.folder}"
            )
        if renamed := getattr(expert, "own_names", {}):
            ours, theirs = next(iter(renamed.items()))
            notices.append(
                f"expert {expert_name} has other names for {len(renamed)} parameters, taken as the "
                f"base's ({theirs} for {ours})"
            )
        known = _tokens(base_shapes)
        if _tokens(shapes) > known > 0:
            notices.append(
                f"expert {expert_name} has {_tokens(shapes) - known} embeddings more than the "
                "base, which the merged model lacks: prompt it with the base's tokenizer"
            )
        if dtypes:
            kinds = "; ".join(_dtype_notice(theirs, ours) for theirs, ours in dtypes)
            notices.append(f"expert {expert_name} is stored in {kinds}")
        if dropped:
            notices.append(
                f"{len(dropped)} parameters keep the base's values: {_some(dropped, '; ')}"
            )
        if outside:
            notices.append(
                f"{len(outside)} parameters outside the merge differ in name or shape; the base's "
                f"are kept ({outside[0]})"
            )
    if problems:
        raise ValueError(
            f"{len(problems)} parameters cannot be merged with the base model {base.folder}:\n  "
            + _some(problems, "\n  ")
            + "\nAn expert must be a fine-tuned copy of this base model, saved unquantised: "
            "correct base_model, save the expert again, or leave it out."
        )
    for notice in notices:
        _notice(notice)
    return [name for name in names if name in agreeing]


def tied_head(base: Checkpoint) -> dict[str, str]:
    """Head -> embeddings, where config.json ties them and the files hold the same values twice."""
    heads = [name for name in base if name.endswith(HEAD)]
    embeddings = [name for name in base if EMBEDDINGS.search(name)]
    if len(heads) != 1 or len(embeddings) != 1 or not _ties(base):
        return {}
    same = torch.equal(base[heads[0]], base[embeddings[0]])
    return {heads[0]: embeddings[0]} if same else {}


def check_folders(base: Checkpoint, experts: Mapping[str, Checkpoint], output_dir: Path) -> None:
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


def check_changes(base: Checkpoint, experts: Mapping[str, Checkpoint], names: list[str]) -> None:
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


def check_finite(base: Checkpoint, experts: Mapping[str, Checkpoint], names: list[str]) -> None:
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


def _ties(checkpoint: Checkpoint) -> bool:
    """Whether the model's head is its embeddings: config.json says so, or says nothing of it."""
    config = getattr(checkpoint, "config", dict)()  # an adapter has none
    texts = [config.get(key) for key in ("text_config", "llm_config")]
    for part in (config, *(text for text in texts if isinstance(text, dict))):
        if "tie_word_embeddings" in part:
            return bool(part["tie_word_embeddings"])
    return not any(name.endswith(HEAD) for name in checkpoint)


def _tokens(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Rows of the embeddings; 0 where no parameter is named as such."""
    rows = [shape[0] for name, shape in shapes.items() if EMBEDDINGS.search(name) and shape]
    return rows[0] if len(rows) == 1 else 0


def _dtype_notice(theirs: torch.dtype, ours: torch.dtype) -> str:
    """What an expert's dtype means for its task vector, and for the merged model."""
    expert, base = torch.finfo(theirs), torch.finfo(ours)
    if expert.eps > base.eps:
        return (
            f"{expert.dtype}, coarser than the base's {base.dtype}: its task vector has rounding "
            f"noise of up to {50 * expert.eps:.2g} % of each weight; give the base in "
            f"{expert.dtype} too, or the expert as saved in {base.dtype}"
        )
    rounded = (
        f" (but weights below {expert.tiny:.0e} are rounded)" if expert.tiny > base.tiny else ""
    )
    return (
        f"{expert.dtype}, finer than the base's {base.dtype}{rounded}: the merged model has the "
        f"base's, which may round small changes away; dtype='float32' keeps them"
    )


def _some(texts: list[str], separator: str, most: int = 20) -> str:
    more = [f"and {len(texts) - most} more"] if len(texts) > most else []
    return separator.join(texts[:most] + more)


def _shape_and_dtype(
    checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]], name: str
) -> str:
    if name not in shapes:
        return "no such parameter"
    return f"shape {shapes[name]} {dtype_name(checkpoint.dtype(name))}"


def _count_not_finite(tensor: Tensor) -> int:
    if not tensor.is_floating_point() or not tensor.numel():
        return 0
    if tensor.dtype not in DTYPES.values():
        tensor = tensor.float()  # 8-bit floats have no isfinite
    low, high = torch.aminmax(tensor)  # NaN if there is one: no second tensor to write and read
    return 0 if torch.isfinite(low) and torch.isfinite(high) else int((~tensor.isfinite()).sum())


def _notice(text: str) -> None:
    warnings.warn(text, stacklevel=3)
